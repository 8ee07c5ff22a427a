"""Cameras as they are written: checked, and turned from the conventions that data sets use."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from gen3r_training.formats.scene import BadScene, Floats

# How far R^T R may be from the identity. Text files with six digits stay below 1e-5; what passes is
# replaced by the nearest rotation.
_RIGID = 1e-2

# Columns of a camera-to-world pose with OpenGL axes (x right, y up, z backward) change sign.
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


def pinhole(fx: float, fy: float, cx: float, cy: float) -> Floats:
    """[3, 3] intrinsics without skew."""
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


def to_4x4(poses: ArrayLike) -> Floats:  # [F, 3, 4] or [F, 4, 4] -> [F, 4, 4]
    """Poses with the last row that rigid ones have."""
    values = np.asarray(poses, dtype=np.float64)
    full = np.tile(np.eye(4), (len(values), 1, 1))
    full[:, :3] = values[:, :3, :4]
    return full


def invert(poses: Floats) -> Floats:  # [F, 4, 4]
    """The inverse of rigid poses (camera to world <-> world to camera)."""
    inverse = np.tile(np.eye(4), (len(poses), 1, 1))
    inverse[:, :3, :3] = np.swapaxes(poses[:, :3, :3], 1, 2)
    inverse[:, :3, 3] = -np.einsum("fji,fj->fi", poses[:, :3, :3], poses[:, :3, 3])
    return inverse


def checked_poses(poses: Floats) -> Floats:  # [F, 4, 4]
    """The poses with their rotations made exact.

    Raises
    ------
    BadScene : a value that is not finite, or a matrix that is no rotation.
    """
    _all_finite(poses, "pose")
    rotation = poses[:, :3, :3]
    error = np.abs(np.swapaxes(rotation, 1, 2) @ rotation - np.eye(3)).max(axis=(1, 2))
    bad = np.flatnonzero((error > _RIGID) | (np.linalg.det(rotation) < 0))
    if len(bad):
        raise BadScene(
            f"the pose of frame {bad[0]} is no rotation (R^T R is {error[bad[0]]:.2g} from the "
            f"identity, determinant {np.linalg.det(rotation[bad[0]]):.3g}; {len(bad)} such frames)"
        )
    u, _, v = np.linalg.svd(rotation)
    exact = to_4x4(poses)
    exact[:, :3, :3] = u @ v
    return exact


def checked_intrinsics(intrinsics: Floats) -> Floats:  # [F, 3, 3]
    """The intrinsics; `BadScene` for a value that is not finite or a focal length of 0 or less."""
    _all_finite(intrinsics, "intrinsics")
    bad = np.flatnonzero((intrinsics[:, 0, 0] <= 0) | (intrinsics[:, 1, 1] <= 0))
    if len(bad):
        fx, fy = intrinsics[bad[0], 0, 0], intrinsics[bad[0], 1, 1]
        raise BadScene(f"the focal length {fx:.4g} x {fy:.4g} of frame {bad[0]} is not above 0")
    return intrinsics


def _all_finite(values: Floats, what: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
    if len(bad):
        raise BadScene(f"the {what} of frame {bad[0]} is not finite ({len(bad)} such frames)")
