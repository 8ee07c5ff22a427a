"""What a running command shows: bars on a terminal, one plain line per stage elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text


class _Rate(ProgressColumn):
    """Steps per second, or seconds per step when that is slower than one a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        text = f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
        return Text(text, style="dim")


class StageProgress:
    """Shows stages as they go. Call it with (stage, done, total); use it in a `with` block.

    `seconds` holds the wall time of each finished stage by its name. Stages may run beside each
    other and report from several threads. With `brief` the bar of a finished stage goes.
    """

    def __init__(self, stream: TextIO | None = None, brief: bool = False) -> None:
        self.stream = stream or sys.stderr
        self.brief = brief
        self._lock = threading.Lock()
        self.seconds: dict[str, float] = {}
        self._started: dict[str, float] = {}
        self._last = time.perf_counter()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        if self.stream.isatty():
            self._bars = Progress(
                SpinnerColumn(finished_text="[green]✓[/]"),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self.stream),
                redirect_stdout=False,  # what goes to a pipe there must get there
            )

    def __enter__(self) -> Self:
        self._last = time.perf_counter()
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        with self._lock:
            self._report(stage, done, total)

    def _report(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        # A stage may first report when partly done: it began when the last report ended.
        start = self._started.setdefault(stage, self._last if done else now)
        self._last = now
        finished = done >= total
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=total)
            shown = not (finished and self.brief)
            self._bars.update(self._tasks[stage], completed=done, total=total, visible=shown)
        if finished and stage not in self.seconds:
            self.seconds[stage] = now - start
            if self._bars is None:
                steps = f" ({total} steps)" if total > 1 else ""
                print(f"{stage}{steps}: {now - start:.1f} s", file=self.stream, flush=True)

    def say(self, text: str) -> None:
        """One line on the output stream, above the bars where both are on one terminal."""
        if self._bars is not None and sys.stdout.isatty():
            self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)


def note(text: str) -> None:
    """One line for the person, on the error stream."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the output stream: plain columns where that is no terminal."""
    if not sys.stdout.isatty():
        listed = [headings, *rows]
        widths = [max(len(row[column]) for row in listed) for column in range(len(headings))]
        for row in listed:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
        return
    table = Table(box=None, padding=(0, 2))
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def print_seconds(seconds: Mapping[str, float]) -> None:
    """A small table of seconds per stage on the output stream."""
    total = sum(seconds.values())
    rows = [*seconds.items(), ("total", total)]
    if not sys.stdout.isatty():
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"  {name:<{width}}  {value:8.2f} s")
        return
    table = Table(box=None, padding=(0, 2), show_header=True)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right", style="dim")
    for name, value in rows:
        share = f"{100 * value / total:.0f} %" if total else ""
        table.add_row(name, f"{value:.2f}", share, style="bold" if name == "total" else "")
    Console().print(table)
