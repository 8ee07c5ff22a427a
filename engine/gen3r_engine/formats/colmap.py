"""A COLMAP sparse model: cameras, images and points3D, as binary and as text.

One PINHOLE camera and one image a frame; ids count from 1 (frame f is image f + 1). Poses are
COLMAP's own convention, world to camera with a unit quaternion (w, x, y, z). The principal point is
half a pixel further than a scene's, because COLMAP counts from the first pixel's corner.

Observations are the points' own projections into up to three frames that see them, so their
reprojection error is what rounding leaves. Points that no frame sees are left out, and a cloud of
more than `MOST_POINTS` is thinned out at random, for readers of sparse models expect few points.

The layouts are those of colmap.github.io/format.html; the byte layouts of a binary record are the
dtypes below.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.transform import Rotation

from gen3r_engine.formats.cameras import PIXEL_CENTRE, Floats, FrameCameras
from gen3r_engine.formats.frames import frame_name
from gen3r_engine.formats.tracks import Observations, observe

MOST_POINTS = 500_000
_PINHOLE = 1
_OBSERVATION = np.dtype([("pixel", "<f8", 2), ("point", "<u8")])


@dataclass(frozen=True)
class ColmapModel:
    """A sparse model ready to be written.

    height, width : of the images; parameters : [C, 4] fx, fy, cx, cy
    quaternions : [C, 4] w, x, y, z; shifts : [C, 3]; image_ids : [C]
    points : [N, 3] float64; colors : [N, 3] uint8; point ids are 1 ... N
    observations : of these points
    left_out : points that no frame sees; thinned : points beyond `MOST_POINTS`
    """

    height: int
    width: int
    parameters: Floats
    quaternions: Floats
    shifts: Floats
    image_ids: NDArray[np.int64]
    points: Floats
    colors: NDArray[np.uint8]
    observations: Observations
    left_out: int
    thinned: int


def colmap_model(
    points: Floats,  # [N, 3] world
    colors: NDArray[np.uint8],  # [N, 3]
    cameras: FrameCameras,
    depth: ArrayLike,  # [F, H, W]
) -> ColmapModel:
    """The model of a cloud and the cameras that saw it."""
    depth = np.asarray(depth, dtype=np.float32)
    thinned = max(0, len(points) - MOST_POINTS)
    if thinned:
        chosen = np.random.default_rng(0).choice(len(points), MOST_POINTS, replace=False)
        chosen.sort()
        points, colors = points[chosen], colors[chosen]
    seen = observe(points, cameras, depth)
    kept = np.zeros(len(points), dtype=bool)
    kept[seen.point] = True
    renumbered = np.cumsum(kept) - 1
    rotations = cameras.rotations.reshape(-1, 3, 3)
    quaternions = np.zeros((0, 4))
    if len(cameras):
        quaternions = Rotation.from_matrix(rotations).as_quat(canonical=True)[:, [3, 0, 1, 2]]
    return ColmapModel(
        height=depth.shape[1],
        width=depth.shape[2],
        parameters=np.hstack([cameras.focal, cameras.centre + PIXEL_CENTRE]),
        quaternions=quaternions,
        shifts=cameras.shifts,
        image_ids=cameras.frames + 1,
        points=points[kept],
        colors=colors[kept],
        observations=Observations(renumbered[seen.point], seen.camera, seen.pixel),
        left_out=int(len(points) - kept.sum()),
        thinned=thinned,
    )


def _by_image(model: ColmapModel) -> Iterator[tuple[int, slice]]:
    """Every camera's index and its rows of the observations."""
    edges = np.searchsorted(model.observations.camera, np.arange(len(model.image_ids) + 1))
    for camera in range(len(model.image_ids)):
        yield camera, slice(edges[camera], edges[camera + 1])


@dataclass(frozen=True)
class _Tracks:
    """Observations grouped by point: rows of `order`, from `start`, `length` of them."""

    order: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    image: NDArray[np.int64]  # image id of every observation
    index: NDArray[np.int64]  # its place in that image's list


def _tracks(model: ColmapModel) -> _Tracks:
    seen = model.observations
    length = np.bincount(seen.point, minlength=len(model.points))
    index = np.arange(len(seen.point))
    for _, rows in _by_image(model):
        index[rows] -= rows.start
    return _Tracks(
        order=np.argsort(seen.point, kind="stable"),
        start=np.cumsum(length) - length,
        length=length,
        image=model.image_ids[seen.camera],
        index=index,
    )


