"""Surface normals from the grid of a depth map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SAME_SURFACE = 16.0  # squared ratio of the steps to both sides up to which no edge is assumed


def grid_normals(
    points: Tensor,  # [F, H, W, 3] world
    valid: Tensor,  # [F, H, W] bool
    extrinsics: Tensor,  # [F, 4, 4] world to camera
) -> Tensor:  # [F, H, W, 3] float32
    """The cross product of the steps to the neighbouring pixels, facing the camera, of unit length.

    A step goes from the pixel before to the pixel after; at a depth edge (one side more than 4
    times as far off as the other), beside invalid pixels and at the border it goes to one side
    only. 0 where the pixel is invalid or has no valid neighbour in a direction.
    """
    pose = extrinsics.to(points.device, torch.float64)
    centers = -(pose[:, :3, :3].mT @ pose[:, :3, 3:]).squeeze(-1)
    normals = torch.empty(points.shape, dtype=torch.float32, device=points.device)
    for frame, center in enumerate(centers):
        p = torch.where(valid[frame, ..., None], points[frame].double(), math.nan)
        normal = torch.linalg.cross(_step(p, 1), _step(p, 0))
        normal *= ((center - p).float() * normal).sum(-1, keepdim=True).sign()
        length = normal.norm(dim=-1, keepdim=True)
        normals[frame] = torch.where(length > 0, normal / length, 0.0)
    return normals


def _step(points: Tensor, axis: int) -> Tensor:
    """Along an axis of [H, W, 3] points; NaN where there is no valid neighbour."""
    step = points.diff(dim=axis).float()
    missing = torch.full_like(points.narrow(axis, 0, 1), math.nan, dtype=torch.float32)
    after, before = torch.cat([step, missing], axis), torch.cat([missing, step], axis)
    a, b = (s.square().sum(-1, keepdim=True).nan_to_num(math.inf) for s in (after, before))
    both = (a < _SAME_SURFACE * b) & (b < _SAME_SURFACE * a)
    return torch.where(both, after + before, torch.where(a < b, after, before))
