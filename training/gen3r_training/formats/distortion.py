"""Lens distortion of OpenCV's model (k1, k2, p1, p2): how much it is, and frames without it.

With x, y the ideal image coordinates (pixels minus principal point, over focal length) and
r2 = x^2 + y^2, the lens shows the point at

    x (1 + k1 r2 + k2 r2^2) + 2 p1 x y + p2 (r2 + 2 x^2)
    y (1 + k1 r2 + k2 r2^2) + p1 (r2 + 2 y^2) + 2 p2 x y
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from gen3r_training.formats.scene import BadScene, Floats

# A distortion that moves no pixel by more than this is left in the frames: half a pixel is the
# error that resizing to the training resolution makes anyway.
IGNORED_PIXELS = 0.5
_MOST_ZOOM = 2.0

Coefficients = tuple[float, float, float, float]


def distort(points: Floats, coefficients: Coefficients) -> Floats:  # [..., 2] ideal -> distorted
    """Where the lens shows ideal image coordinates."""
    k1, k2, p1, p2 = coefficients
    x, y = points[..., 0], points[..., 1]
    r2 = x * x + y * y
    radial = 1.0 + k1 * r2 + k2 * r2 * r2
    return np.stack(
        [
            x * radial + 2.0 * p1 * x * y + p2 * (r2 + 2.0 * x * x),
            y * radial + p1 * (r2 + 2.0 * y * y) + 2.0 * p2 * x * y,
        ],
        axis=-1,
    )


def largest_shift(
    intrinsics: Floats,  # [3, 3] pixels
    size: tuple[int, int],
    coefficients: Coefficients,
) -> float:
    """By how many pixels the distortion moves a pixel of a frame of this width and height."""
    grid = _ideal(_pixels(size, 33), intrinsics)
    moved = (distort(grid, coefficients) - grid) * np.diag(intrinsics)[:2]
    return float(np.linalg.norm(moved, axis=-1).max())


def _pixels(size: tuple[int, int], count: int | None = None) -> Floats:
    """[rows, columns, 2] pixel coordinates: `count` a side with the borders, or every centre."""
    axes = (
        [np.arange(n) + 0.5 for n in size]
        if count is None
        else [np.linspace(0.0, n, count) for n in size]
    )
    return np.stack(np.meshgrid(*axes, indexing="xy"), axis=-1)


def _ideal(pixels: Floats, intrinsics: Floats) -> Floats:
    return (pixels - intrinsics[:2, 2]) / np.diag(intrinsics)[:2]


@dataclass(frozen=True)
class Undistortion:
    """From the frames of a lens to those of a pinhole camera of the same size.

    intrinsics : [3, 3] of the new frames: the same principal point, the focal lengths grown by the
        least factor from 1 on for which every new pixel has a source
    grid : [1, h, w, 2] float32, where each new pixel is sampled, as torch's grid_sample takes it
    """

    intrinsics: Floats
    grid: Tensor

    @classmethod
    def of(
        cls, intrinsics: Floats, size: tuple[int, int], coefficients: Coefficients
    ) -> Undistortion:
        """The undistortion of a camera; `BadScene` where the model folds or needs much zoom."""
        zoom = _least_zoom(intrinsics, size, coefficients)
        wanted = intrinsics.copy()
        wanted[[0, 1], [0, 1]] *= zoom
        source = _source(_pixels(size), wanted, intrinsics, coefficients)
        if (np.diff(source[..., 0], axis=1) <= 0).any() or (
            np.diff(source[..., 1], axis=0) <= 0
        ).any():
            raise BadScene(f"the distortion {coefficients} folds the image over")
        grid = torch.from_numpy((2.0 * source / np.array(size) - 1.0).astype(np.float32))
        return cls(wanted, grid[None])

    def image(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:  # [h, w, 3]
        """The frame as the pinhole camera sees it, bilinear."""
        pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
        sampled = self._sample(pixels, "bilinear")
        out: NDArray[np.uint8] = (
            sampled[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
        )
        return out

    def depth(self, depth: NDArray[np.float32]) -> NDArray[np.float32]:  # [h, w]
        """A depth map as the pinhole camera sees it; values are taken, not mixed."""
        out: NDArray[np.float32] = self._sample(
            torch.from_numpy(np.array(depth))[None, None], "nearest"
        )[0, 0].numpy()
        return out

    def _sample(self, values: Tensor, mode: str) -> Tensor:
        return functional.grid_sample(
            values, self.grid, mode=mode, padding_mode="border", align_corners=False
        )


def _source(
    pixels: Floats, wanted: Floats, intrinsics: Floats, coefficients: Coefficients
) -> Floats:
    """Pixels of the frame with distortion that show what the `wanted` camera sees at `pixels`."""
    moved = distort(_ideal(pixels, wanted), coefficients)
    return moved * np.diag(intrinsics)[:2] + intrinsics[:2, 2]


def _least_zoom(intrinsics: Floats, size: tuple[int, int], coefficients: Coefficients) -> float:
    border = _pixels(size, 65)
    border = np.concatenate([border[0], border[-1], border[:, 0], border[:, -1]])

    def inside(zoom: float) -> bool:
        wanted = intrinsics.copy()
        wanted[[0, 1], [0, 1]] *= zoom
        source = _source(border, wanted, intrinsics, coefficients)
        return bool(((source >= -1e-6) & (source <= np.array(size) + 1e-6)).all())

    if inside(1.0):
        return 1.0
    low, high = 1.0, _MOST_ZOOM
    if not inside(high):
        raise BadScene(f"the distortion {coefficients} leaves less than half of the view")
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if inside(middle) else (middle, high)
    return high