def write_binary(model: ColmapModel, folder: Path) -> None:
    """Write cameras.bin, images.bin and points3D.bin into a folder that exists."""
    seen = model.observations
    with open(folder / "cameras.bin", "wb") as file:
        file.write(struct.pack("<Q", len(model.image_ids)))
        for number, parameters in zip(model.image_ids, model.parameters, strict=True):
            head = struct.pack("<iiQQ", number, _PINHOLE, model.width, model.height)
            file.write(head + struct.pack("<4d", *parameters))
    rows = np.empty(len(seen.point), _OBSERVATION)
    rows["pixel"], rows["point"] = seen.pixel, seen.point + 1
    with open(folder / "images.bin", "wb") as file:
        file.write(struct.pack("<Q", len(model.image_ids)))
        for camera, part in _by_image(model):
            number = model.image_ids[camera]
            pose = (*model.quaternions[camera], *model.shifts[camera])
            file.write(struct.pack("<I7dI", number, *pose, number))
            file.write(frame_name(int(number) - 1).encode("ascii") + b"\0")
            file.write(struct.pack("<Q", part.stop - part.start) + rows[part].tobytes())
    tracks = _tracks(model)
    with open(folder / "points3D.bin", "wb") as file:
        file.write(struct.pack("<Q", len(model.points)))
        # Records differ in length, and their order is free: all tracks of one length at a time.
        for length in np.unique(tracks.length):
            file.write(_points_of_length(model, tracks, int(length)).tobytes())


def _points_of_length(model: ColmapModel, tracks: _Tracks, length: int) -> NDArray[np.void]:
    track = np.dtype([("image", "<u4"), ("index", "<u4")])
    record = np.dtype(
        [
            *(("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8")),
            *(("length", "<u8"), ("track", track, (length,))),
        ]
    )
    chosen = np.flatnonzero(tracks.length == length)
    rows = np.zeros(len(chosen), record)
    rows["id"], rows["length"] = chosen + 1, length
    rows["xyz"], rows["rgb"] = model.points[chosen], model.colors[chosen]
    members = tracks.order[tracks.start[chosen][:, None] + np.arange(length)]
    rows["track"]["image"], rows["track"]["index"] = tracks.image[members], tracks.index[members]
    return rows


def write_text(model: ColmapModel, folder: Path) -> None:
    """Write cameras.txt, images.txt and points3D.txt into a folder that exists."""
    with open(folder / "cameras.txt", "w", encoding="ascii") as file:
        file.write("# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[] as fx, fy, cx, cy\n")
        for number, parameters in zip(model.image_ids, model.parameters, strict=True):
            file.write(f"{number} PINHOLE {model.width} {model.height} {_numbers(parameters)}\n")
    seen = model.observations
    with open(folder / "images.txt", "w", encoding="ascii") as file:
        file.write("# IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME\n")
        file.write("# POINTS2D[] as (X, Y, POINT3D_ID)\n")
        for camera, part in _by_image(model):
            number = model.image_ids[camera]
            pose = _numbers([*model.quaternions[camera], *model.shifts[camera]])
            file.write(f"{number} {pose} {number} {frame_name(int(number) - 1)}\n")
            pixels, ids = seen.pixel[part].tolist(), (seen.point[part] + 1).tolist()
            listed = (f"{x!r} {y!r} {i}" for (x, y), i in zip(pixels, ids, strict=True))
            file.write(" ".join(listed) + "\n")
    tracks = _tracks(model)
    members = np.stack([tracks.image, tracks.index], axis=1)[tracks.order].tolist()
    starts = [*tracks.start.tolist(), len(members)]
    with open(folder / "points3D.txt", "w", encoding="ascii") as file:
        file.write("# POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)\n")
        for row, (xyz, rgb) in enumerate(
            zip(model.points.tolist(), model.colors.tolist(), strict=True)
        ):
            track = " ".join(f"{i} {j}" for i, j in members[starts[row] : starts[row + 1]])
            shown = f"{xyz[0]!r} {xyz[1]!r} {xyz[2]!r} {rgb[0]} {rgb[1]} {rgb[2]}"
            file.write(f"{row + 1} {shown} 0 {track}\n")


def _numbers(values: ArrayLike) -> str:
    """Floats with all their digits, a space between them."""
    return " ".join(repr(float(value)) for value in np.asarray(values))
