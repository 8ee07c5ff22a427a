"""Markdown tables and pictures (roofline, stages, fidelity) from any set of rows.

gen3r-engine bench --report                                  # all of benchmarks/results
gen3r-engine bench --report benchmarks/results/GPU/kernels.jsonl --out outputs/report
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import figures
from benchmarks.harness import BadInput, Row, phase, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = (
    *("case", "shape", "dtype", "provider", "time, ms (p20 to p80)", "rate", "of ceiling"),
    *("speed-up on eager", "error", "peak GiB", "energy, J", "first call, s"),
    "quality (p20 to p80)",
)
QUALITY = ("psnr", "lpips", "abs_rel", "pose_auc")  # metrics of gen3r-engine eval
MILLISECONDS = {"ms": 1.0, "s": 1000.0}
MEMORY_BOUND = 50.0  # operations per byte; norms have at most 10, products hundreds
# Ten colours and twelve markers: no two providers share both.
MARKERS = "osD^vP*X<>hd"


_ABOVE: dict[str, Any] = {  # a label just above its anchor, ending there
    "xytext": (-2, 4),
    "textcoords": "offset points",
    "ha": "right",
    "fontsize": 9,
}


@dataclass
class Line:
    """All rows of one provider of one case."""

    case: str
    shape: str
    dtype: str
    provider: str
    rows: dict[str, Row] = field(default_factory=dict)  # by metric, or "compile"

    @property
    def label(self) -> str:
        return f"{self.case}, {self.shape}, {self.dtype}"

    @property
    def seconds(self) -> float:
        """Median seconds of the call; NaN without a time."""
        row = self.rows.get("time")
        return row["p50"] * MILLISECONDS[row["unit"]] / 1000 if row else math.nan


def lines_of(rows: Sequence[Row]) -> list[Line]:
    """Rows gathered by case and provider, in the order in which they came."""
    found: dict[tuple[str, ...], Line] = {}
    for row in rows:
        key = (row["case"], row["shape"], row["dtype"], row["provider"])
        kind = "compile" if phase(row) == "compile" else row["metric"]
        found.setdefault(key, Line(*key)).rows[kind] = row
    return list(found.values())


def _cells(line: Line, eager_seconds: float) -> list[str]:
    def value(kind: str, text: str = "{:,.4g}") -> str:
        return text.format(line.rows[kind]["p50"]) if kind in line.rows else ""

    time, text = line.rows.get("time"), ""
    if time:
        low, middle, high = (time[p] * MILLISECONDS[time["unit"]] for p in ("p20", "p50", "p80"))
        text = f"{middle:,.4g} ({low:,.4g} to {high:,.4g})"
    rates = [line.rows[m] for m in ("tflops", "gbps") if m in line.rows]
    shares = [f"{r['share_of_ceiling']:.0%}" for r in rates if r["share_of_ceiling"] is not None]
    judged = [line.rows[metric] for metric in QUALITY if metric in line.rows]
    error = next(iter(line.rows.values()))["rel_error"]
    ratio = eager_seconds / line.seconds
    return [
        *(line.case, line.shape, line.dtype, line.provider),
        text,
        ", ".join(f"{r['p50']:,.4g} {r['unit']}" for r in rates),
        ", ".join(shares),
        "" if math.isnan(ratio) else f"{ratio:.3g}",
        "" if error is None else f"{error:.2g}",
        value("memory"),
        value("energy"),
        value("compile"),
        ", ".join(_spread(row) for row in judged),
    ]


def _spread(row: Row) -> str:
    """Median and percentiles, with the unit where there is one."""
    low, middle, high = (f"{row[p]:.4g}" for p in ("p20", "p50", "p80"))
    unit = "" if row["unit"] == "1" else f" {row['unit']}"
    return f"{middle}{unit} ({low} to {high})"


def markdown(rows: Sequence[Row]) -> str:
    """One section per GPU and suite, one table line per case and provider."""
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        parts.setdefault((row["gpu"], row["suite"]), []).append(row)
    text = []
    for (gpu, suite), own in parts.items():
        text += [f"## {gpu}: {suite}", "", _made_with(own), ""]
        lines = lines_of(own)
        eager = {line.label: line.seconds for line in lines if line.provider == "eager"}
        table = [_cells(line, eager.get(line.label, math.nan)) for line in lines]
        # A column in which nothing stands is left out.
        used = [i for i in range(len(HEADER)) if any(cells[i] for cells in table)]
        text.append("| " + " | ".join(HEADER[i] for i in used) + " |")
        text.append("|" + "---|" * len(used))
        text += ["| " + " | ".join(cells[i] for i in used) + " |" for cells in table]
        text.append("")
    return "\n".join(text)


def _made_with(rows: Sequence[Row]) -> str:
    """Versions, commits and dates behind the rows, in one line."""

    def each(key: str) -> str:
        return ", ".join(dict.fromkeys(str(r[key]) for r in rows if r[key] is not None))

    names = {"torch": "torch", "triton": "triton", "driver": "driver", "commit": "commit"}
    parts = [f"{name} {each(key)}" for key, name in names.items() if each(key)]
    dates = sorted(r["utc"] for r in rows)
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return "; ".join([*parts, span])


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """report.md and, per GPU, roofline-, stages- and fidelity-<gpu>.png where rows are there for
    them; returns the files.

    Raises
    ------
    BadInput : matplotlib is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text, written = markdown(rows), [folder / "report.md"]
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        own = [row for row in rows if row["gpu"] == gpu]
        tables = [t for t in (figures.stage_table(own), figures.fidelity_table(own)) if t]
        text += "\n".join(["", f"## {gpu}: scenes and fidelity", "", *tables]) if tables else ""
        for name, plot in PICTURES.items():
            path = folder / f"{name}-{slug(gpu)}.png"
            if plot(own, path):
                written.append(path)
                text += f"\n![{name.capitalize()} of {gpu}]({path.name})\n"
    written[0].write_text(text, encoding="utf-8")
    return written


