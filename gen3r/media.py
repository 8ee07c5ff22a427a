"""Files in: images, videos and camera JSON. `gen3r.writers` writes results.

Everything a person can hand in is read here, and whatever is wrong with it becomes one `InputError`
that says what is wrong and how to mend it. torch is imported only by the functions that need it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from gen3r.scene import Cameras

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")


class InputError(ValueError):
    """A file or value from the user that can not be used; the text says how to mend it."""


# ---------------------------------------------------------------------------------- reading images


def load_image(path: str | Path) -> np.ndarray:
    """Read one image as uint8 RGB [H, W, 3].

    The EXIF orientation is applied. Grey becomes three equal channels, 16-bit grey is scaled to 8
    bits. Transparency is composited on white (upstream drops alpha, which uncovers hidden colours).

    Raises
    ------
    InputError : no such file, an empty one, or one that is not an image.
    """
    path = Path(path)
    _require_file(path, "image")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image; give a PNG, JPEG or WebP file") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} is damaged ({_first_line(error)}); open it in a viewer and save it again"
        ) from error
    return to_rgb(image)


def to_rgb(image: Image.Image) -> np.ndarray:  # [H, W, 3] uint8
    """Three channels: grey repeated, 16-bit grey scaled to 8 bits, transparency laid on white."""
    if image.mode.startswith(("I", "F")):
        wide = np.asarray(image, dtype=np.float64)
        full = 65535.0 if wide.max(initial=0.0) > 255 else 255.0
        image = Image.fromarray((wide.clip(0, full) * (255.0 / full)).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _require_file(path: Path, kind: str) -> None:
    if not path.exists():
        raise InputError(f"{kind} {path} does not exist; check the path")
    if not path.is_file():
        raise InputError(f"{kind} {path} is not a file; check the path")
    if not os.access(path, os.R_OK):
        raise InputError(f"{kind} {path} can not be read; check its permissions")
    if path.stat().st_size == 0:
        raise InputError(f"{kind} {path} is empty (0 bytes); copy or download it again")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ------------------------------------------------------------------------------------ reading views


@dataclass(frozen=True)
class Views:
    """Conditioning views as read from disk.

    frames : uint8 RGB [H, W, 3] each; sizes may differ between image files.
    kind : "image" (1 or 2 files), "folder" or "video".
    sources : the files they came from, for the record.
    """

    frames: list[np.ndarray]
    kind: str
    sources: list[str]


def load_views(
    paths: Sequence[str | Path], *, stride: int = 1, max_frames: int | None = None
) -> Views:
    """Read one image, two images, a folder of images (natural order), or a video.

    Parameters
    ----------
    stride : take every stride-th frame of a folder or video.
    max_frames : stop after this many frames of a folder or video; None reads all.

    Raises
    ------
    InputError : nothing readable there, with the file's name and what to do.
    """
    if stride < 1:
        raise InputError(f"stride {stride} is below 1; use 1 to take every frame")
    given = [Path(p) for p in paths]
    if not given or len(given) > 2:
        raise InputError(
            f"{len(given)} paths given; give 1 image, 2 images, a folder of images or a video"
        )
    if len(given) == 1 and given[0].is_dir():
        files = image_files(given[0])[::stride][:max_frames]
        return Views([load_image(f) for f in files], "folder", [str(f) for f in files])
    if len(given) == 1 and given[0].suffix.lower() in VIDEO_SUFFIXES:
        frames = load_video(given[0], stride=stride, max_frames=max_frames)
        return Views(frames, "video", [str(given[0])])
    for path in given:
        if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES:
            raise InputError(f"{path} is not an image; two paths must be two image files")
    return Views([load_image(p) for p in given], "image", [str(p) for p in given])


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder in natural order (2.png before 10.png). InputError when none."""
    files = [
        f
        for f in folder.iterdir()
        if f.is_file() and f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")
    ]
    if not files:
        raise InputError(
            f"folder {folder} holds no images; put {', '.join(IMAGE_SUFFIXES[:4])} files there"
        )
    return sorted(files, key=lambda f: _natural_key(f.name))


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name.lower())
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]


def load_video(
    path: str | Path, *, stride: int = 1, max_frames: int | None = None
) -> list[np.ndarray]:
    """Decode every stride-th frame of a video as uint8 RGB [H, W, 3], at most max_frames of them.

    Raises
    ------
    InputError : no such file, an empty one, not a video, or a video without frames.
    """
    import av

    path = Path(path)
    _require_file(path, "video")
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no video track; re-encode it as H.264 MP4")
            for index, frame in enumerate(container.decode(video=0)):
                if index % stride == 0:
                    frames.append(frame.to_ndarray(format="rgb24"))
                if max_frames is not None and len(frames) >= max_frames:
                    break
    except av.FFmpegError as error:
        raise InputError(
            f"video {path} can not be decoded ({_first_line(error)}); re-encode it as H.264 MP4"
        ) from error
    if not frames:
        raise InputError(f"video {path} has no frames; re-encode it as H.264 MP4")
    return frames


# ------------------------------------------------------------------------------------------ cameras


def read_cameras(path: str | Path) -> Cameras:
    """Read a camera path: JSON with ``extrinsics`` F x 4 x 4 and ``intrinsics`` F x 3 x 3.

    Extrinsics map world to camera (OpenCV axes); intrinsics are in pixels of the prepared frames;
    both are read as float64 (behaviour 17 of upstream).

    Raises
    ------
    InputError : not JSON, a missing key, a matrix of another shape, NaN, or no inverse.
    """
    from gen3r.scene import Cameras

    path = Path(path)
    _require_file(path, "camera file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"camera file {path} is not valid JSON ({_first_line(error)}); "
            "it must hold 'extrinsics' and 'intrinsics'"
        ) from error
    if not isinstance(data, dict):
        raise InputError(f"camera file {path} must hold one JSON object with two lists of matrices")
    matrices = {}
    for key, size in (("extrinsics", 4), ("intrinsics", 3)):
        if key not in data:
            raise InputError(
                f"camera file {path} has no '{key}'; give one {size} x {size} matrix per frame"
            )
        matrices[key] = _matrices(path, key, data[key], size)
    try:
        return Cameras(**matrices)
    except ValueError as error:
        raise InputError(f"camera file {path}: {error}; correct that matrix") from error


def _matrices(path: Path, key: str, rows: Any, size: int) -> Any:
    import torch

    if not isinstance(rows, list) or not rows:
        raise InputError(f"camera file {path}: '{key}' must be a list with one matrix per frame")
    out = np.empty((len(rows), size, size), dtype=np.float64)
    for frame, row in enumerate(rows):
        try:
            matrix = np.array(row, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"camera file {path}: {key} of frame {frame} is not a matrix of numbers; "
                f"give {size} rows of {size} numbers"
            ) from error
        if matrix.shape != (size, size):
            shape = " x ".join(map(str, matrix.shape)) or "a single number"
            raise InputError(
                f"camera file {path}: {key} of frame {frame} is {shape}, not {size} x {size}; "
                f"give {size} rows of {size} numbers"
            )
        out[frame] = matrix
    return torch.from_numpy(out)
