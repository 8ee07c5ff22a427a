"""One scene of a data set: a folder with ``transforms.json`` and ``images/``.

``transforms.json`` holds ``frames``, each with its own w, h, fl_x, fl_y, cx, cy (pixels of the
stored image), ``file_path`` (its last part names a file of ``images/``) and ``transform_matrix``
(camera to world, OpenCV axes).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gen3r.cameras import crop_intrinsics, relative_poses
from gen3r.conditioning import resize_center_crop

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# What PIL raises: OSError for missing, truncated and foreign files, the next two for broken chunks
# of a PNG, the last for one that claims to be enormous.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class SceneFrame:
    """One entry of ``transforms.json``: file name, size, focal lengths, centre in pixels, pose."""

    name: str
    source: tuple[int, int]  # height, width
    focal: tuple[float, float]  # fl_x, fl_y
    center: tuple[float, float]  # cx, cy
    c2w: tuple[tuple[float, ...], ...]  # 4 x 4


@dataclass(frozen=True)
class Clip:
    """Frames and cameras of one training sample.

    frames : [F, 3, H, W] float32 in [0, 1]
    c2w : [F, 4, 4] float32, relative to the first frame
    intrinsics : [F, 3, 3] float32, pixels of the cropped frames
    names : F file names; an unreadable file is left out and the last one repeated in its stead
    unreadable : names of the files that could not be read
    """

    frames: Tensor
    c2w: Tensor
    intrinsics: Tensor
    names: tuple[str, ...]
    unreadable: tuple[str, ...] = ()


def read_transforms(path: Path) -> list[SceneFrame]:
    """The frames of a ``transforms.json``, in its order.

    Raises
    ------
    ValueError : not JSON, no frames, a frame without one of the fields, or a pose that is not 4 x
        4.
    OSError : the file cannot be read.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["frames"]
        frames = [_scene_frame(entry) for entry in entries]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: {type(error).__name__} {error}; every frame needs w, h, fl_x, fl_y, cx, cy, "
            "file_path and transform_matrix"
        ) from error
    if not frames:
        raise ValueError(f"{path} lists no frames")
    for frame in frames:
        if [len(row) for row in frame.c2w] != [4, 4, 4, 4]:
            raise ValueError(f"{path}: transform_matrix of {frame.name} is not 4 x 4")
    return frames


def _scene_frame(entry: dict[str, Any]) -> SceneFrame:
    return SceneFrame(
        name=PurePosixPath(entry["file_path"]).name,
        source=(int(entry["h"]), int(entry["w"])),
        focal=(float(entry["fl_x"]), float(entry["fl_y"])),
        center=(float(entry["cx"]), float(entry["cy"])),
        c2w=tuple(tuple(float(v) for v in row) for row in entry["transform_matrix"]),
    )


def list_images(folder: Path) -> list[str]:
    """Names of the image files of a folder, sorted.

    Raises
    ------
    ValueError : there are none. OSError : the folder cannot be read.
    """
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise ValueError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return names


def frame_indices(
    total: int,
    count: int,
    stride: int = 1,
    start: int | None = None,
    repeat_last: bool = True,
    rng: random.Random | None = None,
) -> list[int]:
    """Which of `total` frames make up a clip of `count` frames.

    Every `stride`-th frame; every frame where that many are not there. When even those are too few,
    all from the start, with the last one repeated (`repeat_last`) or a shorter clip.

    Parameters
    ----------
    start : index of the first frame; None draws it so that the clip fits.

    Raises
    ------
    ValueError : total, count or stride below 1, or a start outside the frames.
    """
    for name, value in (("total", total), ("count", count), ("stride", stride)):
        if value < 1:
            raise ValueError(f"frame_indices: {name} {value} must be at least 1")
    if start is not None and not 0 <= start < total:
        raise ValueError(f"frame_indices: start {start} must lie in 0..{total - 1}")
    if (start or 0) + (count - 1) * stride >= total:
        stride = 1
    if start is None:
        latest = max(0, total - 1 - (count - 1) * stride)
        start = (rng or random.Random()).randint(0, latest)
    chosen = list(range(start, total, stride))[:count]
    return chosen + [chosen[-1]] * (count - len(chosen)) if repeat_last else chosen


def load_frames(
    paths: Sequence[Path],
    height: int,
    width: int,
) -> tuple[Tensor, list[int]]:  # [N, 3, height, width] float32 in [0, 255], unreadable positions
    """Read, resize (bilinear, antialiased, to cover) and centre-crop images.

    Unreadable files are left out of the frames; their positions in `paths` are returned.

    Raises
    ------
    ValueError : none can be read.
    """
    frames: list[Tensor] = []
    unreadable: list[int] = []
    for position, path in enumerate(paths):
        try:
            with Image.open(path) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB")))
        except UNREADABLE:
            unreadable.append(position)
            continue
        planes = pixels.permute(2, 0, 1)[None].float()
        frames.append(resize_center_crop(planes, height, width))
    if not frames:
        raise ValueError(f"none of {len(paths)} images can be read, the first is {paths[:1]}")
    return torch.cat(frames), unreadable


def read_cameras(
    frames: Sequence[SceneFrame],
    size: int,
) -> tuple[Tensor, Tensor]:  # c2w [F, 4, 4] relative to the first, intrinsics [F, 3, 3]; float32
    """Cameras of the frames after resizing and cropping to size x size."""
    c2w = relative_poses(torch.tensor([frame.c2w for frame in frames], dtype=torch.float32))
    intrinsics = [crop_intrinsics(f.source, f.focal, f.center, size) for f in frames]
    return c2w, torch.stack(intrinsics)


def load_clip(
    scene: Path,
    count: int,
    size: int,
    stride: int = 1,
    start: int | None = None,
    limit: int | None = None,
    repeat_last: bool = True,
    rng: random.Random | None = None,
) -> Clip:
    """Read `count` frames of a scene folder with their cameras.

    Parameters
    ----------
    limit : use only the first so many frames of the scene; None uses all.

    Raises
    ------
    ValueError : a bad ``transforms.json``, frame numbers as in `frame_indices`, no readable image.
    OSError : the folder cannot be read.
    """
    listed = read_transforms(scene / "transforms.json")[:limit]
    chosen = [listed[i] for i in frame_indices(len(listed), count, stride, start, repeat_last, rng)]
    # A repeated last frame is read once.
    distinct = list(dict.fromkeys(chosen))
    pixels, bad = load_frames([scene / "images" / f.name for f in distinct], size, size)
    kept = [frame for i, frame in enumerate(distinct) if i not in bad]
    wanted = len(chosen) if repeat_last else len(kept)
    order = [min(i, len(kept) - 1) for i in range(wanted)]
    c2w, intrinsics = read_cameras([kept[i] for i in order], size)
    names = tuple(kept[i].name for i in order)
    return Clip(pixels[order] / 255, c2w, intrinsics, names, tuple(distinct[i].name for i in bad))
