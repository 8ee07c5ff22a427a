"""Depth shown as colour: near is bright, one scale for the whole clip."""

from __future__ import annotations

import numpy as np

# sRGB from far (0) to near (1) at equal steps. Lightness rises evenly from 0.20 to 0.94 in Oklab
# (Ottosson 2020) while the hue turns from violet through red to yellow, so equal steps look equal,
# also in grey and to colour-blind people.
_TABLE = np.array(
    [
        *([23, 0, 76], [43, 0, 91], [64, 0, 102], [88, 0, 111], [113, 0, 115], [139, 0, 115]),
        *([164, 5, 111], [188, 24, 103], [209, 44, 92], [228, 64, 78], [244, 86, 62]),
        *([253, 113, 51], [255, 141, 60], [255, 168, 80], [254, 192, 106], [254, 214, 132]),
        [255, 235, 161],
    ],
    dtype=np.float64,
)
_UNKNOWN = np.array([40, 40, 44], dtype=np.uint8)  # no depth there
_PERCENTILES = (2.0, 98.0)
_SAMPLES = 1_000_000  # values that the percentiles look at


def colormap(values: np.ndarray) -> np.ndarray:
    """Colours uint8 [..., 3] of values [...] in [0, 1] (clipped)."""
    levels = np.linspace(0.0, 1.0, 256)
    steps = np.linspace(0.0, 1.0, len(_TABLE))
    table = np.stack([np.interp(levels, steps, _TABLE[:, c]) for c in range(3)], axis=-1)
    index = np.rint(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)
    return np.rint(table).astype(np.uint8)[index]


def depth_colors(depth: np.ndarray) -> np.ndarray:
    """Colours uint8 [F, H, W, 3] of depth [F, H, W] (> 0, any unit), through inverse depth.

    The scale runs between the 2nd and 98th percentile of inverse depth over the whole clip, so that
    a surface keeps its colour from frame to frame. Values that are no depth (<= 0, NaN, infinite)
    are dark grey.
    """
    depth = np.asarray(depth, dtype=np.float32)
    known = np.isfinite(depth) & (depth > 0)
    inverse = np.zeros_like(depth)
    np.divide(1.0, depth, out=inverse, where=known)
    values = inverse[known]
    if not len(values):
        return np.broadcast_to(_UNKNOWN, (*depth.shape, 3)).copy()
    low, high = np.percentile(values[:: max(1, len(values) // _SAMPLES)], _PERCENTILES)
    span = high - low
    # A clip of one depth has no scale; the middle of the table says "all alike".
    scaled = (inverse - low) / span if span > 0 else np.full_like(inverse, 0.5)
    out = colormap(scaled)
    out[~known] = _UNKNOWN
    return out
