"""What runs on the CPU: autoencoder operators beside plain PyTorch, fusion beside Open3D, writing.

OMP_NUM_THREADS=2 python -m benchmarks.cpu          # operators, fusion, 49 x 560 x 560 (minutes)
python -m benchmarks.cpu --frames 9 --size 112 --only writing
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import fusion_cpu
from benchmarks.harness import Measurement, library_versions, percentiles, write_rows
from benchmarks.timing import shape_name
from gen3r.cameras import depth_bounds, trajectory
from gen3r.scene import Scene, SceneRequest
from gen3r_engine.outputs import write_scene
from gen3r_kernels import causal_conv3d, rms_norm_silu, unproject

REPEATS = 7
SHAPES = ((12, 6, 112), (48, 6, 28), (6, 6, 560))  # channels, frames with two past ones, side


def timed(run: Callable[[], object]) -> list[float]:
    """Milliseconds of each repeat, after one warm-up."""
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return times


def row(
    case: str, provider: str, shape: str, dtype: str, ms: list[float], **config: Any
) -> Measurement:
    """A time, with the versions of the libraries that it depends on."""
    config["versions"] = library_versions()
    return Measurement(case, provider, shape, dtype, "time", "ms", ms, config=config)


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The first two frames are the past of the others; no padding."""
    return causal_conv3d(x[:, :, 2:], weight, bias, x[:, :, :2], padding=(0, 0, 0))


def torch_conv(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor) -> Tensor:
    return F.conv3d(torch.cat([past, x], dim=2), weight, bias, padding=(0, 1, 1))


def torch_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma)


def operators() -> list[Measurement]:
    """Convolution behind two past frames and the channel norm, float32, one clip."""
    rows = []
    for channels, frames, side in SHAPES:
        x = torch.randn(1, channels, frames, side, side)
        weight, bias = torch.randn(channels, channels, 3, 3, 3), torch.randn(channels)
        gamma = torch.randn(channels, 1, 1, 1)
        conv = (x[:, :, 2:].contiguous(), weight, bias, x[:, :, :2].contiguous())
        for op, provider, run in (
            ("causal_conv3d", "torch", partial(torch_conv, *conv)),
            ("causal_conv3d", "gen3r", partial(causal_conv3d, *conv)),
            ("rms_norm_silu", "torch", partial(torch_norm, x, gamma)),
            ("rms_norm_silu", "gen3r", partial(rms_norm_silu, x, gamma)),
        ):
            rows.append(row(op, provider, shape_name(*x.shape), "float32", timed(run)))
    return rows


def synthetic_scene(frames: int, size: int) -> Scene:
    """A wavy surface with noise on its depth, seen by a turning camera; random colours."""
    torch.manual_seed(0)
    extrinsics = torch.linalg.inv(trajectory("arc_left", frames).double())
    k = torch.tensor([[0.86, 0, 0.5], [0, 0.86, 0.5], [0, 0, 1 / size]]).double() * size
    k = k.expand(frames, 3, 3)
    line = torch.linspace(-1, 1, size)
    surface = 2 + 0.5 * torch.sin(3 * line)[None, :] + 0.3 * torch.cos(4 * line)[:, None]
    depth = surface + 0.002 * torch.randn(frames, size, size)
    points, mask = unproject(depth, extrinsics, k, *depth_bounds(depth))
    rgb = torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8)
    poses, ones = extrinsics.float(), torch.ones_like(depth)
    return Scene(rgb, depth, ones, poses, k.float(), points, mask, info={"seconds": {}})


def writing(frames: int, size: int) -> list[Measurement]:
    """Every default result file of one scene."""
    scene = synthetic_scene(frames, size)
    view = np.zeros((size, size, 3), dtype=np.uint8)
    request = SceneRequest([view], num_frames=frames, height=size, width=size)
    with tempfile.TemporaryDirectory() as folder:
        seconds = write_scene(scene, request, folder).seconds
    shape, masked = shape_name(frames, size, size), {"masked_points": int(scene.mask.sum())}
    return [
        row(name.replace(" ", "_"), "reference", shape, "float64", [1000 * value], **masked)
        for name, value in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write benchmarks/results/<cpu>/cpu.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--size", type=int, default=560)
    parts = ("operators", "fuse_points", "writing")
    parser.add_argument("--only", choices=parts, help="the other rows of the file stay")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", "--revision")
    options = parser.parse_args(argv)
    run: dict[str, Callable[[], list[Measurement]]] = {
        "operators": operators,
        "fuse_points": fusion_cpu.comparison,
        "writing": partial(writing, options.frames, options.size),
    }
    rows = [row for name in parts if options.only in (None, name) for row in run[name]()]
    for found in rows:
        median, unit = percentiles(found.samples)[1], found.unit
        print(f"{found.case:<18} {found.provider:<14} {found.shape:<24} {median:>12,.2f} {unit}")
    print(write_rows(rows, "cpu", options.out, options.commit, merge=options.only is not None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
