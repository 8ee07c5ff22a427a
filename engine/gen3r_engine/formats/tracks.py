"""Which frames see which points of a cloud: the observations that a COLMAP model needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gen3r_engine.formats.cameras import PIXEL_CENTRE, Floats, FrameCameras

MOST = 3  # observations a point; more make the files larger and tell a reader nothing new
_AGREES = 0.03  # a point is seen where its depth differs by no more than this share
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Observations:
    """One row an observation, ordered by camera.

    point, camera : [N] int64, indices of the cloud and of `FrameCameras`
    pixel : [N, 2] float64 x, y, the corner of the first pixel being (0, 0)
    """

    point: NDArray[np.int64]
    camera: NDArray[np.int64]
    pixel: Floats


def project(points: Floats, cameras: FrameCameras, camera: int) -> tuple[Floats, Floats]:
    """Pixels [N, 2] (corner of the first at 0, NaN behind the camera) and depths [N]."""
    local = points @ cameras.rotations[camera].T + cameras.shifts[camera]
    depth = local[:, 2]
    safe = np.where(depth > 0, depth, np.nan)[:, None]
    pixel = local[:, :2] / safe * cameras.focal[camera]
    return pixel + cameras.centre[camera] + PIXEL_CENTRE, depth


def observe(
    points: Floats,  # [N, 3] world
    cameras: FrameCameras,
    depth: NDArray[np.float32],  # [F, H, W]
) -> Observations:
    """Up to `MOST` observations of every point, from frames far apart in time.

    A frame sees a point that projects into it and whose depth agrees with the frame's depth map. A
    point that no depth map agrees with (an average of two surfaces) gets the frame that comes
    nearest; a point outside all frames gets none.
    """
    seen = np.zeros(len(points), dtype=np.int64)
    found: list[tuple[NDArray[np.int64], int, Floats]] = []
    # Golden-ratio order: any few frames that follow each other here lie far apart in the clip.
    order = np.argsort(np.arange(len(cameras)) * _GOLDEN % 1.0)
    for camera in order:
        open_points = np.flatnonzero(seen < MOST)
        inside, pixel, gap = _gap(points, open_points, cameras, int(camera), depth)
        agrees = gap <= _AGREES
        found.append((inside[agrees], int(camera), pixel[agrees]))
        seen[inside[agrees]] += 1
    found += _nearest(points, np.flatnonzero(seen == 0), cameras, depth)
    found.sort(key=lambda part: part[1])
    if not found:
        none = np.zeros(0, np.int64)
        return Observations(none, none, np.zeros((0, 2)))
    return Observations(
        point=np.concatenate([part[0] for part in found]),
        camera=np.repeat([part[1] for part in found], [len(part[0]) for part in found]),
        pixel=np.concatenate([part[2] for part in found]),
    )


def _gap(
    points: Floats,
    chosen: NDArray[np.int64],
    cameras: FrameCameras,
    camera: int,
    depth: NDArray[np.float32],
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Those of the chosen points inside a frame, their pixels, and how far their depth is off.

    The last as a share of the point's depth; infinite where the frame has no depth.
    """
    height, width = depth.shape[1:]
    pixel, z = project(points[chosen], cameras, camera)
    with np.errstate(invalid="ignore"):  # NaN behind the camera: not inside
        inside = ((pixel >= 0) & (pixel < (width, height))).all(axis=1)
    pixel, z = pixel[inside], z[inside]
    column, row = pixel.astype(np.int64).T
    there = depth[cameras.frames[camera]][row, column].astype(np.float64)
    known = np.isfinite(there) & (there > 0)
    gap = np.where(known, np.abs(np.where(known, there, 0.0) - z) / z, np.inf)
    return chosen[inside], pixel, gap


def _nearest(
    points: Floats, chosen: NDArray[np.int64], cameras: FrameCameras, depth: NDArray[np.float32]
) -> list[tuple[NDArray[np.int64], int, Floats]]:
    """For each of the chosen points the frame whose depth comes nearest, where any holds it."""
    best = np.full(len(points), np.inf)
    holder = np.full(len(points), -1, dtype=np.int64)
    place = np.zeros((len(points), 2))
    for camera in range(len(cameras)):
        inside, pixel, gap = _gap(points, chosen, cameras, camera, depth)
        gap = np.minimum(gap, np.finfo(np.float64).max)  # inside without depth: better than none
        nearer = gap < best[inside]
        rows = inside[nearer]
        best[rows], holder[rows], place[rows] = gap[nearer], camera, pixel[nearer]
    parts = []
    for camera in range(len(cameras)):
        rows = np.flatnonzero(holder == camera)
        parts.append((rows, camera, place[rows]))
    return parts
