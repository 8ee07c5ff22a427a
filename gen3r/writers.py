"""Results as files: MP4 videos, camera JSON, PLY clouds, npz arrays and whole scene folders.

Arrays and tensors are taken alike; torch is not imported.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gen3r.folders import whole_folder

if TYPE_CHECKING:
    from gen3r.scene import Scene

FRAME_RATE = 12  # frames per second of the written videos, as upstream


def save_video(frames: Any, path: str | Path, fps: int = FRAME_RATE, crf: int = 18) -> None:
    """Write frames as H.264 (yuv420p) MP4.

    Parameters
    ----------
    frames : [F, H, W, 3] uint8 array or tensor, H and W even.
    crf : constant rate factor, lower is better; 18 is visually lossless.

    Raises
    ------
    ValueError : another shape or dtype, or an odd size. RuntimeError : no H.264 encoder.
    """
    import av

    video = np.asarray(frames)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[3] != 3 or not len(video):
        raise ValueError(f"frames must be uint8 [F, H, W, 3], got {video.dtype} {video.shape}")
    height, width = video.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames of {width}x{height} can not be stored as yuv420p; use even sizes")
    if "libx264" not in av.codecs_available:
        raise RuntimeError("this build of PyAV has no libx264; install av from its binary wheel")
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps), options={"crf": str(crf), "preset": "medium"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for image in video:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_cameras(path: str | Path, extrinsics: Any, intrinsics: Any) -> None:
    """Write cameras as upstream does: extrinsics [F, 4, 4] or [F, 3, 4], intrinsics [F, 3, 3].

    Arrays or tensors. A [F, 3, 4] extrinsics gets its last row. NaN and infinity, for which JSON
    has no word, become null (and `gen3r.media.read_cameras` names the matrix that holds one).
    """
    w2c = np.asarray(extrinsics, dtype=np.float64)
    if w2c.shape[1:] == (3, 4):
        last = np.broadcast_to(np.array([0.0, 0.0, 0.0, 1.0]), (len(w2c), 1, 4))
        w2c = np.concatenate([w2c, last], axis=1)
    data = {"extrinsics": _plain(w2c), "intrinsics": _plain(np.asarray(intrinsics, np.float64))}
    Path(path).write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")


def _plain(values: np.ndarray) -> Any:
    """Nested lists of floats, None where a value is not finite."""
    rows = values.astype(object)
    rows[~np.isfinite(values)] = None
    return rows.tolist()


_PLY_FIELDS = {"<f4": "float", "u1": "uchar"}


def ply_header(count: int, *, normals: bool = False) -> bytes:
    """Header of a binary PLY of `count` rows: float32 x y z (nx ny nz), uint8 red green blue."""
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    lines += [f"property {_PLY_FIELDS[kind]} {name}" for name, kind in _ply_row(normals)]
    return "\n".join([*lines, "end_header", ""]).encode("ascii")


def _ply_row(normals: bool) -> list[tuple[str, str]]:
    floats = (*"xyz", *(("nx", "ny", "nz") if normals else ()))
    return [(n, "<f4") for n in floats] + [(n, "u1") for n in ("red", "green", "blue")]


def ply_rows(points: Any, colors: Any, normals: Any = None) -> np.ndarray:
    """The rows that follow `ply_header`: [N] records without padding.

    points : [N, 3] float; colors : [N, 3] uint8; normals : [N, 3] float or None. ValueError when
    the shapes do not agree.
    """
    xyz, rgb = np.asarray(points), np.asarray(colors)
    if xyz.ndim != 2 or xyz.shape[1] != 3 or rgb.shape != xyz.shape or rgb.dtype != np.uint8:
        raise ValueError(
            "points and uint8 colours must both be [N, 3], "
            f"got {xyz.shape} and {rgb.dtype} {rgb.shape}"
        )
    columns = [*xyz.T]
    if normals is not None:
        slopes = np.asarray(normals)
        if slopes.shape != xyz.shape:
            raise ValueError(f"normals {slopes.shape} must be [N, 3] like the points {xyz.shape}")
        columns += [*slopes.T]
    rows = np.empty(len(xyz), dtype=_ply_row(normals is not None))
    for (name, _), values in zip(_ply_row(normals is not None), [*columns, *rgb.T], strict=True):
        rows[name] = values
    return rows


def write_ply(path: str | Path, points: Any, colors: Any, normals: Any = None) -> None:
    """Write a coloured cloud as binary little-endian PLY (see `ply_rows`)."""
    rows = ply_rows(points, colors, normals)
    with open(path, "wb") as file:
        file.write(ply_header(len(rows), normals=normals is not None))
        file.write(rows.view(np.uint8).data)


def scene_arrays(scene: Scene) -> dict[str, np.ndarray]:
    """Every array of a scene under its own name; points as float32."""
    names = ("rgb", "depth", "depth_confidence", "extrinsics", "intrinsics", "mask")
    arrays = {
        name: np.asarray(getattr(scene, name))
        for name in (*names, "point_map", "point_confidence")
        if getattr(scene, name) is not None
    }
    return arrays | {"points": np.asarray(scene.points, dtype=np.float32)}


def write_npz(scene: Scene, path: str | Path) -> None:
    """Write `scene_arrays` uncompressed."""
    np.savez(path, **scene_arrays(scene))  # type: ignore[arg-type]


def masked_cloud(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Points worth keeping and their colours: [N, 3] float64, [N, 3] uint8.

    Upstream's export ignores the mask; here masked and non-finite points are left out.
    """
    points = np.asarray(scene.points, dtype=np.float64)
    keep = np.asarray(scene.mask, dtype=bool) & np.isfinite(points).all(axis=-1)
    return points[keep], np.asarray(scene.rgb)[keep]


def save_scene(scene: Scene, directory: Path) -> Path:
    """Write rgb.mp4, cameras.json, pcds.ply (masked points, not fused) and scene.npz.

    Raises
    ------
    FileExistsError : `directory` exists. OSError : it cannot be written.
    """
    with whole_folder(directory.parent, directory.name) as folder:
        save_video(scene.rgb, folder.path / "rgb.mp4")
        write_cameras(folder.path / "cameras.json", scene.extrinsics, scene.intrinsics)
        write_ply(folder.path / "pcds.ply", *masked_cloud(scene))
        write_npz(scene, folder.path / "scene.npz")
    return folder.path
