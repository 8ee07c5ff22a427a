"""What every format gives: scenes with frames, cameras and perhaps depth, each read when asked for.

Conventions of a `Scene`, whatever its source: extrinsics are world to camera with OpenCV axes (x
right, y down, z forward); intrinsics are in pixels of the frames as they are stored, with the
corner of the first pixel at (0, 0), so that its centre is at (0.5, 0.5) and a centred camera's
principal point is (w / 2, h / 2). In this convention a resized frame's intrinsics are multiplied by
the change of size, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Floats = NDArray[np.float64]
Depth = NDArray[np.float32]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NO_DISTORTION = (0.0, 0.0, 0.0, 0.0)

# What reading a damaged file raises: Pillow, json, gzip, numpy, or our own use of what they gave.
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError),
    *(ArithmeticError, EOFError, SyntaxError, struct.error, zlib.error),
    Image.DecompressionBombError,
)


class BadScene(Exception):
    """A scene that cannot be used; the text is the reason on one line."""


class AbsentScene(BadScene):
    """A scene that is listed and of which no file is there: not downloaded."""


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Errors of reading inside the block become a `BadScene` that names `what`."""
    try:
        yield
    except _UNREADABLE as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, KeyError):
            text = f"{error} is missing"
        elif isinstance(error, UnidentifiedImageError):  # its own text is an address in memory
            text = "no image, or a damaged one"
        raise BadScene(f"{what}: {' '.join(text.split()) or type(error).__name__}") from error


@dataclass(frozen=True)
class Frame:
    """One frame: the decoded image, and its file with the file's bytes unless it is of a video."""

    image: Image.Image
    path: Path | None = None
    data: bytes = b""


class FrameSource(Protocol):
    """The frames of a scene in order. Reading raises `BadScene`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Frame]: ...

    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the first frame."""
        ...


@dataclass(frozen=True)
class ImageFiles:
    """Frames that are files, one each."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Frame]:
        for path in self.paths:
            with reading(path.name):
                data = path.read_bytes()
                image = Image.open(BytesIO(data))
                image.load()  # decodes: a truncated file is found here, not during training
            yield Frame(image, path, data)

    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the first frame."""
        if not self.paths:
            raise BadScene("no frames")
        with reading(self.paths[0].name), Image.open(self.paths[0]) as image:
            return image.size


@dataclass(frozen=True)
class DepthMaps:
    """Depth along the optical axis, one map a frame.

    read : frame index -> [h, w] float32 in the unit of the poses; 0, NaN or infinite: none
    step : depth of one step where the source is stored in whole steps (written as it is), else None
    """

    read: Callable[[int], Depth]
    step: float | None = None


@dataclass(frozen=True)
class Scene:
    """One scene.

    extrinsics : [F, 4, 4] world to camera, OpenCV axes
    intrinsics : [F, 3, 3] pixels of the stored frames, corner of the first pixel at 0
    distortion : k1, k2, p1, p2 of OpenCV's model, the same for all frames
    """

    frames: FrameSource
    extrinsics: Floats
    intrinsics: Floats
    distortion: tuple[float, float, float, float] = NO_DISTORTION
    depth: DepthMaps | None = None


@dataclass(frozen=True)
class SceneEntry:
    """A scene that was found and not yet read.

    name : of the folder that is written
    keys : the names by which captions may call it, the first that matches counts
    split : "train" or "val" where the publisher says so
    load : reads the scene; raises `BadScene`
    """

    name: str
    load: Callable[[], Scene]
    keys: tuple[str, ...] = ()
    split: str | None = None


def scene_name(*parts: str) -> str:
    """A folder's name from the parts, with every character that is not plain replaced by "_"."""
    text = "_".join(part for part in parts if part)
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text).lstrip(".") or "scene"


def find_folders(
    source: Path, is_scene: Callable[[set[str]], bool], skip: Sequence[str] = (), depth: int = 6
) -> Iterator[Path]:
    """Folders at or below `source` whose entries' names satisfy `is_scene`, sorted by path.

    What lies inside a found folder, hidden folders and those named in `skip` are not entered.
    """
    with os.scandir(source) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    if is_scene({entry.name for entry in found}):
        yield source
        return
    for entry in found:
        if depth and entry.is_dir() and not entry.name.startswith(".") and entry.name not in skip:
            yield from find_folders(Path(entry.path), is_scene, skip, depth - 1)


def read_rows(lines: Sequence[str], columns: str) -> Floats:
    """[lines, columns] numbers of a text file's lines; blank ones do not count.

    columns : names of the columns, separated by spaces

    Raises
    ------
    ValueError : no line, another number of columns, or what is no number.
    """
    rows = [line.split() for line in lines if line.strip()]
    count = len(columns.split())
    for number, row in enumerate(rows, 1):
        if len(row) != count:
            raise ValueError(f"row {number} has {len(row)} columns, not {count}: {columns}")
    if not rows:
        raise ValueError("no line with a camera")
    return np.array([[float(text) for text in row] for row in rows])


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name; `BadScene` when it cannot be listed."""
    with reading(folder.name):
        return sorted(
            path
            for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        )
