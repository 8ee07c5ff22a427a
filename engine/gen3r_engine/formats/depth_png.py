"""Depth as 16-bit grey PNG, one a frame: depth = scale * value, 0 where there is no depth.

One scale for the whole clip: the largest depth is 65535. A depth is kept within half a step of
`scale`, or within one step where it is below half a step (value 0 means none).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gen3r_engine.formats.frames import write_frames

_FULL = 65535


@dataclass(frozen=True)
class DepthScale:
    """scale : depth of one step. median : of the known depths. unknown : pixels without depth."""

    scale: float
    median: float
    unknown: int


def quantise(depth: ArrayLike) -> tuple[NDArray[np.uint16], DepthScale]:  # [F, H, W]
    """Depth in steps of 1/65535 of the largest, uint16; 0 where it is <= 0, NaN or infinite."""
    values = np.asarray(depth, dtype=np.float32)
    known = np.isfinite(values) & (values > 0)
    if not known.any():
        return np.zeros(values.shape, np.uint16), DepthScale(1.0, 0.0, values.size)
    inside = values[known]
    scale = float(inside.max()) / _FULL
    steps = np.zeros(values.shape, np.uint16)
    steps[known] = np.clip(np.rint(inside.astype(np.float64) / scale), 1, _FULL)
    return steps, DepthScale(scale, float(np.median(inside)), values.size - len(inside))


def write_depth_png(folder: Path, depth: ArrayLike) -> DepthScale:
    """Write depth [F, H, W] into a new folder: frame_00000.png ... and scale.json.

    Raises
    ------
    OSError : the folder exists or cannot be written.
    """
    steps, scale = quantise(depth)
    write_frames(folder, steps)
    record = {
        "scale": scale.scale,
        "meaning": "depth = scale * value along the optical axis; value 0: no depth",
        "pixels_without_depth": scale.unknown,
    }
    (folder / "scale.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return scale
