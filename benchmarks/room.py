"""A synthetic clip with known geometry: a furnished room seen by a camera that walks through it.

Stands for a generated scene wherever a full-size one is needed without weights: the frames overlap,
depths run from about 0.7 to 20, noise grows with depth, and some pixels fly between surfaces, as
predicted depth maps do at edges.

python -m benchmarks.room          # what the full-size clip holds
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from gen3r.cameras import depth_bounds, invert_pose
from gen3r.scene import Scene
from gen3r_kernels.unproject import unproject_reference

Floats = NDArray[np.float32]

# World: x right, y down, z ahead, the first camera at the origin.
WALLS = ((-4.0, -1.8, -3.0), (4.0, 1.6, 20.0))
BOXES = (
    ((-2.6, 0.7, 3.2), (-1.3, 1.6, 4.6)),
    ((1.6, -0.4, 4.0), (2.4, 1.6, 6.5)),
    ((-3.9, -1.0, 7.0), (-3.4, 1.6, 11.0)),
    ((0.2, 0.9, 9.0), (2.0, 1.6, 10.5)),
)
SPHERES = (  # centre, radius
    ((-1.0, 0.6, 2.2), 0.5),
    ((1.3, 0.9, 3.3), 0.6),
    ((-1.9, 0.3, 3.9), 0.4),
    ((0.6, 0.4, 9.6), 0.5),
    ((-1.2, -0.9, 12.0), 0.8),
)
FOCAL = 0.86  # of the width: a horizontal field of view of 60 degrees
ADVANCE, TURN = 2.0, math.radians(20.0)  # the whole walk
EDGE = 0.05  # neighbouring depths that differ by this share of the smaller one form an edge


def room(
    frames: int = 49,
    height: int = 560,
    width: int = 560,
    *,
    seed: int = 0,
    noise: float = 0.002,
    flying: float = 0.01,
) -> Scene:
    """The clip as a scene on the host.

    Parameters
    ----------
    noise : standard deviation of the depth noise as a share of the depth.
    flying : share of pixels displaced along their ray by up to 30 %: half of them at depth edges as
        far as there are any, the others anywhere.

    Returns
    -------
    Scene : points [F, H, W, 3] float64 are the reference's for the noisy depth; the mask is that of
        `gen3r.cameras.depth_bounds`; confidence is 1 to 10, least at edges and far away, and says
        nothing about the flying pixels.
    """
    poses, intrinsics = _walk(frames), _intrinsics(frames, height, width)
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    k = intrinsics[0].numpy()
    rays = np.stack(
        [(columns - k[0, 2]) / k[0, 0], (rows - k[1, 2]) / k[1, 1], np.ones((height, width))], -1
    ).astype(np.float32)
    depth = np.empty((frames, height, width), np.float32)
    confidence = np.empty_like(depth)
    rgb = np.empty((frames, height, width, 3), np.uint8)

    def look(frame: int) -> None:
        random = np.random.default_rng((seed, frame))
        pose = poses[frame].numpy().astype(np.float32)
        clean, rgb[frame] = _look(pose[:3, 3], rays @ pose[:3, :3].T)
        edges = _edges(clean)
        confidence[frame] = 1 + 9 / (1 + 0.2 * clean) * np.where(edges, 0.2, 1.0)
        moved = _flyers(edges, flying, random)
        shift = noise * random.standard_normal(clean.shape, np.float32)
        shift[moved] += random.uniform(-0.3, 0.3, np.count_nonzero(moved))
        depth[frame] = clean * np.maximum(1 + shift, 0.05)

    with ThreadPoolExecutor() as threads:  # numpy computes without the interpreter's lock
        list(threads.map(look, range(frames)))
    extrinsics, d = invert_pose(poses), torch.from_numpy(depth)
    near, far = depth_bounds(d)
    points, mask = unproject_reference(d, extrinsics, intrinsics, near, far)
    return Scene(
        *(torch.from_numpy(rgb), d, torch.from_numpy(confidence)),
        *(extrinsics.float(), intrinsics.float(), points, mask),
        info={"seconds": {}},
    )


def _walk(frames: int) -> torch.Tensor:
    """Camera to world [F, 4, 4] float64: ahead with a turn to the right."""
    progress = torch.linspace(0.0, 1.0, frames, dtype=torch.float64)
    angle = TURN * progress
    pose = torch.eye(4, dtype=torch.float64).repeat(frames, 1, 1)
    pose[:, 0, 0] = pose[:, 2, 2] = angle.cos()
    pose[:, 0, 2], pose[:, 2, 0] = angle.sin(), -angle.sin()
    pose[:, 0, 3], pose[:, 2, 3] = 0.3 * progress.square(), ADVANCE * progress
    return pose


def _intrinsics(frames: int, height: int, width: int) -> torch.Tensor:
    focal = FOCAL * width
    k = [[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]]
    return torch.tensor(k, dtype=torch.float64).repeat(frames, 1, 1)


def _look(origin: Floats, rays: Floats) -> tuple[Floats, NDArray[np.uint8]]:
    """Depth [H, W] and shaded texture [H, W, 3] along rays [H, W, 3] of unit depth."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = _slabs(origin, rays, *WALLS)
        depth, surface = high.min(-1), np.zeros(rays.shape[:2], np.int64)
        for number, box in enumerate(BOXES, 1):
            low, high = _slabs(origin, rays, *box)
            enter, leave = low.max(-1), high.min(-1)
            seen = (enter > 0) & (enter < leave) & (enter < depth)
            depth, surface = np.where(seen, enter, depth), np.where(seen, number, surface)
        for number, (centre, radius) in enumerate(SPHERES, 1 + len(BOXES)):
            offset = origin - np.asarray(centre, np.float32)
            a, b = np.square(rays).sum(-1), rays @ offset
            root = np.sqrt(b * b - a * (offset @ offset - radius * radius))
            enter = (-b - root) / a
            seen = (enter > 0) & (enter < depth)  # NaN, where the ray misses, is not seen
            depth, surface = np.where(seen, enter, depth), np.where(seen, number, surface)
    hit = origin + depth[..., None] * rays
    checks = np.floor(hit * 2.5 + 1e-3).astype(np.int64).sum(-1) % 2
    palette = np.random.default_rng(7).uniform(60, 255, (1 + len(BOXES) + len(SPHERES), 3))
    shade = (0.65 + 0.35 * checks) / (1 + 0.02 * depth)
    return depth.astype(np.float32), (palette[surface] * shade[..., None]).astype(np.uint8)


