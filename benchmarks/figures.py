"""Pictures of the engine suites: a stacked bar of a scene's stages, and curves of fidelity.

`gen3r-engine bench --report` draws them where the rows are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import BadInput, Row, phase

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Case of a row, name in the picture; in the order of a scene.
FUSE = "scene_fuse"  # not in every row set: the plain pipeline fuses when it writes
STAGES = {
    "scene_encode_text": "encode text",
    "scene_encode_views": "encode views",
    "scene_denoise": "denoise",
    "scene_decode_appearance": "decode appearance",
    "scene_decode_geometry": "decode geometry",
    FUSE: "fuse",
}
WHOLE_STEPS = 50  # of a scene as the model is meant to be run


def stage_seconds(rows: Sequence[Row], shape: str) -> dict[str, dict[str, float]]:
    """Seconds of each stage by provider, of one shape of scene, for scenes of 50 steps.

    Denoising is the measured time of a step, times 50: the solo scenes of the suites have fewer.
    The suite e2e goes before the suite memory where both have a provider.
    """
    found: dict[str, dict[str, float]] = {}
    for suite in ("e2e", "memory"):
        own = [r for r in rows if r["suite"] == suite and r["shape"] == shape]
        timed = [r for r in own if r["metric"] == "time" and phase(r) == "run"]
        for provider in dict.fromkeys(r["provider"] for r in timed):
            if provider in found:
                continue
            times = {r["case"]: r["p50"] / 1000 for r in timed if r["provider"] == provider}
            if not {*STAGES, "scene_step"} - {FUSE} <= times.keys():
                continue
            stages = {STAGES[case]: times.get(case, 0.0) for case in STAGES}
            stages["denoise"] = WHOLE_STEPS * times["scene_step"]
            found[provider] = stages
    return found


def stage_table(rows: Sequence[Row]) -> str:
    """Markdown: seconds of each stage by provider, a table a shape; empty without such rows."""
    text = []
    for shape in _shapes(rows):
        found = stage_seconds(rows, shape)
        if not found:
            continue
        names = list(STAGES.values())
        text += [f"### A scene of {WHOLE_STEPS} steps, {shape}, seconds", ""]
        text += ["| provider | " + " | ".join(names) + " | sum |", "|" + "---|" * (len(names) + 2)]
        for provider, stages in found.items():
            cells = [f"{stages[name]:.3g}" for name in names]
            text.append(f"| {provider} | {' | '.join(cells)} | {sum(stages.values()):.4g} |")
        text.append("")
    return "\n".join(text)


def _shapes(rows: Sequence[Row]) -> list[str]:
    """Shapes of whole scenes, the largest number of pixels last among equals as they came."""
    return list(dict.fromkeys(r["shape"] for r in rows if r["case"] == "scene_step"))


def plot_stages(rows: Sequence[Row], path: Path) -> bool:
    """Draw one stacked bar a provider for the rows of one GPU; False, and no file, without any.

    Raises
    ------
    BadInput : matplotlib is missing.
    """
    panels = [(shape, found) for shape in _shapes(rows) if (found := stage_seconds(rows, shape))]
    if not panels:
        return False
    height = 1.2 + sum(0.5 + 0.55 * len(found) for _, found in panels)
    figure = _figure(11, height)
    grid = figure.subplots(len(panels), 1, squeeze=False)
    for axes, (shape, found) in zip(grid[:, 0], panels, strict=True):
        left = dict.fromkeys(found, 0.0)
        providers = list(found)
        for index, stage in enumerate(STAGES.values()):
            widths = [found[p][stage] for p in providers]
            starts = [left[p] for p in providers]
            axes.barh(providers, widths, left=starts, color=f"C{index}", label=stage)
            for provider, width in zip(providers, widths, strict=True):
                left[provider] += width
        for provider, total in left.items():
            axes.annotate(f" {total:.3g} s", (total, provider), va="center", fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(right=1.1 * max(left.values()))
        axes.set_title(shape, fontsize=10, loc="left")
        axes.set_xlabel(f"seconds of a scene of {WHOLE_STEPS} steps")
    grid[0, 0].legend(ncols=len(STAGES), fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    figure.suptitle(f"Stages, {rows[0]['gpu']}", x=0.02, ha="left")
    figure.savefig(path, dpi=110)
    return True


def fidelity_table(rows: Sequence[Row]) -> str:
    """Markdown: the curves' values at some steps; empty without fidelity rows."""
    text = []
    for case, shape in dict.fromkeys((r["case"], r["shape"]) for r in _curves(rows)):
        own = [r for r in _curves(rows) if (r["case"], r["shape"]) == (case, shape)]
        count = max(len(r["config"]["curve"]["rel_error"]) for r in own)
        shown = [i for i in (0, 1, 2, 3, 9, 19, 29, 39) if i < count - 1] + [count - 1]
        title = f"### {case}, {shape}: relative error (1 - cosine) against float32, after step"
        text += [title, ""]
        text.append("| provider | " + " | ".join(str(i + 1) for i in shown) + " |")
        text.append("|" + "---|" * (len(shown) + 1))
        for r in own:
            curve = r["config"]["curve"]
            pairs = list(zip(curve["rel_error"], curve["cosine"], strict=True))
            cells = [f"{pairs[i][0]:.2e} ({1 - pairs[i][1]:.1e})" for i in shown if i < len(pairs)]
            cells += [""] * (len(shown) - len(cells))
            text.append(f"| {r['provider']} | {' | '.join(cells)} |")
        text.append("")
    return "\n".join(text)


def _curves(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r["metric"] == "latent_error" and "curve" in r["config"]]


def plot_fidelity(rows: Sequence[Row], path: Path) -> bool:
    """Draw error by step, a panel a case, for the rows of one GPU; False without such rows.

    Raises
    ------
    BadInput : matplotlib is missing.
    """
    cases = list(dict.fromkeys((r["case"], r["shape"]) for r in _curves(rows)))
    if not cases:
        return False
    figure = _figure(6 * len(cases), 4.5)
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    providers = list(dict.fromkeys(r["provider"] for r in _curves(rows)))
    for axes, (case, shape) in zip(panels, cases, strict=True):
        for r in _curves(rows):
            if (r["case"], r["shape"]) != (case, shape):
                continue
            errors = r["config"]["curve"]["rel_error"]
            color = f"C{providers.index(r['provider'])}"
            steps = range(1, len(errors) + 1)
            axes.plot(steps, errors, marker=".", color=color, label=r["provider"])
        axes.set(yscale="log", xlabel="step", title=f"{case}, {shape}")
        axes.grid(which="both", alpha=0.25)
        axes.legend()
    panels[0].set_ylabel("|latents - float32| / |float32|")
    figure.suptitle(f"Fidelity, {rows[0]['gpu']}")
    figure.savefig(path, dpi=110)
    return True


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput("matplotlib is not installed; pip install 'gen3r-engine[bench]'") from error
    return Figure(figsize=(width, height), layout="constrained")
