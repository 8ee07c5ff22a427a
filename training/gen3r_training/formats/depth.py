"""Depth as it is written: 16-bit grey PNG, one a frame, depth = scale * value, value 0 = none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gen3r_training.formats.scene import BadScene, Depth, DepthMaps

_FULL = 65535
# Depth beyond this many times the scene's median counts as none where a scale has to be found: one
# far outlier would make every step coarse. A step is then at most 0.08 % of the median.
_FAR = 50.0


@dataclass(frozen=True)
class DepthScale:
    """step : depth of one step. limit : depth beyond it is none."""

    step: float
    limit: float


def find_scale(maps: DepthMaps, count: int, check: Callable[[], None]) -> DepthScale:
    """The scale for all frames of a scene. Reads every map unless they come in whole steps."""
    if maps.step is not None:
        return DepthScale(maps.step, maps.step * _FULL)
    largest, medians = [], []
    for index in range(count):
        check()
        depth = maps.read(index)
        inside = depth[np.isfinite(depth) & (depth > 0)]
        if len(inside):
            largest.append(float(inside.max()))
            medians.append(float(np.median(inside)))
    if not largest:
        return DepthScale(1.0, _FULL)
    limit = min(max(largest), _FAR * float(np.median(medians)))
    return DepthScale(limit / _FULL, limit)


def quantise(depth: Depth, scale: DepthScale) -> NDArray[np.uint16]:  # [h, w]
    """Depth in steps; 0 where it is <= 0, NaN, infinite or beyond the limit."""
    # Half a step of tolerance: the largest depth itself must not fall out by rounding.
    known = np.isfinite(depth) & (depth > 0) & (depth <= scale.limit + scale.step / 2)
    steps = np.zeros(depth.shape, np.uint16)
    steps[known] = np.clip(np.rint(depth[known].astype(np.float64) / scale.step), 1, _FULL)
    return steps


def resized(depth: Depth, size: tuple[int, int]) -> Depth:
    """The map at another width and height; values are taken, not mixed.

    Raises
    ------
    BadScene : the aspect ratio differs by more than 2 %.
    """
    height, width = depth.shape
    if (width, height) == size:
        return depth
    if abs(width * size[1] / (height * size[0]) - 1.0) > 0.02:
        raise BadScene(f"depth of {width} x {height} for frames of {size[0]} x {size[1]}")
    image = Image.fromarray(depth).resize(size, Image.Resampling.NEAREST)
    return np.asarray(image, dtype=np.float32)


def write_scale(folder: Path, scale: DepthScale, unknown: int) -> None:
    """Write scale.json. unknown : pixels without depth in all frames."""
    record = {
        "scale": scale.step,
        "meaning": "depth = scale * value along the optical axis; value 0: no depth",
        "pixels_without_depth": unknown,
    }
    (folder / "scale.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