def _slabs(
    origin: Floats, rays: Floats, low: tuple[float, ...], high: tuple[float, ...]
) -> tuple[Floats, Floats]:
    """Where rays enter and leave the three slabs of a box, both [H, W, 3]."""
    first = (np.asarray(low, np.float32) - origin) / rays
    second = (np.asarray(high, np.float32) - origin) / rays
    return np.minimum(first, second), np.maximum(first, second)


def _edges(depth: Floats) -> NDArray[np.bool_]:
    edges = np.zeros(depth.shape, bool)
    for axis in (0, 1):
        a, b = (np.moveaxis(depth, axis, 0)[part] for part in (slice(1, None), slice(-1)))
        jump = np.abs(a - b) > EDGE * np.minimum(a, b)
        view = np.moveaxis(edges, axis, 0)
        view[1:] |= jump
        view[:-1] |= jump
    return edges


def _flyers(
    edges: NDArray[np.bool_], share: float, random: np.random.Generator
) -> NDArray[np.bool_]:
    wanted = round(share * edges.size)
    at_edges = np.flatnonzero(edges)
    chosen = random.permutation(at_edges)[: wanted // 2]
    others = random.integers(0, edges.size, wanted - len(chosen))
    moved = np.zeros(edges.size, bool)
    moved[chosen] = moved[others] = True
    return moved.reshape(edges.shape)


def main() -> None:
    """Print what the full-size clip holds."""
    scene = room()
    kept = scene.points[scene.mask]
    print(f"{kept.shape[0]:,} of {scene.mask.numel():,} pixels valid")
    print(f"depth {scene.depth.min():.2f} to {scene.depth.max():.2f}")
    print(f"world {kept.amin(0).tolist()} to {kept.amax(0).tolist()}")


if __name__ == "__main__":
    main()
