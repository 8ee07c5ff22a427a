"""Clips from (seed, split, number): layouts, the first view's depth, paths, pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gen3r.scene import trajectory_name
from gen3r.vggt.bootstrap import scene_scale
from gen3r_training.procedural.clips import Clips
from gen3r_training.procedural.layout import Floats, Layout
from gen3r_training.procedural.objects import SPLITS, clip_draws, sample_layout
from gen3r_training.procedural.paths import (
    RANDOM,
    built_in_path,
    choose_move,
    free_random_paths,
    random_knots,
    world_poses,
)
from gen3r_training.procedural.render import (
    SceneTensors,
    intrinsics_of,
    render_depth,
    render_frames,
)

__all__ = ["SPLITS", "caption_corpus", "make_clips"]

_MOST_SUPERSAMPLES = 8


def make_clips(
    numbers: Sequence[int],
    *,
    seed: int,
    split: str,
    frames: int = 17,
    size: int = 112,
    device: torch.device | str = "cpu",
    supersample: int = 2,
    move: str | None = None,
) -> Clips:
    """Render clips; number n of (seed, split) is the same whatever else is in `numbers`.

    Parameters
    ----------
    split : "train" or "held_out", which share no random number
    supersample : colour rays along each side of a pixel; depth and objects are of its centre
    move : give every clip this move (a built-in one or "random") instead of its own, in its scene

    Raises
    ------
    ValueError : no numbers, an unknown split or move, a size, count or number out of range.
    """
    _check(numbers, frames, size, supersample)
    forced = move if move in (None, RANDOM) else trajectory_name(move)
    layouts = [sample_layout(number, seed, split) for number in numbers]
    scenes = _scene_tensors(layouts, torch.device(device))
    poses = np.stack([layout.pose() for layout in layouts])
    unit, scale = _measure(scenes, poses, size)
    moves, c2w = _paths(numbers, seed, split, forced, frames, layouts, poses, unit, scale)
    world = torch.from_numpy(world_poses(c2w, unit, poses)).float().to(device)
    rendered = render_frames(scenes, world, size, supersample)
    scaled = torch.from_numpy(unit).float().to(device)[:, None, None, None]
    return Clips(
        rgb=rendered.rgb,
        depth=(rendered.depth / scaled).half(),
        objects=rendered.parts,
        c2w=torch.from_numpy(c2w).float().to(device),
        intrinsics=intrinsics_of(scenes.fov, size),
        captions=tuple(layout.caption for layout in layouts),
        parts=tuple(tuple(layout.parts) for layout in layouts),
        moves=tuple(moves),
    )


def caption_corpus(count: int, seed: int) -> list[str]:
    """Captions of the training clips 0 .. count - 1, without rendering them.

    Raises
    ------
    ValueError : a negative seed.
    """
    return [sample_layout(number, seed, "train").caption for number in range(count)]


def _check(numbers: Sequence[int], frames: int, size: int, supersample: int) -> None:
    if not len(numbers):
        raise ValueError("there are no clip numbers; give at least one")
    for name, value, least in (("frames", frames, 1), ("size", size, 8)):
        if value < least:
            raise ValueError(f"{name} {value} is below {least}")
    if not 1 <= supersample <= _MOST_SUPERSAMPLES:
        raise ValueError(f"supersample {supersample} is outside 1 to {_MOST_SUPERSAMPLES}")


def _scene_tensors(layouts: Sequence[Layout], device: torch.device) -> SceneTensors:
    def stack(values: list[Floats]) -> Tensor:
        return torch.from_numpy(np.stack(values)).float().to(device)

    return SceneTensors(
        rows=stack([layout.rows for layout in layouts]),
        owners=torch.from_numpy(np.stack([layout.owners for layout in layouts])).to(device),
        bounds=stack([layout.bounds for layout in layouts]),
        light=stack([layout.light for layout in layouts]),
        fov=torch.tensor([layout.fov for layout in layouts], device=device),
        courtyard=torch.tensor([layout.courtyard for layout in layouts], device=device),
    )


def _measure(
    scenes: SceneTensors, poses: Floats, size: int
) -> tuple[Floats, Floats]:  # [N] metres of a scene unit, [N] scale of the zooms in scene units
    """Mean distance of the first view's points, and 0.8 x its median depth as it is stored."""
    first = torch.from_numpy(poses).float().to(scenes.rows.device)
    depth, reach = render_depth(scenes, first, size)
    seen = (reach > 0).flatten(1).sum(1)
    unit = reach.double().flatten(1).sum(1) / seen.clamp(min=1)
    scaled = (depth / unit.float()[:, None, None]).half()
    return unit.float().double().cpu().numpy(), scene_scale(scaled[:, None]).cpu().numpy()


def _paths(
    numbers: Sequence[int],
    seed: int,
    split: str,
    forced: str | None,
    frames: int,
    layouts: Sequence[Layout],
    poses: Floats,
    unit: Floats,
    scale: Floats,
) -> tuple[list[str], Floats]:  # the moves' names, c2w [N, F, 4, 4] in scene units
    moves: list[str] = []
    knots = []
    c2w = np.empty((len(numbers), frames, 4, 4))
    for i, number in enumerate(numbers):
        draws = clip_draws(number, seed, split, stream=1)
        own = choose_move(draws)
        moves.append(forced or own)
        if moves[-1] == RANDOM:
            knots.append(random_knots(draws))
        else:
            c2w[i] = built_in_path(moves[-1], frames, float(scale[i]))
    wander = np.array([i for i, name in enumerate(moves) if name == RANDOM], dtype=np.int64)
    if len(wander):
        c2w[wander] = free_random_paths(
            np.stack(knots),
            frames,
            unit[wander],
            poses[wander],
            np.stack([layouts[i].rows for i in wander]),
            np.stack([layouts[i].bounds for i in wander]),
            np.array([layouts[i].courtyard for i in wander]),
        )
    return moves, c2w
