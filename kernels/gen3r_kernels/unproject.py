"""Depth maps to world points: X = R^T (K^-1 [u, v, 1] d - t), with a validity mask.

Cameras are OpenCV, extrinsics map world to camera, intrinsics are in pixels; u, v are pixel indices
without the half-pixel offset, as upstream. A pixel is valid when near < d < far, strictly.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unproject_reference(
    depth: Tensor,  # [..., H, W]
    extrinsics: Tensor,  # [..., 3 or 4, 4] world to camera
    intrinsics: Tensor,  # [..., 3, 3] pixels
    near: Tensor,  # [...] smallest depth kept, exclusive
    far: Tensor,  # [...] largest depth kept, exclusive
) -> tuple[Tensor, Tensor]:  # points [..., H, W, 3] float64, mask [..., H, W] bool
    """The definition in float64."""
    height, width = depth.shape[-2:]
    d, pose, k = depth.double(), extrinsics.double(), intrinsics.double()
    v, u = torch.meshgrid(
        torch.arange(height, device=d.device, dtype=d.dtype),
        torch.arange(width, device=d.device, dtype=d.dtype),
        indexing="ij",
    )

    def entry(matrix: Tensor, row: int, column: int) -> Tensor:
        return matrix[..., row, column, None, None]

    x = (u - entry(k, 0, 2)) / entry(k, 0, 0) * d
    y = (v - entry(k, 1, 2)) / entry(k, 1, 1) * d
    camera = torch.stack([x, y, d], dim=-1)
    rotation, translation = pose[..., :3, :3], pose[..., :3, 3]
    points = (camera - translation[..., None, None, :]) @ rotation[..., None, :, :]
    mask = (depth > near[..., None, None]) & (depth < far[..., None, None])
    return points, mask


def unproject(
    depth: Tensor,  # [..., H, W]
    extrinsics: Tensor,  # [..., 3 or 4, 4] world to camera
    intrinsics: Tensor,  # [..., 3, 3] pixels
    near: Tensor,  # [...] exclusive lower bound
    far: Tensor,  # [...] exclusive upper bound
    *,
    out_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # points [..., H, W, 3] out_dtype, mask [..., H, W] bool
    """World coordinates of every pixel and which of them are valid."""
    points, mask = unproject_reference(depth, extrinsics, intrinsics, near, far)
    return points.to(out_dtype), mask
