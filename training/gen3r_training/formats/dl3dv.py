"""DL3DV-10K: nerfstudio folders, ``transforms.json`` beside images at a fraction of their size.

    SCENE/transforms.json                 or SCENE/nerfstudio/transforms.json (the benchmark)
    SCENE/images_4/frame_00001.png        960P; or images_8 (480P), images_2 (2K), images (4K)

transform_matrix : camera to world, OpenGL axes (x right, y up, z backward)
w, h, fl_x, fl_y, cx, cy : of the full-size image, from COLMAP: the corner of the first pixel is at
    0, so that they are multiplied by stored size over (w, h)
k1, k2, p1, p2 : OpenCV's distortion. It is left in the frames where it moves no pixel by more than
    `distortion.IGNORED_PIXELS`, else the frames are resampled to a pinhole camera.
file_path : only its name counts. Images without a pose were not registered and are left out; a
    pose without an image makes the scene corrupt.

The first of images_4, images_8, images_2 and images that is there is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from gen3r_training.formats.cameras import (
    OPENGL_TO_OPENCV,
    checked_poses,
    invert,
    pinhole,
    to_4x4,
)
from gen3r_training.formats.scene import (
    NO_DISTORTION,
    AbsentScene,
    BadScene,
    Floats,
    ImageFiles,
    Scene,
    SceneEntry,
    find_folders,
    list_images,
    reading,
    scene_name,
)

_IMAGES = ("images_4", "images_8", "images_2", "images")
_CAMERAS = "transforms.json"
# Of the benchmark: the same frames once more, undistorted, with COLMAP's files.
_OTHER = ("gaussian_splat", "colmap", "cache")
_PINHOLE_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE")
_ASPECT = 0.01  # by how much the stored images' aspect ratio may differ (rounded sizes)


def find(source: Path) -> Iterator[SceneEntry]:
    """Folders with a ``transforms.json`` or images."""
    for folder in find_folders(source, _is_scene, _OTHER):
        key = folder.parent.name if folder.name == "nerfstudio" else folder.name
        yield SceneEntry(scene_name(key), partial(_load, folder), (key,))


def _is_scene(names: set[str]) -> bool:
    return _CAMERAS in names or not names.isdisjoint(_IMAGES)


def _load(folder: Path) -> Scene:
    if not (folder / _CAMERAS).is_file():
        raise BadScene(f"no cameras: {_CAMERAS} is missing")
    with reading(_CAMERAS):
        content = json.loads((folder / _CAMERAS).read_text(encoding="utf-8"))
        entries = sorted(content["frames"], key=lambda e: PurePosixPath(e["file_path"]).name)
        model = content.get("camera_model", "OPENCV")
        if model not in _PINHOLE_MODELS:
            raise ValueError(f"camera_model {model} is not one of {', '.join(_PINHOLE_MODELS)}")
        distortion = _distortion(content, entries)
        matrices = np.array([entry["transform_matrix"] for entry in entries], dtype=np.float64)
        if matrices.ndim != 3 or matrices.shape[1:] not in ((4, 4), (3, 4)):
            raise ValueError(f"transform_matrix {matrices.shape[1:]} is not 4 x 4")
    frames = _frames(folder, [PurePosixPath(entry["file_path"]).stem for entry in entries])
    with reading(_CAMERAS):
        intrinsics = [_intrinsics({**content, **entry}, frames.size()) for entry in entries]
    # Camera axes turn from OpenGL's to OpenCV's on the right; the world stays as it is.
    poses = invert(checked_poses(to_4x4(matrices)) @ OPENGL_TO_OPENCV)
    return Scene(frames, poses, np.stack(intrinsics), distortion)


def _distortion(
    content: dict[str, Any], entries: list[dict[str, Any]]
) -> tuple[float, float, float, float]:
    for name in ("k3", "k4", "k5", "k6"):
        if any(float(part.get(name, 0.0)) for part in (content, *entries)):
            raise ValueError(f"the distortion {name} is not supported")
    values = {
        tuple(float(entry.get(name, content.get(name, 0.0))) for name in ("k1", "k2", "p1", "p2"))
        for entry in entries
    }
    if len(values) > 1:
        raise ValueError("frames with different distortions are not supported")
    k1, k2, p1, p2 = values.pop() if values else NO_DISTORTION
    if not np.isfinite((k1, k2, p1, p2)).all():
        raise ValueError("the distortion is not finite")
    return k1, k2, p1, p2


def _frames(folder: Path, stems: list[str]) -> ImageFiles:
    stored = next((folder / name for name in _IMAGES if (folder / name).is_dir()), None)
    if stored is None:
        raise AbsentScene(f"no images: none of {', '.join(_IMAGES)}")
    files = {path.stem: path for path in list_images(stored)}
    missing = [stem for stem in stems if stem not in files]
    if missing:
        lost = f"{len(missing)} of {len(stems)} frames are missing"
        raise BadScene(f"{lost} in {stored.name}, first {missing[0]}")
    return ImageFiles([files[stem] for stem in stems])


def _intrinsics(camera: dict[str, Any], size: tuple[int, int]) -> Floats:
    full = (float(camera["w"]), float(camera["h"]))
    across, down = size[0] / full[0], size[1] / full[1]
    if not abs(across / down - 1.0) <= _ASPECT:
        raise ValueError(
            f"images of {size[0]} x {size[1]} are no reduction of the {full[0]:g} x {full[1]:g} "
            "of the cameras"
        )
    return pinhole(
        float(camera["fl_x"]) * across,
        float(camera["fl_y"]) * down,
        float(camera["cx"]) * across,
        float(camera["cy"]) * down,
    )
