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

    Arrays or tensors. A [F, 3, 4] extrinsics gets its last row.
    """
    w2c = np.asarray(extrinsics, dtype=np.float64)
    if w2c.shape[1:] == (3, 4):
        last = np.broadcast_to(np.array([0.0, 0.0, 0.0, 1.0]), (len(w2c), 1, 4))
        w2c = np.concatenate([w2c, last], axis=1)
    data = {"extrinsics": w2c.tolist(), "intrinsics": np.asarray(intrinsics, np.float64).tolist()}
    Path(path).write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")


def write_ply(path: str | Path, points: Any, colors: Any) -> None:
    """Write a coloured cloud as binary little-endian PLY (float32 x y z, uint8 red green blue).

    points : [N, 3] float; colors : [N, 3] uint8. ValueError when the shapes do not agree.
    """
    xyz, rgb = np.asarray(points), np.asarray(colors)
    if xyz.ndim != 2 or xyz.shape[1] != 3 or rgb.shape != xyz.shape or rgb.dtype != np.uint8:
        raise ValueError(
            "points and uint8 colours must both be [N, 3], "
            f"got {xyz.shape} and {rgb.dtype} {rgb.shape}"
        )
    fields = [(name, "<f4") for name in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")]
    rows = np.empty(len(xyz), dtype=fields)
    for axis, name in enumerate("xyz"):
        rows[name] = xyz[:, axis]
    for channel, name in enumerate(("red", "green", "blue")):
        rows[name] = rgb[:, channel]
    properties = [f"property float {n}" for n in "xyz"]
    properties += [f"property uchar {n}" for n in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(rows)}"]
    text = "\n".join([*header, *properties, "end_header", ""])
    with open(path, "wb") as file:
        file.write(text.encode("ascii"))
        file.write(rows.tobytes())


def write_npz(scene: Scene, path: str | Path) -> None:
    """Write every array of a scene under its own name, uncompressed; points as float32."""
    arrays: dict[str, Any] = {
        name: np.asarray(getattr(scene, name))
        for name in (
            *("rgb", "depth", "depth_confidence", "extrinsics", "intrinsics", "mask"),
            *("point_map", "point_confidence"),
        )
        if getattr(scene, name) is not None
    }
    np.savez(path, **arrays, points=np.asarray(scene.points, dtype=np.float32))


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
