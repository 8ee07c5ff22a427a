"""The yardstick as a Markdown table for people, and as benchmark rows for the record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gen3r_engine.evaluation.figures import Figure, plain
from gen3r_engine.evaluation.yardstick import Yardstick, YardstickRow

SUITE = "quality"
METRICS = {  # name of a figure -> metric of a row
    "PSNR": "psnr",
    "LPIPS": "lpips",
    "depth AbsRel": "abs_rel",
    "pose AUC@30": "pose_auc",
}


def markdown(found: Yardstick) -> str:
    """The table, with what it is of above it and what its columns mean below."""
    options, where, model = found.options, found.facts["environment"], found.facts["model"]
    frames, height, width = found.shape
    lines = [
        f"{where['gpu']}, torch {where['versions']['torch']}, commit {where['commit']}, "
        f"{where['utc'][:10]}. {options.scenes} held-out scenes of {frames} x {height} x {width}, "
        f"seed {options.seed}; reference: exact ({model['dtype']}), {options.steps} steps "
        f"{options.solver}, guidance {found.guidance:g}; {options.batch} scenes a batch.",
        "",
    ]
    to_exact = _names(found.rows, "to_exact")
    to_truth = _names(found.rows, "to_truth")
    head = [
        "",
        *(f"{name} to exact" for name in to_exact),
        *to_truth,
        "s a scene",
        "of it denoising",
    ]
    lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in found.rows:
        if row.problem:
            cells = [f"not here: {row.problem}", *[""] * (len(head) - 2)]
        else:
            figures = [_named(row.to_exact, name) for name in to_exact]
            figures += [_named(row.to_truth, name) for name in to_truth]
            cells = [_cell(figure) for figure in figures]
            cells += [f"{row.scene_seconds:.3g}", f"{row.seconds.get('denoise', math.nan):.3g}"]
        lines.append("| " + " | ".join([row.knob.name, *cells]) + " |")
    notes = dict.fromkeys(f.note for row in found.rows for f in row.to_exact if f.note)
    return "\n".join([*lines, *("\n" + note for note in notes)])


def _names(rows: Sequence[YardstickRow], side: str) -> list[str]:
    """Titles of the figures that any row has values of, in their order."""
    figures = [figure for row in rows for figure in getattr(row, side) if figure.values]
    return list(dict.fromkeys(_title(figure) for figure in figures))


def _title(figure: Figure) -> str:
    unit = f", {figure.unit}" if figure.unit else ""
    part = "" if figure.part == "to exact" else f"{figure.part} "
    return f"{part}{figure.name}{unit}"


def _named(figures: Sequence[Figure], title: str) -> Figure | None:
    return next((figure for figure in figures if _title(figure) == title), None)


def _cell(figure: Figure | None) -> str:
    if figure is None or not figure.values:
        return ""
    mean = figure.mean
    if figure.unit == "dB":
        return f"{mean:.2f}"
    return f"{mean:.4f}" if math.isfinite(mean) else "inf"


def json_rows(found: Yardstick) -> list[dict[str, Any]]:
    """One row a figure and knob, with the keys of benchmarks/results; p20 to p80 over scenes.

    `case` is the figure, `provider` the knob, `config` holds the mean, its interval and the
    scenes. A knob that could not be measured has no row; `markdown` says why.
    """
    rows = []
    for row in found.rows:
        for figure in (*row.to_exact, *row.to_truth):
            if figure.values:
                measured = {k: figure.to_dict()[k] for k in ("mean", "low", "high", "scenes")}
                case = f"{figure.part} {figure.name}".replace(" ", "_").lower()
                metric, unit = METRICS[figure.name], figure.unit or "1"
                rows.append(_row(found, row, case, metric, unit, figure.values, measured))
        if row.problem:
            continue
        for stage, seconds in {**row.seconds, "scene": row.scene_seconds}.items():
            case = stage.replace(" ", "_")
            rows.append(_row(found, row, case, "time", "s", (seconds,), {}))
    return rows


def _row(
    found: Yardstick,
    row: YardstickRow,
    case: str,
    metric: str,
    unit: str,
    values: Sequence[float],
    config: dict[str, Any],
) -> dict[str, Any]:
    where, options = found.facts["environment"], found.options
    known = [value for value in values if math.isfinite(value)]
    p20, p50, p80 = np.percentile(known, (20, 50, 80)) if known else (math.nan,) * 3
    versions = where["versions"]
    settings = {
        "steps": options.steps,
        "solver": options.solver,
        "guidance": found.guidance,
        **row.numerics,
        **row.knob.settings,
    }
    return {
        "suite": SUITE,
        "case": case,
        "provider": row.knob.name,
        "shape": "x".join(map(str, found.shape)),
        "dtype": row.dtype or found.facts["model"]["dtype"],
        "metric": metric,
        "unit": unit,
        "p20": plain(p20),
        "p50": plain(p50),
        "p80": plain(p80),
        "share_of_ceiling": None,
        "rel_error": None,
        "gpu": where["gpu"],
        "capability": where["capability"],
        "driver": where["driver"],
        "torch": versions["torch"],
        "triton": versions["triton"],
        "commit": where["commit"],
        "utc": where["utc"],
        "config": {
            "repeats": len(values),
            **config,
            "settings": settings,
            **{name: found.facts["model"][name] for name in ("checkpoint", "weights")},
            "seed": options.seed,
            "batch": options.batch,
            "versions": {k: v for k, v in versions.items() if v is not None},
        },
    }
