"""Scene fusion on the GPU: the whole of it and its three heavy steps, on the synthetic clip.

gen3r-engine bench --suite fusion
python -m benchmarks.fusion --frames 9 --size 224 --provider cuda python

The clip is benchmarks/room.py, on the device before the clock starts; what comes out stays there.
`native` and `python` are the same steps on this machine's processors, once each, if asked for.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import BadInput, Measurement, percentiles, write_rows
from benchmarks.room import room
from benchmarks.timing import Stopwatch, shape_name
from gen3r_engine.fusion import REMOVE_FAR, FusionConfig, fuse_points
from gen3r_engine.fusion_cuda import fuse_cuda, statistical_inliers
from gen3r_kernels.neighbor_distance import neighbor_distance
from gen3r_kernels.neighbor_index import build_index
from gen3r_kernels.voxel_average import voxel_average

PROVIDERS = ("cuda", "native", "python")
CONFIGS = {
    "fuse_points": FusionConfig(),
    "fuse_points_remove_far": REMOVE_FAR,
    "fuse_points_near": FusionConfig(near_percentile=80.0),
}


@dataclass(frozen=True)
class Clip:
    """points [N, 3] float64, colors [N, 3] uint8, valid [N] bool, all on one device."""

    points: Tensor
    colors: Tensor
    valid: Tensor
    shape: str


def clip(frames: int, size: int, device: torch.device) -> Clip:
    scene = room(frames, size, size)
    points, colors = scene.points.view(-1, 3).to(device), scene.rgb.view(-1, 3).to(device)
    return Clip(points, colors, scene.mask.flatten().to(device), shape_name(frames, size, size))


def on_gpu(given: Clip) -> list[Measurement]:
    """The three configurations, then the default's steps alone."""
    watch, rows = Stopwatch(given.points.device), []

    def add(case: str, work: Callable[[], Any], **config: Any) -> None:
        watch.first(lambda: work)
        times, peak = watch.times(lambda: work), watch.peak_gib(lambda: work)
        name = (case, "cuda", given.shape, "float64")
        rows.append(Measurement(*name, "time", "ms", times, config=config))
        if peak is not None:
            rows.append(Measurement(*name, "memory", "GiB", [peak]))

    for case, config in CONFIGS.items():
        run = partial(fuse_cuda, given.points, given.colors, config, valid=given.valid)
        add(case, run, counts=run().counts)
    config = CONFIGS["fuse_points"]
    points, colors = given.points[given.valid], given.colors[given.valid]
    add("fuse_build_index", partial(build_index, points))
    index = build_index(points)
    add("fuse_neighbor_distance", partial(neighbor_distance, index, config.nb_neighbors))
    del index
    kept = statistical_inliers(points, config.nb_neighbors, config.std_ratio)
    points, colors = points[kept], colors[kept]
    assert config.voxel_size is not None
    add("fuse_voxel_average", partial(voxel_average, points, colors, config.voxel_size))
    return rows


def on_cpu(given: Clip, backend: str) -> list[Measurement]:
    """One run of each configuration but the slowest."""
    rows = []
    points, colors = given.points[given.valid].cpu(), given.colors[given.valid].cpu()
    for case in ("fuse_points", "fuse_points_remove_far"):
        start = time.perf_counter()
        cloud = fuse_points(points.numpy(), colors.numpy(), replace(CONFIGS[case], backend=backend))
        ms = 1000 * (time.perf_counter() - start)
        config = {"counts": cloud.counts, "threads": torch.get_num_threads()}
        name = (case, backend, given.shape, "float64")
        rows.append(Measurement(*name, "time", "ms", [ms], config=config))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write benchmarks/results/<gpu>/fusion.jsonl."""
    parser = argparse.ArgumentParser(
        prog="gen3r-engine bench --suite fusion",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=["cuda"])
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--size", type=int, default=560)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", "--revision")
    options = parser.parse_args(argv)
    if "cuda" in options.provider and not torch.cuda.is_available():
        raise BadInput("provider cuda needs a CUDA GPU; the suite 'cpu' measures the other paths")
    device = torch.device("cuda" if "cuda" in options.provider else "cpu")
    given = clip(options.frames, options.size, device)
    rows: list[Measurement] = []
    for provider in options.provider:
        rows += on_gpu(given) if provider == "cuda" else on_cpu(given, provider)
    for found in rows:
        value = percentiles(found.samples)[1]
        print(
            f"{found.case:<24} {found.provider:<8} {found.shape:<14} {value:>12,.2f} {found.unit}"
        )
    print(write_rows(rows, "fusion", options.out, options.commit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
