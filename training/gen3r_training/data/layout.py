"""The layout on disk: ``ROOT/{train,val}/SCENE/`` with frames, cameras, captions.

    frames/*.png|jpg|jpeg|webp    the frames, in the order of their names
    cameras.json                  "extrinsics": F x 4 x 4 (or 3 x 4) world to camera, OpenCV axes;
                                  "intrinsics": F x 3 x 3 (or one 3 x 3) in pixels of the stored
                                  frames, the centre of a frame of width w at w / 2;
                                  "frames": the F file names (optional; compared when there)
    prompt.txt                    captions, one a line (optional)
    depth/                        16-bit PNG of the same names and scale.json (optional)

Row i of the cameras belongs to the i-th frame by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SPLITS = ("train", "val")
ROTATION_TOLERANCE = 1e-2  # of R R^T; poses written with four digits are within 1e-3
HINT = "write the layout with: gen3r-engine prepare"


@dataclass(frozen=True)
class SceneFolder:
    """One scene, read and checked; its frames are not decoded.

    path : the scene's folder
    frames : file names in frames/, sorted
    extrinsics : [F, 4, 4] float64 world to camera
    intrinsics : [F, 3, 3] float64, pixels of the stored frames
    captions : lines of prompt.txt that are not blank, maybe none
    depth : the folder depth/, or None
    cameras_digest : sha256 of cameras.json, in hexadecimal
    """

    path: Path
    frames: tuple[str, ...]
    extrinsics: Tensor
    intrinsics: Tensor
    captions: tuple[str, ...]
    depth: Path | None
    cameras_digest: str

    def frame_paths(self, indices: Sequence[int]) -> list[Path]:
        """The files of some frames."""
        return [self.path / "frames" / self.frames[i] for i in indices]


def split_folder(root: Path, split: str) -> Path:
    """ROOT/SPLIT.

    Raises
    ------
    ValueError : an unknown split, a root that is no folder, or one without the split.
    """
    if split not in SPLITS:
        raise ValueError(f"split '{split}' is unknown; known: {', '.join(SPLITS)}")
    if not root.is_dir():
        raise ValueError(f"--data_root {root}: no such folder; {HINT}")
    folder = root / split
    if not folder.is_dir():
        is_split = root.name in SPLITS and any(_scene_folders(root))
        mend = f"give its parent {root.parent}" if is_split else HINT
        raise ValueError(f"--data_root {root} has no folder '{split}'; {mend}")
    return folder


def scene_paths(root: Path, split: str) -> list[Path]:
    """The scene folders of ROOT/SPLIT, by name; hidden ones are somebody's unfinished work.

    Raises
    ------
    ValueError : as `split_folder`, or no scenes.
    """
    folder = split_folder(root, split)
    found = sorted(_scene_folders(folder))
    if not found:
        raise ValueError(f"--data_root {root}: '{split}' holds no scenes; {HINT}")
    return found


def _scene_folders(folder: Path) -> Iterator[Path]:
    return (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def read_scene(path: Path) -> SceneFolder:
    """Read and check one scene's cameras and captions and list its frames.

    Raises
    ------
    ValueError : anything that does not fit the layout, in one line that begins with what is wrong.
    OSError : a file that is there cannot be read.
    """
    frames = _list_frames(path / "frames")
    file = path / "cameras.json"
    if not file.is_file():
        raise ValueError(f"no cameras.json in {path}")
    text = file.read_bytes()
    extrinsics, intrinsics, names = _parse_cameras(text, file)
    for what, count in (("extrinsics", len(extrinsics)), ("intrinsics", len(intrinsics))):
        if count != len(frames):
            raise ValueError(f"{len(frames)} frames but {count} {what} in {file}")
    if names is not None and names != frames:
        odd = next((a for a, b in zip(names, frames, strict=False) if a != b), "their number")
        raise ValueError(f"the frames that {file} lists are not those in frames/ ({odd})")
    depth = path / "depth"
    return SceneFolder(
        path,
        tuple(frames),
        torch.from_numpy(extrinsics),
        torch.from_numpy(intrinsics),
        _read_captions(path / "prompt.txt"),
        depth if depth.is_dir() else None,
        hashlib.sha256(text).hexdigest(),
    )


def _list_frames(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(SUFFIXES))
    if not names:
        raise ValueError(f"no images ({', '.join(SUFFIXES)}) in {folder}")
    return names


def _parse_cameras(
    text: bytes, file: Path
) -> tuple[np.ndarray, np.ndarray, list[str] | None]:  # [F, 4, 4], [F, 3, 3] float64, names
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} does not hold an object")
    extrinsics = _numbers(values, "extrinsics", file)
    intrinsics = _numbers(values, "intrinsics", file)
    if extrinsics.ndim != 3 or extrinsics.shape[1:] not in ((3, 4), (4, 4)):
        raise ValueError(f"extrinsics of {list(extrinsics.shape)} in {file}; give F x 4 x 4")
    if intrinsics.shape == (3, 3):
        intrinsics = np.repeat(intrinsics[None], len(extrinsics), axis=0)
    if intrinsics.ndim != 3 or intrinsics.shape[1:] != (3, 3):
        raise ValueError(f"intrinsics of {list(intrinsics.shape)} in {file}; give F x 3 x 3")
    _check_cameras(extrinsics, intrinsics, file)
    poses = np.tile(np.eye(4), (len(extrinsics), 1, 1))
    poses[:, :3] = extrinsics[:, :3]
    names = values.get("frames")
    if names is not None and not isinstance(names, list):
        raise ValueError(f"'frames' in {file} is no list of names")
    return poses, intrinsics, names


def _numbers(values: dict[str, Any], name: str, file: Path) -> np.ndarray:
    if name not in values:
        raise ValueError(f"{file} lacks '{name}'")
    try:
        array = np.array(values[name], dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{name}' in {file} is no array of numbers ({error})") from error
    if not np.isfinite(array).all():
        raise ValueError(f"'{name}' in {file} has values that are not finite")
    return array


def _check_cameras(extrinsics: np.ndarray, intrinsics: np.ndarray, file: Path) -> None:
    rotation = extrinsics[:, :3, :3]
    product = rotation @ rotation.transpose(0, 2, 1)
    proper = np.abs(product - np.eye(3)).max(axis=(1, 2)) < ROTATION_TOLERANCE
    proper &= np.linalg.det(rotation) > 0
    if extrinsics.shape[1] == 4:
        proper &= np.abs(extrinsics[:, 3] - [0, 0, 0, 1]).max(axis=-1) < ROTATION_TOLERANCE
    if not proper.all():
        raise ValueError(f"extrinsics {int(proper.argmin())} in {file} is no rigid motion")
    focal = (intrinsics[:, 0, 0] > 0) & (intrinsics[:, 1, 1] > 0)
    if not focal.all():
        raise ValueError(f"intrinsics {int(focal.argmin())} in {file}: focal lengths must be > 0")


def _read_captions(file: Path) -> tuple[str, ...]:
    if not file.is_file():
        return ()
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason})") from error
    return tuple(line for line in text.splitlines() if line.strip())
