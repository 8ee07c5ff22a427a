"""Which of the six built-in moves a camera path is: the nearest ideal path names it.

A path is described frame by frame by three numbers: yaw and pitch of the optical axis in units of
15 degrees (the angle of the built-in turns), and the way along the first camera's axis in units of
0.8 median depths (the length of the built-in zooms). The ideal paths grow from 0 to +1 or -1 in
one of the three and stay 0 in the others. All are equally long, so the nearest in the sense of
least squares is the one with the largest product: the scale of a path plays no part in its name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gen3r.cameras import ARC_DEGREES, invert_pose, relative_poses
from gen3r.vggt import scene_scale

# Name, axis (yaw, pitch, forward) and sign, as `gen3r.cameras.trajectory` makes them.
IDEAL: dict[str, tuple[int, int]] = {
    "zoom_in": (2, 1),
    "zoom_out": (2, -1),
    "arc_left": (0, -1),
    "arc_right": (0, 1),
    "translate_up": (1, -1),
    "translate_down": (1, 1),
}
MOVES = tuple(IDEAL)


def path_features(
    w2c: Tensor,  # [N, F, 4, 4] world to camera
    depth: Tensor,  # [N, H, W] of the first frame, in the unit of the cameras
) -> Tensor:  # [N, F, 3] float64: yaw, pitch, forward, in units of the built-in moves
    """What the names of moves are read off."""
    c2w = torch.stack([relative_poses(invert_pose(path.double())) for path in w2c])
    axis = c2w[..., :3, 2]
    yaw = torch.atan2(axis[..., 0], axis[..., 2])
    pitch = torch.atan2(axis[..., 1], axis[..., [0, 2]].norm(dim=-1))
    turns = torch.stack([yaw, pitch], dim=-1) / math.radians(ARC_DEGREES)
    forward = c2w[..., 2, 3] / scene_scale(depth).clamp(min=1e-12)[:, None]
    return torch.cat([turns, forward[..., None]], dim=-1)


def classify(
    w2c: Tensor,  # [N, F, 4, 4] world to camera
    depth: Tensor,  # [N, H, W] of the first frame
) -> list[str]:
    """The name of every path's nearest ideal move; see the module."""
    features = path_features(w2c, depth)
    progress = torch.linspace(0.0, 1.0, features.shape[1], dtype=torch.float64)
    along = (features * progress[None, :, None]).sum(1)  # [N, 3]
    products = torch.stack([sign * along[:, axis] for axis, sign in IDEAL.values()], dim=1)
    return [MOVES[index] for index in products.argmax(1).tolist()]


def confusion(asked: list[str], found: list[str]) -> list[list[int]]:
    """Counts: a row for every asked move, a column for every found one, in the order of `MOVES`."""
    table = [[0] * len(MOVES) for _ in MOVES]
    for a, b in zip(asked, found, strict=True):
        table[MOVES.index(a)][MOVES.index(b)] += 1
    return table
