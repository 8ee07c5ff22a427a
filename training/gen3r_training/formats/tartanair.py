"""TartanAir, the first release and the second one's front camera: rendered, exact poses and depth.

    ENV/Easy/P000/image_left/000000_left.png               640 x 480
    ENV/Easy/P000/depth_left/000000_left_depth.npy         float32 metres; or .npz, or a PNG
    ENV/Easy/P000/pose_left.txt                            tx ty tz qx qy qz qw, a line a frame
    ENV/Data_easy/P000/image_lcam_front/..., depth_lcam_front/..., pose_lcam_front.txt  (second)

pose : camera to world in the NED frame: x forward, y right, z down, for the camera and the world.
    The camera's axes are renamed to OpenCV's, and so are the world's.
intrinsics : no file. The field of view is 90 degrees across: f = w / 2 (320), principal point in
    the middle, (320, 240). The renderer counts from the corner of the first pixel. (The release's
    own tools take 320, 240 for whole pixel numbers, half a pixel off.)
depth PNG : four channels B, G, R, A are the bytes of a little-endian float32
sky : at 10000 m or so. Depth from `SKY` on is written as none.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from gen3r_training.formats.cameras import invert, pinhole
from gen3r_training.formats.scene import (
    AbsentScene,
    BadScene,
    Depth,
    DepthMaps,
    Floats,
    ImageFiles,
    Scene,
    SceneEntry,
    find_folders,
    list_images,
    read_rows,
    reading,
    scene_name,
)

SKY = 1000.0  # metres
_CAMERAS = ("left", "lcam_front")  # of the first and of the second release
_DEPTH_SUFFIXES = (".npy", ".npz", ".png")

# OpenCV's x, y, z are NED's y (right), z (down), x (forward).
NED_TO_OPENCV = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])


def find(source: Path) -> Iterator[SceneEntry]:
    """Trajectories: folders with a pose file or images of one of the two releases."""
    wanted = {f"pose_{c}.txt" for c in _CAMERAS} | {f"image_{c}" for c in _CAMERAS}
    for folder in find_folders(source, lambda names: not names.isdisjoint(wanted)):
        parts = (source.resolve().name, *folder.relative_to(source).parts)[-3:]
        name = scene_name(*parts)
        yield SceneEntry(name, partial(_load, folder), (name, "/".join(parts)))


def _load(folder: Path) -> Scene:
    camera = next((c for c in _CAMERAS if (folder / f"image_{c}").is_dir()), None)
    if camera is None:
        raise AbsentScene("no images: neither image_left nor image_lcam_front")
    frames = ImageFiles(list_images(folder / f"image_{camera}"))
    file = folder / f"pose_{camera}.txt"
    if not file.is_file():
        raise BadScene(f"no cameras: {file.name} is missing")
    with reading(file.name):
        rows = read_rows(file.read_text().splitlines(), "tx ty tz qx qy qz qw")
    if len(rows) != len(frames):
        raise BadScene(f"{len(frames)} images for {len(rows)} poses")
    width, height = frames.size()
    intrinsics = pinhole(width / 2, width / 2, width / 2, height / 2)
    return Scene(
        frames,
        _world_to_camera(rows, file.name),
        np.tile(intrinsics, (len(rows), 1, 1)),
        depth=_depth(folder / f"depth_{camera}", len(rows)),
    )


def _world_to_camera(rows: NDArray[np.float64], name: str) -> Floats:  # [F, 7] -> [F, 4, 4]
    norms = np.linalg.norm(rows[:, 3:], axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1.0) < 1e-2) | ~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise BadScene(
            f"{name}: the pose of frame {bad[0]} is not finite or its quaternion has no length of 1"
        )
    c2w = np.tile(np.eye(4), (len(rows), 1, 1))
    c2w[:, :3, :3] = NED_TO_OPENCV @ Rotation.from_quat(rows[:, 3:]).as_matrix() @ NED_TO_OPENCV.T
    c2w[:, :3, 3] = rows[:, :3] @ NED_TO_OPENCV.T
    return invert(c2w)


def _depth(folder: Path, count: int) -> DepthMaps | None:
    if not folder.is_dir():
        return None
    with reading(folder.name):
        files = sorted(path for path in folder.iterdir() if path.suffix in _DEPTH_SUFFIXES)
    if len(files) != count:
        raise BadScene(f"{len(files)} depth maps for {count} frames")
    return DepthMaps(lambda index: _read_depth(files[index]))


def _read_depth(path: Path) -> Depth:
    with reading(path.name):
        if path.suffix == ".png":
            with Image.open(path) as image:
                if image.mode != "RGBA":
                    raise ValueError(f"depth of mode {image.mode}, not four channels of 8 bits")
                channels = np.asarray(image)[..., [2, 1, 0, 3]]
            depth = np.ascontiguousarray(channels).view("<f4")[..., 0].astype(np.float32)
        else:
            loaded = np.load(path, allow_pickle=False)
            depth = np.asarray(loaded[loaded.files[0]] if path.suffix == ".npz" else loaded)
            depth = depth.astype(np.float32)
        if depth.ndim != 2:
            raise ValueError(f"depth of shape {depth.shape}")
    return np.where(depth < SKY, depth, np.float32(0.0))
