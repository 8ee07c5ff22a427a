"""Clips of one textured plane each, whose depth and cameras are exact: made in milliseconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlaneClips:
    """The fields of `gen3r_training.procedural.Clips` that geometry needs."""

    rgb: Tensor  # [N, F, H, W, 3] uint8
    depth: Tensor  # [N, F, H, W] float16
    c2w: Tensor  # [N, F, 4, 4] float32
    intrinsics: Tensor  # [N, 3, 3] float32

    def __len__(self) -> int:
        return len(self.rgb)


def _turns(angles: Tensor) -> Tensor:
    """Rotations by yaw and pitch, [..., 2] radians to [..., 3, 3]."""
    (a, b), zero = angles.unbind(-1), torch.zeros_like(angles[..., 0])
    one = torch.ones_like(zero)
    yaw = [a.cos(), zero, a.sin(), zero, one, zero, -a.sin(), zero, a.cos()]
    pitch = [one, zero, zero, zero, b.cos(), -b.sin(), zero, b.sin(), b.cos()]
    shape = (*zero.shape, 3, 3)
    return torch.stack(yaw, -1).view(shape) @ torch.stack(pitch, -1).view(shape)


def plane_clips(count: int, frames: int, size: int, seed: int) -> PlaneClips:
    """Slanted planes about 2 in front of cameras that move and turn, in any world and unit."""
    g = torch.Generator().manual_seed(seed)
    fov = torch.rand(count, generator=g) * 0.5 + 0.8
    intrinsics = torch.eye(3).repeat(count, 1, 1)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = size / 2 / torch.tan(fov / 2)
    intrinsics[:, :2, 2] = size / 2
    c2w = torch.eye(4).repeat(count, frames, 1, 1)
    steps = torch.linspace(0, 1, frames)[:, None]
    start = torch.rand(2, count, 1, 3, generator=g) - 0.5
    speed = torch.rand(2, count, 1, 3, generator=g) - 0.5
    c2w[..., :3, :3] = _turns((0.4 * start[0] + 0.5 * speed[0] * steps)[..., :2])
    c2w[..., :3, 3] = start[1] + speed[1] * steps

    pixels = torch.arange(size) + 0.5
    v, u = torch.meshgrid(pixels, pixels, indexing="ij")
    local = torch.stack([u, v, torch.ones_like(u)], -1) @ torch.linalg.inv(intrinsics).mT[:, None]
    rays = torch.einsum("nfij,nhwj->nfhwi", c2w[..., :3, :3], local)
    normal = torch.rand(count, 3, generator=g) * 0.4 - 0.2
    normal[:, 2] = 1.0
    along = (rays * normal[:, None, None, None]).sum(-1)
    ahead = 2 - (c2w[..., :3, 3] * normal[:, None]).sum(-1)
    depth = ahead[..., None, None] / along
    points = c2w[:, :, None, None, :3, 3] + rays * depth[..., None]
    waves = torch.rand(count, 3, 3, generator=g) * 6 + 3
    phase = torch.einsum("nfhwi,nci->nfhwc", points, waves * math.pi / 3)
    rgb = ((phase.sin() + 1) * 127).round().to(torch.uint8)
    return PlaneClips(rgb, depth.half(), c2w, intrinsics)
