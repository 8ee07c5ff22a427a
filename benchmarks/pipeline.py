"""Seconds per stage and peak memory of the reference pipeline at the real sizes, random weights.

    python -m benchmarks.pipeline               # H100: 560 x 560, 49 frames, bf16, 3 tasks
    python -m benchmarks.pipeline --preset nano --device cpu --repeats 1

Random weights are made on the device, so no checkpoint is needed. Views are noise, on which the
timings do not depend.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import (
    Measurement,
    device_name,
    library_versions,
    percentiles,
    write_rows,
)
from benchmarks.timing import dtype_name, shape_name
from gen3r.components import COMPONENTS
from gen3r.config import GEN3R, Gen3RConfig
from gen3r.nano import ARCHITECTURE, random_modules
from gen3r.nano_tokenizer import build_tokenizer
from gen3r.pipeline import STAGES, Gen3RPipeline
from gen3r.scene import TASKS, Scene, SceneRequest
from gen3r.schedulers import make_euler_scheduler
from gen3r_kernels import Backends
from gen3r_kernels.backends import OPERATOR_MODES

PRESETS = {"gen3r": GEN3R, "nano": ARCHITECTURE}


def build(
    config: Gen3RConfig, dtype: torch.dtype, device: str, backends: Backends
) -> Gen3RPipeline:
    """A pipeline with random weights at the sizes of `config`."""
    return Gen3RPipeline(
        config=config,
        **random_modules(config, backends, dtype, device),
        tokenizer=build_tokenizer(),
        scheduler=make_euler_scheduler(),
        untrained=True,
    )


def provider_of(pipeline: Gen3RPipeline) -> str:
    """operators/attention: what the names stand for off a GPU, the names asked for on one."""
    backends = pipeline.transformer.backends
    if pipeline.device.type == "cuda":
        return f"{backends.operators}/{backends.attention}"
    operators = "reference" if backends.operators == "auto" else backends.operators
    return f"{operators}/{backends.attention_backend.name}"


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
) -> list[Measurement]:
    """One warm-up and `repeats` timed runs of a task: each stage, one step, the whole, memory."""
    request = make_request(task, pipeline.config, frames, size)
    runs = []
    for index in range(repeats + 1):
        scene = pipeline(requests=[request], num_inference_steps=steps)
        assert isinstance(scene, list)
        check(scene[0], frames, size)
        if index:
            runs.append(scene[0].info)
    seconds = {stage: [run["seconds"][stage] for run in runs] for stage in STAGES}
    seconds["step"] = [s / steps for s in seconds["denoise"]]
    seconds["total"] = [math.fsum(run["seconds"].values()) for run in runs]
    common: dict[str, Any] = {
        "provider": provider_of(pipeline),
        "shape": shape_name(frames, size, size),
        "dtype": dtype_name(pipeline.dtype),
        "config": {"steps": steps, "versions": library_versions()},
    }
    rows = [
        Measurement(
            case=f"{task}_{stage.replace(' ', '_')}",
            metric="time",
            unit="ms",
            samples=[1000 * s for s in values],
            **common,
        )
        for stage, values in seconds.items()
    ]
    peaks = [run["peak_memory_gib"] for run in runs]
    rows.append(
        Measurement(case=f"{task}_total", metric="memory", unit="GiB", samples=peaks, **common)
    )
    return rows


def show(rows: Sequence[Measurement]) -> None:
    """The rows as a table."""
    table = Table("case", "provider", "metric", "p50", "unit", title=device_name())
    for row in rows:
        median = f"{percentiles(row.samples)[1]:,.1f}"
        table.add_row(row.case, row.provider, row.metric, median, row.unit)
    Console(width=110).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite and write benchmarks/results/<gpu>/pipeline.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=None)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--operators", choices=OPERATOR_MODES, default="auto")
    parser.add_argument("--attention", nargs="+", default=["auto"], help="backends by name")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="results folder (default: benchmarks/results)")
    parser.add_argument(
        "--commit", "--revision", help="recorded where the tree is not a git checkout"
    )
    options = parser.parse_args(argv)
    cuda = options.device.startswith("cuda")
    config = PRESETS[options.preset or ("gen3r" if cuda else "nano")]
    dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    frames, size = options.frames or config.num_frames, options.size or config.size
    rows: list[Measurement] = []
    for attention in options.attention:
        backends = Backends(attention=attention, operators=options.operators)
        pipeline = build(config, dtype, options.device, backends)
        count = sum(p.numel() for n in COMPONENTS for p in getattr(pipeline, n).parameters())
        print(f"{count / 1e9:.3f} B parameters, attention {attention}", flush=True)
        for task in options.tasks:
            fresh = measure(pipeline, task, frames, size, options.steps, options.repeats)
            show(fresh)
            rows += fresh
        del pipeline
        if cuda:
            torch.cuda.empty_cache()
    print(write_rows(rows, "pipeline", options.out, options.commit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
