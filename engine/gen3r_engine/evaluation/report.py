"""The nano suite's result for people: tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table

from gen3r_engine.evaluation import moves
from gen3r_engine.evaluation.figures import Figure, bootstrap_interval
from gen3r_engine.evaluation.nano import NanoResult

WIDTH = 132  # columns where the output is no terminal


def print_nano(result: NanoResult, console: Console | None = None) -> None:
    """The figures, the confusion of the moves, and the seconds."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
    console.print(nano_tables(result))


def nano_tables(result: NanoResult) -> RenderableType:
    """What `print_nano` prints."""
    settings, model = result.options, result.facts["model"]
    guidance = model["guidance_scale"] if settings.guidance is None else settings.guidance
    title = (
        f"{settings.scenes} held-out scenes, preset {model['preset']} ({model['dtype']}), "
        f"{settings.steps} steps {settings.solver}, guidance {guidance:g}"
    )
    parts: list[RenderableType] = [figure_table(result.figures, title)]
    parts += dict.fromkeys(f.note for f in result.figures if f.note and not f.values)
    if result.moves is not None:
        parts.append(confusion_table(result.moves.confusion))
    if result.shifts:
        parts.append(_text_table(result))
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
    parts.append(f"seconds: {seconds}")
    return Group(*parts)


def figure_table(figures: Sequence[Figure], title: str) -> Table:
    """Part, figure, mean with its 95 % interval, bar, verdict, baselines."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("part", "figure"):
        table.add_column(name)
    for name in ("mean", "95 %", "bar", ""):
        table.add_column(name, justify="right")
    table.add_column("baselines and notes", style="dim")
    part = ""
    for figure in figures:
        unit = f" ({figure.unit})" if figure.unit else ""
        beside = [f"{k} {_short(sum(v) / len(v))}" for k, v in figure.baselines.items()]
        table.add_row(
            figure.part if figure.part != part else "",
            figure.name + unit,
            _short(figure.mean) if figure.values else "not measured",
            _interval(figure),
            _bar(figure),
            {True: "[green]yes[/]", False: "[red]NO[/]", None: ""}[figure.holds],
            "; ".join([*beside, *([figure.note] if figure.note and figure.values else [])]),
        )
        part = figure.part
    return table


def confusion_table(counts: Sequence[Sequence[int]]) -> Table:
    """Asked moves in rows, found ones in columns."""
    title = "moves: asked (rows), found (columns)"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in moves.MOVES:
        table.add_column(name, justify="right")
    for name, row in zip(moves.MOVES, counts, strict=True):
        table.add_row(name, *(str(count) if count else "." for count in row))
    return table


def _text_table(result: NanoResult) -> Table:
    title = "text: the scenes with the largest shifts, in units of Lab (a, b)"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("clip", "part", "from", "to", "shift", "of"):
        table.add_column(name, justify="right" if name in ("clip", "shift", "of") else "left")
    for shift in sorted(result.shifts, key=lambda s: -abs(s.shift))[:8]:
        case = shift.case
        numbers = f"{shift.shift:+.1f}", f"{shift.full:.0f}"
        table.add_row(str(case.number), case.part.name, case.part.color, case.color, *numbers)
    return table


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else ("inf" if value > 0 else "nan")


def _interval(figure: Figure) -> str:
    low, high = bootstrap_interval(figure.values)
    if len(figure.values) < 2 or math.isnan(low):
        return ""
    return f"{_short(low)} to {_short(high)}"


def _bar(figure: Figure) -> str:
    if figure.bar is None:
        return ""
    return f"{'>=' if figure.at_least else '<='} {figure.bar:g}"
