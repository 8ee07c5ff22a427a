"""A scene folder read for viewing: what is there is shown, what is missing is named.

scene.npz holds everything. Without it: pcds.ply for the cloud (no frames, no confidence),
cameras.json for the frusta, rgb.mp4 for the frames.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gen3r.media import InputError, load_video, read_cameras
from gen3r_engine.formats.cameras import FrameCameras, frame_cameras, frustum_size
from gen3r_engine.view.scene_view import MAX_POINTS, SceneView, view_of_arrays, within_reach

_NEEDED = ("points", "mask", "depth_confidence", "rgb", "extrinsics", "intrinsics")
_PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4"},
    **{"float": "<f4", "double": "<f8", "int8": "i1", "uint8": "u1", "int16": "<i2"},
    **{"uint16": "<u2", "int32": "<i4", "uint32": "<u4", "float32": "<f4", "float64": "<f8"},
}


def read_folder(folder: Path, max_points: int = MAX_POINTS) -> SceneView:
    """The view of a folder that `gen3r-engine run` or `Scene.save` wrote.

    Raises
    ------
    InputError : no such folder, nothing in it that can be shown, or a damaged file.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of one scene")
    title = _title(folder)
    if (folder / "scene.npz").is_file():
        return _from_npz(folder / "scene.npz", title, max_points)
    if not (folder / "pcds.ply").is_file():
        inside = sorted(p.parent for p in folder.glob("*/**/run.json"))[:1]
        hint = f"; did you mean {inside[0]}?" if inside else "; make it with --outputs points,npz"
        raise InputError(f"{folder} holds neither scene.npz nor pcds.ply{hint}")
    return _from_parts(folder, title, max_points)


def _title(folder: Path) -> str:
    path = folder / "prompts.txt"
    if not path.is_file():
        return folder.name
    return path.read_text(encoding="utf-8", errors="replace").strip() or folder.name


def _from_npz(path: Path, title: str, max_points: int) -> SceneView:
    try:
        with np.load(path) as file:
            lacking = [name for name in _NEEDED if name not in file]
            if lacking:
                raise InputError(f"{path} has no '{lacking[0]}'; write it with --outputs npz")
            arrays = {name: file[name] for name in _NEEDED}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error}); write it again or remove it") from error
    shape = arrays["rgb"].shape
    _check(path, arrays, shape)
    return view_of_arrays(
        points=arrays["points"],
        mask=arrays["mask"].astype(bool),
        confidence=arrays["depth_confidence"],
        frames=arrays["rgb"],
        cameras=frame_cameras(arrays["extrinsics"], arrays["intrinsics"]),
        title=title,
        max_points=max_points,
    )


def _check(path: Path, arrays: dict[str, NDArray[Any]], shape: tuple[int, ...]) -> None:
    if len(shape) != 4 or shape[3] != 3 or arrays["rgb"].dtype != np.uint8 or not shape[0]:
        raise InputError(f"{path}: rgb is {arrays['rgb'].dtype} {shape}, not uint8 [F, H, W, 3]")
    wanted = {"points": shape, "mask": shape[:3], "depth_confidence": shape[:3]}
    for name, expected in wanted.items():
        if arrays[name].shape != expected:
            raise InputError(f"{path}: {name} is {arrays[name].shape}, rgb asks for {expected}")
    if len(arrays["extrinsics"]) != shape[0]:
        raise InputError(f"{path}: {len(arrays['extrinsics'])} cameras for {shape[0]} frames")


def _from_parts(folder: Path, title: str, max_points: int) -> SceneView:
    points, colors = read_ply(folder / "pcds.ply")
    missing = ["points by frame and confidence: no scene.npz (make it with --outputs ...,npz)"]
    notes = []
    if len(points) > max_points:
        chosen = np.random.default_rng(0).choice(len(points), max_points, replace=False)
        notes.append(f"{max_points} of {len(points)} points are shown")
        points, colors = points[chosen], colors[chosen]
    near = within_reach(points)
    if not near.all():
        notes.append(f"{int((~near).sum())} far points are not shown")
    cameras = _cameras(folder / "cameras.json", missing)
    frames = _frames(folder / "rgb.mp4", missing)
    height, width = (0, 0) if frames is None else frames.shape[1:3]
    if cameras is not None and frames is None:  # the middle of the frames is the principal point
        centre = cameras.centre.mean(axis=0) if len(cameras) else np.zeros(2)
        width, height = (round(2 * float(c)) for c in centre)
    return SceneView(
        points=points[near],
        colors=colors[near],
        starts=None,
        sureness=None,
        frames=frames,
        cameras=cameras,
        height=height,
        width=width,
        frustum=frustum_size(points[near]),
        title=title,
        missing=missing,
        notes=notes,
    )


def _cameras(path: Path, missing: list[str]) -> FrameCameras | None:
    if not path.is_file():
        missing.append("cameras: no cameras.json")
        return None
    try:
        cameras = read_cameras(path)
    except InputError as error:
        missing.append(f"cameras: {error}")
        return None
    return frame_cameras(cameras.extrinsics, cameras.intrinsics)


def _frames(path: Path, missing: list[str]) -> NDArray[np.uint8] | None:
    if not path.is_file():
        missing.append("frames: no rgb.mp4")
        return None
    try:
        return np.stack(load_video(path))
    except InputError as error:
        missing.append(f"frames: {error}")
        return None


def read_ply(path: Path) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Points [N, 3] and colours [N, 3] of a binary little-endian PLY whose first element is vertex.

    Points that are not finite are left out; without colours they are grey.

    Raises
    ------
    InputError : another kind of PLY, or fewer bytes than it promises.
    """
    data = path.read_bytes()
    end = data.find(b"end_header\n")
    header = data[: max(end, 0)].decode("ascii", errors="replace").splitlines()
    if end < 0 or header[:1] != ["ply"] or "format binary_little_endian 1.0" not in header:
        raise InputError(
            f"{path} is not a binary little-endian PLY; write it with --outputs points"
        )
    fields: list[tuple[str, str]] = []
    count = -1
    for words in (line.split() for line in header):
        if words[:1] == ["element"] and count >= 0:
            break
        if words[:2] == ["element", "vertex"]:
            count = int(words[2])
        elif words[:1] == ["property"] and len(words) == 3 and words[1] in _PLY_TYPES:
            fields.append((words[2], _PLY_TYPES[words[1]]))
    names = {name for name, _ in fields}
    row = np.dtype(fields)
    start = end + len(b"end_header\n")
    if not {"x", "y", "z"} <= names or count < 0 or len(data) - start < count * row.itemsize:
        raise InputError(f"{path} is cut off or holds no vertices x, y, z; write it again")
    rows = np.frombuffer(data, row, count, start)
    points = np.stack([rows[n] for n in "xyz"], axis=1).astype(np.float32)
    colors = np.full((count, 3), 160, dtype=np.uint8)
    if {"red", "green", "blue"} <= names:
        colors = np.stack([rows[n] for n in ("red", "green", "blue")], axis=1).astype(np.uint8)
    finite = np.isfinite(points).all(axis=1)
    return points[finite], colors[finite]
