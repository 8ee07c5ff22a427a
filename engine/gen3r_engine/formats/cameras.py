"""What the formats share about cameras: which can be written, pixel centres, frusta as lines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# A pixel (u, v) of a scene is its index, its centre; COLMAP and nerfstudio put the corner of the
# first pixel at 0, so that its centre is at 0.5.
PIXEL_CENTRE = 0.5
_RIGID = 1e-2  # how far a rotation's determinant may be from 1 (float32 poses: below 1e-5)


@dataclass(frozen=True)
class FrameCameras:
    """The cameras of those frames that have one.

    frames : [C] int64, their indices, ascending
    rotations : [C, 3, 3], shifts : [C, 3]; world to camera, OpenCV axes
    focal : [C, 2], centre : [C, 2]; pixels, the centre of the first pixel being (0, 0)
    """

    frames: NDArray[np.int64]
    rotations: Floats
    shifts: Floats
    focal: Floats
    centre: Floats

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def positions(self) -> Floats:
        """[C, 3] camera centres in the world."""
        return -np.einsum("cji,cj->ci", self.rotations, self.shifts)

    def to_world(self, local: Floats, camera: int) -> Floats:
        """World points [..., 3] of points [..., 3] in the frame of one camera."""
        return (local - self.shifts[camera]) @ self.rotations[camera]


def frame_cameras(
    extrinsics: ArrayLike,  # [F, 4, 4] or [F, 3, 4] world to camera
    intrinsics: ArrayLike,  # [F, 3, 3] pixels
) -> FrameCameras:
    """The usable cameras: finite, focal lengths > 0, a rotation with determinant 1.

    Raises
    ------
    ValueError : other shapes, or pixels with a skew, which the formats cannot hold.
    """
    pose = np.asarray(extrinsics, dtype=np.float64)
    k = np.asarray(intrinsics, dtype=np.float64)
    if pose.ndim != 3 or pose.shape[1:] not in ((4, 4), (3, 4)) or k.shape != (len(pose), 3, 3):
        raise ValueError(
            f"extrinsics {pose.shape} and intrinsics {k.shape} must be [F, 4, 4] and [F, 3, 3]"
        )
    entries = np.hstack([pose.reshape(len(pose), -1), k.reshape(len(pose), -1)])
    finite = np.asarray(np.isfinite(entries).all(axis=1))
    volume = np.linalg.det(np.where(finite[:, None, None], pose[:, :3, :3], np.eye(3)))
    rigid = np.abs(volume - 1.0) < _RIGID
    frames = np.flatnonzero(finite & rigid & (k[:, 0, 0] > 0) & (k[:, 1, 1] > 0))
    pose, k = pose[frames], k[frames]
    skewed = np.flatnonzero(np.abs(k[:, 0, 1]) > 1e-3)
    if len(skewed):
        first = skewed[0]
        raise ValueError(
            f"the camera of frame {frames[first]} has a skew of {k[first, 0, 1]:.3g} pixels, which "
            "COLMAP, nerfstudio and frusta cannot hold; use intrinsics without skew"
        )
    return FrameCameras(
        frames=frames,
        rotations=pose[:, :3, :3],
        shifts=pose[:, :3, 3],
        focal=np.stack([k[:, 0, 0], k[:, 1, 1]], axis=1),
        centre=k[:, :2, 2],
    )


def frustum_size(points: ArrayLike) -> float:  # [N, 3] world
    """A length that shows well beside a cloud: 4 % of the diagonal of its inner 90 %, else 0.1."""
    cloud = np.asarray(points).reshape(-1, 3)
    cloud = cloud[:: max(1, len(cloud) // 200_000)]
    cloud = cloud[np.isfinite(cloud).all(axis=1)]
    if not len(cloud):
        return 0.1
    low, high = np.percentile(cloud, [5.0, 95.0], axis=0)
    return 0.04 * float(np.linalg.norm(high - low)) or 0.1


def frustum_corners(cameras: FrameCameras, height: int, width: int, size: float) -> Floats:
    """World points [C, 5, 3] of every frustum: its tip and the corners of its far face.

    The face lies `size` in front of the tip; corners run top left, top right, bottom right, bottom
    left as seen from the tip.
    """
    u = np.array([0.0, width, width, 0.0]) - PIXEL_CENTRE
    v = np.array([0.0, 0.0, height, height]) - PIXEL_CENTRE
    corners = np.empty((len(cameras), 5, 3))
    for camera in range(len(cameras)):
        fx, fy = cameras.focal[camera]
        cx, cy = cameras.centre[camera]
        face = np.stack([(u - cx) / fx, (v - cy) / fy, np.ones(4)], axis=1) * size
        corners[camera] = cameras.to_world(np.vstack([np.zeros(3), face]), camera)
    return corners


# Pairs of `frustum_corners`: four edges to the face, then its outline.
FRUSTUM_EDGES = ((0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 1))


def frustum_lines(corners: Floats) -> Floats:  # [C, 5, 3] -> [C, 8, 2, 3]
    """The edges of the frusta as pairs of world points."""
    return corners[:, np.array(FRUSTUM_EDGES)]
