"""Camera paths: the built-in moves, smooth random ones, and the free space that both need."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from gen3r.cameras import trajectory
from gen3r.scene import TRAJECTORIES
from gen3r_training.procedural import table as t
from gen3r_training.procedural.draws import Draws

Floats = NDArray[np.float64]
RANDOM = "random"
MOVES = tuple(name for name in TRAJECTORIES if name != "free")
CLEARANCE = 0.3  # metres between a camera and what is nearest
LONGEST = 0.8  # scene units of a random path
_FREE_SHARE, _RANDOM_SHARE = 0.03, 0.5
_SHRINKING = (1.0, 0.75, 0.5, 0.3, 0.15, 0.0)
_KNOTS = 4


def choose_move(draws: Draws) -> str:
    """Half of the clips move at random, a few stand still, the others use a built-in move."""
    drawn = draws.share()
    if drawn < _RANDOM_SHARE:
        return RANDOM
    if drawn < _RANDOM_SHARE + _FREE_SHARE:
        return "free"
    return draws.pick(MOVES)


def built_in_path(move: str, frames: int, scale: float) -> Floats:  # [F, 4, 4] scene units
    """The move as inference makes it."""
    if move.startswith("zoom"):
        return trajectory(move, frames, scale).double().numpy()
    return _turn_in_place(move, frames)


@cache
def _turn_in_place(move: str, frames: int) -> Floats:
    return trajectory(move, frames).double().numpy()


def random_knots(draws: Draws) -> Floats:  # [KNOTS, 6]
    """Offset in scene units and yaw, pitch, roll in radians at the knots; the first are zero.

    A drift with bends: across and along more than up and down.
    """
    knots = np.zeros((_KNOTS, 6))
    drift = np.array([draws.uniform(-1, 1) for _ in range(6)])
    for i in range(1, _KNOTS):
        bends = np.array([draws.uniform(-0.35, 0.35) for _ in range(6)])
        knots[i] = drift * i / (_KNOTS - 1) + bends
    length = draws.uniform(0.15, LONGEST)
    turn = math.radians(draws.uniform(5, 34))
    limits = np.array([1.0, 0.35, 1.0, 1.0, 0.3, 0.1])
    knots *= limits
    for columns, most in ((slice(0, 3), length), (slice(3, 6), turn)):
        largest = np.linalg.norm(knots[:, columns], axis=1).max()
        knots[:, columns] *= most / max(largest, 1e-6)
    return knots


@cache
def _basis(frames: int) -> Floats:  # [F, KNOTS]
    """Weights of the knots in every frame: a natural cubic spline."""
    at = np.linspace(0, 1, _KNOTS)
    spline = CubicSpline(at, np.eye(_KNOTS), bc_type="natural")
    return np.asarray(spline(np.linspace(0, 1, frames)))


def random_paths(knots: Floats, frames: int) -> Floats:  # [N, F, 4, 4] scene units
    """Camera to the first camera along the splines through [N, KNOTS, 6]."""
    values = np.einsum("fk,nkc->nfc", _basis(frames), knots)
    # Between knots a spline swings a little beyond them.
    length = np.linalg.norm(values[..., :3], axis=-1).max(axis=1)
    values[..., :3] *= (LONGEST / np.maximum(length, LONGEST))[:, None, None]
    yaw, pitch, roll = np.moveaxis(values[..., 3:], -1, 0)
    paths = np.zeros((*values.shape[:2], 4, 4))
    paths[..., :3, :3] = _about(1, yaw) @ _about(0, pitch) @ _about(2, roll)
    paths[..., :3, 3] = values[..., :3]
    paths[..., 3, 3] = 1
    paths[:, 0] = np.eye(4)
    return paths


def _about(axis: int, angle: Floats) -> Floats:  # [..., 3, 3]
    a, b = ((1, 2), (0, 2), (0, 1))[axis]
    turn = np.zeros((*angle.shape, 3, 3))
    turn[..., axis, axis] = 1
    turn[..., a, a] = turn[..., b, b] = np.cos(angle)
    turn[..., a, b], turn[..., b, a] = np.sin(angle), -np.sin(angle)
    return turn


def clearance(
    rows: Floats,  # [N, ROWS, COLUMNS]
    bounds: Floats,  # [N, 2, 3]
    roofless: NDArray[np.bool_],  # [N]
    points: Floats,  # [N, F, 3]
) -> Floats:  # [N, F] metres
    """Distance of points to what is nearest; negative inside of it or outside the room."""
    low, high = (points - bounds[:, None, 0]), (bounds[:, None, 1] - points)
    low[..., 1] = np.where(roofless[:, None], math.inf, low[..., 1])
    nearest = np.minimum(low.min(axis=-1), high.min(axis=-1))
    for first, count, kind in (
        (t.FIRST_BOX, t.BOXES, t.BOX),
        (t.FIRST_SPHERE, t.SPHERES, t.SPHERE),
        (t.FIRST_CYLINDER, t.CYLINDERS, t.CYLINDER),
        (t.FIRST_ARCH, t.ARCHES, t.ARCH),
    ):
        for row in range(first, first + count):
            away = _distance(rows[:, None, row], kind, points)
            used = rows[:, row, t.HALF, None] > 0
            nearest = np.minimum(nearest, np.where(used, away, math.inf))
    return nearest


def _distance(row: Floats, kind: int, points: Floats) -> Floats:
    """Signed distance (a lower bound inside an arch's box) of [N, F, 3] to rows [N, 1, COLUMNS]."""
    offset = points - row[..., :3]
    half = row[..., t.HALF : t.HALF + 3]
    if kind == t.SPHERE:
        return np.asarray(np.linalg.norm(offset, axis=-1) - half[..., 0])
    cosine, sine = row[..., t.COSINE], row[..., t.SINE]
    x = cosine * offset[..., 0] - sine * offset[..., 2]
    z = sine * offset[..., 0] + cosine * offset[..., 2]
    y = offset[..., 1]
    if kind == t.CYLINDER:
        beyond = np.stack([np.hypot(x, z) - half[..., 0], np.abs(y) - half[..., 1]], -1)
    else:
        beyond = np.abs(np.stack([x, y, z], -1)) - half
    outside = np.linalg.norm(np.maximum(beyond, 0), axis=-1)
    distance = outside + np.minimum(beyond.max(axis=-1), 0)
    if kind == t.ARCH:
        above = np.minimum(points[..., 1] - row[..., t.SPRING], 0)
        distance = np.maximum(distance, row[..., t.HOLE] - np.hypot(x, above))
    return np.asarray(distance)


def free_random_paths(
    knots: Floats,  # [N, KNOTS, 6]
    frames: int,
    unit: Floats,  # [N] metres
    poses: Floats,  # [N, 4, 4] first camera to world, metres
    rows: Floats,
    bounds: Floats,
    roofless: NDArray[np.bool_],
) -> Floats:  # [N, F, 4, 4] scene units
    """Random paths that keep their distance from everything: shortened until they do."""
    paths = random_paths(knots, frames)
    left = np.arange(len(paths))
    for factor in _SHRINKING:
        trial = paths[left].copy()
        trial[..., :3, 3] *= factor
        points = world_poses(trial, unit[left], poses[left])[..., :3, 3]
        near = clearance(rows[left], bounds[left], roofless[left], points).min(axis=1)
        # At rest (factor 0) the camera stands where the layout put it.
        free = (near >= CLEARANCE) | (factor == 0.0)
        paths[left[free]] = trial[free]
        left = left[~free]
        if not len(left):
            break
    return paths


def world_poses(c2w: Floats, unit: Floats, poses: Floats) -> Floats:  # [N, F, 4, 4] metres
    """Cameras in the room of paths [N, F, 4, 4] in scene units, relative to `poses` [N, 4, 4]."""
    scaled = c2w.copy()
    scaled[..., :3, 3] *= unit[:, None, None]
    return np.asarray(poses[:, None] @ scaled)
