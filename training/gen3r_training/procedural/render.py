"""Frames of many scenes at once: colour from several rays a pixel, depth and parts from its centre.

Frames are rendered in chunks of whole frames that fit the memory; a GPU takes millions of rays in
one operation, a CPU about as many as fit its cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gen3r_training.procedural import table as t
from gen3r_training.procedural.clips import NO_OBJECT
from gen3r_training.procedural.shade import shade, sky, to_srgb
from gen3r_training.procedural.trace import Vector, first_hits

RAYS = {"cpu": 2**16, "cuda": 2**24}  # in one chunk; on a GPU about 5 GiB


@dataclass(frozen=True)
class SceneTensors:
    """N scenes on the device, in metres.

    rows : [N, ROWS, COLUMNS], owners : uint8 [N, ROWS], bounds : [N, 2, 3],
    light : [N, LIGHT_COLUMNS], fov : [N] radians, courtyard : bool [N]
    """

    rows: Tensor
    owners: Tensor
    bounds: Tensor
    light: Tensor
    fov: Tensor
    courtyard: Tensor

    def take(self, index: Tensor) -> SceneTensors:
        """The scenes at the indices."""
        return SceneTensors(*(getattr(self, f.name)[index] for f in fields(self)))


@dataclass(frozen=True)
class Frames:
    """rgb : uint8 [N, F, H, W, 3]; depth : float32 [N, F, H, W] metres, 0: none; parts : uint8."""

    rgb: Tensor
    depth: Tensor
    parts: Tensor


@dataclass(frozen=True)
class _Chunk:
    """Frames that are rendered at once: scene and frame of each, and the rows that they use."""

    scenes: Tensor  # [K]
    frames: Tensor  # [K]
    used: tuple[int, ...]


def render_frames(
    scenes: SceneTensors,
    poses: Tensor,  # [N, F, 4, 4] camera to world, metres
    size: int,
    supersample: int,
) -> Frames:
    """Render F frames of N scenes, `size` x `size` pixels, supersample^2 colour rays a pixel."""
    shape, device = (*poses.shape[:2], size, size), poses.device
    rgb = torch.empty(*shape, 3, dtype=torch.uint8, device=device)
    depth = torch.empty(shape, device=device)
    parts = torch.empty(shape, dtype=torch.uint8, device=device)
    for chunk in _chunks(scenes, shape[1], size * size * (supersample**2 + 1)):
        at = (chunk.scenes, chunk.frames)
        rgb[at], depth[at], parts[at] = _render(
            scenes.take(chunk.scenes), poses[at], size, supersample, chunk.used
        )
    return Frames(rgb, depth, parts)


def _chunks(scenes: SceneTensors, frames: int, rays: int) -> Iterator[_Chunk]:
    """All frames, `rays` rays each, in chunks of scenes that use about the same rows.

    A primitive that no scene of a chunk has costs nothing.
    """
    device = scenes.rows.device
    taken = (scenes.rows[:, :, t.HALF] >= 0).cpu()  # [N, ROWS]
    counts = [taken[:, first : first + many].sum(1) for first, many in t.FIRST.values()]
    key = torch.zeros_like(counts[0])
    for name in ("arch", "cylinder", "sphere", "box", "decal"):  # the costliest decide last
        key = key * 16 + counts[list(t.FIRST).index(name)]
    order = torch.argsort(key, stable=True)
    which = order.repeat_interleave(frames)
    frame = torch.arange(frames).repeat(len(order))
    step = max(1, RAYS[device.type] // rays)
    for start in range(0, len(which), step):
        scene = which[start : start + step]
        used = taken[scene.unique()].any(0)
        rows = tuple(r for r in used.nonzero().flatten().tolist() if r >= t.FACES)
        yield _Chunk(scene.to(device), frame[start : start + step].to(device), rows)


def render_depth(
    scenes: SceneTensors,
    poses: Tensor,  # [N, 4, 4]
    size: int,
) -> tuple[Tensor, Tensor]:  # depth and distance to the camera in metres [N, H, W] float32, 0: none
    """Depth alone of one view a scene."""
    depth = torch.empty(len(poses), size, size, device=poses.device)
    reach = torch.empty_like(depth)
    for chunk in _chunks(scenes, 1, size * size):
        some = scenes.take(chunk.scenes)
        origin, direction, length = _rays(some.fov, poses[chunk.scenes], size, _centers(poses))
        distance, row = first_hits(some.rows, some.bounds, origin, direction, chunk.used)
        known, _ = _known(some, distance, row)
        depth[chunk.scenes] = known.reshape(-1, size, size)
        reach[chunk.scenes] = (known * length).reshape(-1, size, size)
    return depth, reach


def _render(
    scenes: SceneTensors, poses: Tensor, size: int, supersample: int, used: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """rgb, depth and parts of K frames."""
    rows, bounds = scenes.rows, scenes.bounds
    origin, direction, _ = _rays(scenes.fov, poses, size, _centers(poses))
    distance, row = first_hits(rows, bounds, origin, direction, used)
    depth, parts = _known(scenes, distance, row)
    if supersample > 1:
        offsets = _offsets(supersample, poses)
        origin, direction, _ = _rays(scenes.fov, poses, size, offsets)
        distance, row = first_hits(rows, bounds, origin, direction, used)
    pixel = 2 * torch.tan(scenes.fov / 2)[:, None, None] / size
    color = shade(rows, bounds, scenes.light, origin, direction, distance, row, pixel, used)
    open_ = scenes.courtyard[:, None, None] & (row == t.CEILING)
    color = torch.where(open_, sky(direction), color)
    rgb = (255 * to_srgb(color.mean(dim=2)) + 0.5).to(torch.uint8)  # [3, K, R]
    shape = (len(poses), size, size)
    return rgb.movedim(0, -1).reshape(*shape, 3), depth.reshape(shape), parts.reshape(shape)


def _known(scenes: SceneTensors, distance: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Depth (0 in the sky) and part of every ray's hit."""
    frames = torch.arange(len(row), device=row.device)[:, None, None] * t.ROWS
    parts = scenes.owners.flatten()[frames + row.int()]
    open_ = scenes.courtyard[:, None, None] & (row == t.CEILING)
    return torch.where(open_, 0.0, distance), torch.where(open_, NO_OBJECT, parts)


