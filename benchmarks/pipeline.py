"""Seconds per stage and peak memory of the reference pipeline at the real sizes, random weights.

    python -m benchmarks.pipeline               # H100: 560 x 560, 49 frames, bf16, 3 tasks
    python -m benchmarks.pipeline --preset nano --device cpu --repeats 1

Random weights are made on the device, so no checkpoint is needed. Views are noise, on which the
timings do not depend.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Row, device_name, percentiles, write_rows
from gen3r.components import COMPONENTS
from gen3r.config import GEN3R, Gen3RConfig
from gen3r.nano import NANO, build_tokenizer, random_modules
from gen3r.pipeline import STAGES, Gen3RPipeline
from gen3r.scene import TASKS, Scene, SceneRequest
from gen3r.schedulers import make_euler_scheduler
from gen3r_kernels import Backends

PRESETS = {"gen3r": GEN3R, "nano": NANO}


def build(config: Gen3RConfig, dtype: torch.dtype, device: str, attention: str) -> Gen3RPipeline:
    """A pipeline with random weights at the sizes of `config`."""
    return Gen3RPipeline(
        config=config,
        **random_modules(config, Backends(attention=attention), dtype, device),
        tokenizer=build_tokenizer(),
        scheduler=make_euler_scheduler(),
        untrained=True,
    )


def make_request(task: str, config: Gen3RConfig, frames: int, size: int) -> SceneRequest:
    """1view takes a built-in trajectory (VGGT runs on the view); the others have no cameras."""
    count = {"1view": 1, "2view": 2}.get(task, frames)
    noise = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return SceneRequest(
        images=list(noise),
        prompt="an old stone arena with many arches under a sunny sky",
        task=task,
        cameras="zoom_in" if task == "1view" else "free",
        num_frames=frames,
        height=size,
        width=size,
    )


def check(scene: Scene, frames: int, size: int) -> None:
    """A run that produced something else than a scene of the asked size is no measurement."""
    if scene.rgb.shape != (frames, size, size, 3) or not scene.depth.isfinite().all():
        raise RuntimeError(f"bad scene: rgb {tuple(scene.rgb.shape)}, or depth is not finite")


def measure(
    pipeline: Gen3RPipeline, task: str, frames: int, size: int, steps: int, repeats: int
) -> list[Row]:
    """One warm-up and `repeats` timed runs of a task: a row per stage, and one for the whole."""
    request = make_request(task, pipeline.config, frames, size)
    runs = []
    for index in range(repeats + 1):
        scene = pipeline(requests=[request], num_inference_steps=steps)
        assert isinstance(scene, list)
        check(scene[0], frames, size)
        if index:
            runs.append(scene[0].info)
    attention = pipeline.transformer.backends.attention_backend.name
    common = {
        "provider": f"reference/{attention}",
        "shape": f"{frames}x{size}x{size}",
        "dtype": str(pipeline.dtype).removeprefix("torch."),
    }
    memory = max(run["peak_memory_gib"] for run in runs)
    rows = []
    for stage in STAGES:
        times = [1000 * run["seconds"][stage] for run in runs]
        extra: dict[str, object] = {"task": task, "peak_memory_gib": memory}
        if stage == "denoise":
            extra.update(steps=steps, ms_per_step=round(percentiles(times)["p50_ms"] / steps, 2))
        rows.append(
            Row(op=f"pipeline.{stage.replace(' ', '_')}", milliseconds=times, extra=extra, **common)
        )
    whole = [1000 * math.fsum(run["seconds"].values()) for run in runs]
    extra = {"task": task, "steps": steps, "peak_memory_gib": memory}
    rows.append(Row(op="pipeline.total", milliseconds=whole, extra=extra, **common))
    return rows


def show(rows: Sequence[Row]) -> None:
    """The rows as a table."""
    table = Table("task", "stage", "provider", "p50 ms", "ms/step", "peak GiB", title=device_name())
    for row in rows:
        table.add_row(
            str(row.extra["task"]),
            row.op.removeprefix("pipeline."),
            row.provider,
            f"{percentiles(row.milliseconds)['p50_ms']:,.1f}",
            str(row.extra.get("ms_per_step", "")),
            str(row.extra["peak_memory_gib"]),
        )
    Console(width=110).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the suite and write benchmarks/results/<gpu>/pipeline.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=None)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--attention", nargs="+", default=["auto"], help="backends by name")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="results folder (default: benchmarks/results)")
    parser.add_argument("--commit", help="recorded commit, where the tree is not a git checkout")
    options = parser.parse_args(argv)
    cuda = options.device.startswith("cuda")
    config = PRESETS[options.preset or ("gen3r" if cuda else "nano")]
    dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    frames, size = options.frames or config.num_frames, options.size or config.size
    rows: list[Row] = []
    for attention in options.attention:
        pipeline = build(config, dtype, options.device, attention)
        count = sum(p.numel() for n in COMPONENTS for p in getattr(pipeline, n).parameters())
        print(f"{count / 1e9:.3f} B parameters, attention {attention}", flush=True)
        for task in options.tasks:
            rows += measure(pipeline, task, frames, size, options.steps, options.repeats)
            show(rows[-len(STAGES) - 1 :])
        del pipeline
        if cuda:
            torch.cuda.empty_cache()
    print(write_rows(rows, "pipeline", options.out, options.commit))


if __name__ == "__main__":
    main()
