"""Depth shown as colour: near is bright, one scale for the whole clip."""

from __future__ import annotations

import functools

import numpy as np

from gen3r_engine.native import native

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
_FRACTIONS = (0.02, 0.98)  # of the sorted inverse depths: where the scale begins and ends
_SAMPLES = 1_000_000  # values that are sorted to find them


@functools.cache
def _colors() -> np.ndarray:
    """The table at 256 levels, uint8 [256, 3]."""
    levels, steps = np.linspace(0.0, 1.0, 256), np.linspace(0.0, 1.0, len(_TABLE))
    table = np.stack([np.interp(levels, steps, _TABLE[:, c]) for c in range(3)], axis=-1)
    return np.ascontiguousarray(np.rint(table).astype(np.uint8))


def colormap(values: np.ndarray) -> np.ndarray:
    """Colours uint8 [..., 3] of values [...] in [0, 1] (clipped)."""
    return _colors()[np.rint(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8)]


def depth_colors(depth: np.ndarray, *, threads: int = 0) -> np.ndarray:
    """Colours uint8 [F, H, W, 3] of depth [F, H, W] (> 0, any unit), through inverse depth.

    The scale runs between the 2nd and 98th percentile of inverse depth over the whole clip, so that
    a surface keeps its colour from frame to frame. Values that are no depth (<= 0, NaN, infinite,
    or so small that their inverse is infinite) are dark grey. In C++ where it is built (`native`),
    on `threads` threads (0: what OMP_NUM_THREADS allows), else in numpy; the same colours.
    """
    module = native()
    if module is None:
        return depth_colors_reference(depth)
    values = np.asarray(depth, dtype=np.float32)
    packed = np.ascontiguousarray(values).reshape(values.shape)
    colors: np.ndarray = module.depth_colors(
        packed, _colors(), _UNKNOWN, *_FRACTIONS, _SAMPLES, threads
    )
    return colors


def depth_colors_reference(depth: np.ndarray) -> np.ndarray:
    """What `depth_colors` computes, in numpy."""
    depth = np.asarray(depth, dtype=np.float32)
    inverse = np.zeros_like(depth)
    with np.errstate(over="ignore"):
        np.divide(1.0, depth, out=inverse, where=np.isfinite(depth) & (depth > 0))
    known = np.isfinite(inverse) & (inverse > 0)
    values = inverse[known]
    if not len(values):
        return np.broadcast_to(_UNKNOWN, (*depth.shape, 3)).copy()
    values = values[:: max(1, len(values) // _SAMPLES)]
    low, high = (_at_fraction(values, fraction) for fraction in _FRACTIONS)
    span = high - low
    # A clip of one depth has no scale; the middle of the table says "all alike".
    scaled = (inverse.astype(np.float64) - low) / span if span > 0 else np.full(depth.shape, 0.5)
    out = colormap(np.where(known, scaled, 0.0))
    out[~known] = _UNKNOWN
    return out


def _at_fraction(values: np.ndarray, fraction: float) -> float:
    """The value [N] at a fraction of the sorted ones, between two of them by a straight line.

    Written out in float64, so that the C++ path finds the same last bit; numpy's own percentile
    rounds float32 values differently from version to version.
    """
    place = fraction * (len(values) - 1)
    below = int(place)
    ordered = np.partition(values, [below, min(below + 1, len(values) - 1)])
    first, second = float(ordered[below]), float(ordered[min(below + 1, len(values) - 1)])
    return first + (second - first) * (place - below)