def _centers(like: Tensor) -> Tensor:  # [1, 2]
    return torch.full((1, 2), 0.5, device=like.device)


def _offsets(supersample: int, like: Tensor) -> Tensor:  # [S, 2] in pixels, a regular grid
    steps = (torch.arange(supersample, device=like.device) + 0.5) / supersample
    return torch.cartesian_prod(steps, steps)


def _rays(
    fov: Tensor,  # [K]
    poses: Tensor,  # [K, 4, 4]
    size: int,
    offsets: Tensor,  # [S, 2]
) -> tuple[Vector, Vector, Tensor]:  # origins [K, 1, 1], directions [K, S, R], lengths [K, S, R]
    """World rays with one unit along the optical axis through each pixel's samples."""
    grid = torch.arange(size, device=poses.device, dtype=poses.dtype)
    slope = (2 * torch.tan(fov / 2) / size)[:, None, None]
    middle = size / 2
    down = (grid[None, :, None] + offsets[:, :1, None] - middle).expand(-1, size, size)
    across = (grid[None, None, :] + offsets[:, 1:, None] - middle).expand(-1, size, size)
    x, y = slope * across.flatten(1), slope * down.flatten(1)
    turn = poses[:, :3, :3, None, None]
    direction = tuple(turn[:, i, 0] * x + turn[:, i, 1] * y + turn[:, i, 2] for i in range(3))
    origin = tuple(poses[:, i, 3, None, None] for i in range(3))
    length = (1 + x.square() + y.square()).sqrt()
    return (
        (origin[0], origin[1], origin[2]),
        (direction[0], direction[1], direction[2]),
        length,
    )


def intrinsics_of(fov: Tensor, size: int) -> Tensor:  # [N, 3, 3]
    """Intrinsics in pixels; the principal point is the image's centre."""
    k = torch.zeros(len(fov), 3, 3, dtype=torch.float64, device=fov.device)
    k[:, 0, 0] = k[:, 1, 1] = size / 2 / torch.tan(fov.double() / 2)
    k[:, 0, 2] = k[:, 1, 2] = size / 2
    k[:, 2, 2] = 1
    return k.float()