def plot_roofline(rows: Sequence[Row], path: Path) -> bool:
    """Draw the kernel rows of one GPU; False, and no file, without rows that count their work.

    Raises
    ------
    BadInput : matplotlib is missing.
    """
    lines = [
        line
        for line in lines_of([r for r in rows if r["suite"] == "kernels"])
        if "time" in line.rows and {"bytes", "flops"} <= set(line.rows["time"]["config"])
    ]
    if not lines:
        return False
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullFormatter
    except ImportError as error:
        raise BadInput("matplotlib is not installed; pip install 'gen3r-engine[bench]'") from error
    figure = Figure(figsize=(15, 10), layout="constrained")
    ceilings = [row for row in rows if row["case"] == "ceiling"]
    memory = [line for line in lines if intensity(line) < MEMORY_BOUND]
    compute = [line for line in lines if intensity(line) >= MEMORY_BOUND]
    colors = {name: i for i, name in enumerate(dict.fromkeys(line.provider for line in lines))}
    panels = [(part, scale) for part, scale in ((memory, "log"), (compute, "linear")) if part]
    for axes, (part, scale) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _draw_points(axes, part, colors)
        axes.set(xscale="log", yscale=scale)
        axes.xaxis.set_minor_formatter(NullFormatter())
        _draw_roofs(axes, ceilings)
        axes.set_xlabel("floating-point operations per counted byte")
        axes.set_ylabel("TFLOP/s")
        axes.grid(which="both" if scale == "log" else "major", alpha=0.25)
    figure.suptitle(f"Roofline, {rows[0]['gpu']}")
    figure.savefig(path, dpi=110)
    return True


def intensity(line: Line) -> float:
    """Counted operations per counted byte."""
    work = line.rows["time"]["config"]
    return float(work["flops"] / work["bytes"])


def _draw_roofs(axes: Axes, ceilings: Sequence[Row]) -> None:
    """The measured copy bandwidth and products, over the range that the points need."""
    left, right = axes.get_xlim()
    left, right = left / 1.5, right * 1.5
    slope = next((row["p50"] * 1e-3 for row in ceilings if row["metric"] == "gbps"), math.inf)
    if slope < math.inf and left < MEMORY_BOUND:  # in TB/s; intensity times it is TFLOP/s
        xs = [left, right]
        axes.plot(xs, [slope * x for x in xs], color="0.3", linewidth=1.2)
        middle = math.sqrt(left * right)
        axes.annotate(f"copy {slope:.3g} TB/s", (middle, 1.15 * slope * middle), **_ABOVE)
    for row in ceilings:
        if row["metric"] != "tflops" or left < MEMORY_BOUND:
            continue
        level, name = row["p50"], row["provider"]
        xs = [left * (right / left) ** (i / 200) for i in range(201)]
        axes.plot(xs, [min(slope * x, level) for x in xs], color="0.3", linewidth=1.2)
        axes.annotate(f"{name} {level:,.4g} TFLOP/s", (right, level), **_ABOVE)
    if left >= MEMORY_BOUND:
        axes.set_ylim(bottom=0)
    axes.set_xlim(left, right)


def _draw_points(axes: Axes, lines: Sequence[Line], colors: Mapping[str, int]) -> None:
    """A point per provider; a number per case at its fastest, explained in a list below."""
    cases: dict[str, list[tuple[float, float, Line]]] = {}
    for provider, index in colors.items():
        own = [line for line in lines if line.provider == provider]
        if not own:
            continue
        xs = [intensity(line) for line in own]
        ys = [line.rows["time"]["config"]["flops"] / line.seconds / 1e12 for line in own]
        for x, y, line in zip(xs, ys, own, strict=True):
            cases.setdefault(line.label, []).append((x, y, line))
        marker, color = MARKERS[index % len(MARKERS)], f"C{index % 10}"
        axes.scatter(xs, ys, s=34, label=provider, alpha=0.8, marker=marker, color=color)
    listed = []
    for number, (label, points) in enumerate(cases.items(), 1):
        x, y, best = max(points, key=lambda point: point[1])
        shift = (6, 3) if number % 2 else (-15, 3)
        axes.annotate(str(number), (x, y), xytext=shift, textcoords="offset points", fontsize=9)
        listed.append(f"{number:>2}  {label}: {best.provider}{_share(best)}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, fontsize=8, frameon=False)
    axes.text(0.0, -0.1, "\n".join(listed), transform=axes.transAxes, va="top", fontsize=8)


def _share(line: Line) -> str:
    shares = [r["share_of_ceiling"] for r in line.rows.values() if r["share_of_ceiling"]]
    return f", {max(shares):.0%}" if shares else ""


PICTURES = {  # name of the file, and what draws it from the rows of one GPU
    "roofline": plot_roofline,
    "stages": figures.plot_stages,
    "fidelity": figures.plot_fidelity,
}
