"""WildRGB-D: objects filmed with a phone, depth of its sensor, poses of a SLAM system.

    CATEGORY/scenes/scenes_000/rgb/00000.png
    CATEGORY/scenes/scenes_000/depth/00000.png       16 bits, millimetres, 0 = none
    CATEGORY/scenes/scenes_000/masks/00000.png       not read
    CATEGORY/scenes/scenes_000/metadata              JSON: w, h, K
    CATEGORY/scenes/scenes_000/cam_poses.txt         frame number, then 16 numbers, a line a frame
    CATEGORY/nvs_list.json                           {"train": ["scenes/scenes_000", ...], "val": }

K : nine numbers, column by column: fx 0 0 0 fy 0 cx cy 1 (a row-wise one is recognised by where its
    zeros are), in pixels of a w x h image as ARKit gives them: from the upper left corner of the
    frame
pose : camera to world, OpenCV axes, row by row, metres
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen3r_training.formats.cameras import checked_poses, invert, to_4x4
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

MILLIMETRE = 1e-3
_COLUMNS = "frame " + " ".join(f"m{row}{column}" for row in range(4) for column in range(4))


def find(source: Path) -> Iterator[SceneEntry]:
    """Scenes: folders with poses or frames; their split where nvs_list.json names them."""
    lists: dict[Path, dict[str, str]] = {}
    for folder in find_folders(source, lambda names: bool(names & {"cam_poses.txt", "rgb"})):
        category = folder.parent.parent if folder.parent.name == "scenes" else folder.parent
        if category not in lists:
            lists[category] = _published_splits(category / "nvs_list.json")
        name = scene_name(category.resolve().name, folder.name)
        keys = (name, f"{category.name}/{folder.name}", folder.name)
        split = lists[category].get(folder.name)
        yield SceneEntry(name, partial(_load, folder), keys, split)


def _published_splits(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    with reading(str(path)):
        lists = json.loads(path.read_text(encoding="utf-8"))
        return {
            name.rsplit("/", 1)[-1]: split
            for split in ("train", "val")
            for name in lists.get(split, [])
        }


def _load(folder: Path) -> Scene:
    if not (folder / "rgb").is_dir():
        raise AbsentScene("no images: rgb/ is missing")
    for name in ("cam_poses.txt", "metadata"):
        if not (folder / name).is_file():
            raise BadScene(f"no cameras: {name} is missing")
    with reading("cam_poses.txt"):
        rows = read_rows((folder / "cam_poses.txt").read_text().splitlines(), _COLUMNS)
    images = _by_number(folder / "rgb")
    numbers = [int(number) for number in rows[:, 0]]
    if sorted(numbers) != sorted(images):
        lost = sorted(set(numbers) ^ set(images))
        which = f"frame {lost[0]} has only one of the two" if lost else "a frame has two poses"
        raise BadScene(f"{len(images)} images for {len(numbers)} poses: {which}")
    order = np.argsort(rows[:, 0])
    frames = ImageFiles([images[numbers[index]] for index in order])
    with reading("metadata"):
        metadata = json.loads((folder / "metadata").read_text(encoding="utf-8"))
        intrinsics = _intrinsics(metadata, frames.size())
    return Scene(
        frames,
        invert(checked_poses(to_4x4(rows[order, 1:].reshape(-1, 4, 4)))),
        np.tile(intrinsics, (len(frames), 1, 1)),
        depth=_depth(folder / "depth", [numbers[index] for index in order]),
    )


def _by_number(folder: Path) -> dict[int, Path]:
    return {int(path.stem): path for path in list_images(folder) if path.stem.isdigit()}


def _intrinsics(metadata: dict[str, Any], size: tuple[int, int]) -> Floats:
    k = np.array(metadata["K"], dtype=np.float64).reshape(3, 3)
    k = k.T if k[2, 0] or k[2, 1] else k
    if k[2].tolist() != [0.0, 0.0, 1.0]:
        raise ValueError(f"K {metadata['K']} is no matrix of intrinsics")
    across, down = size[0] / float(metadata["w"]), size[1] / float(metadata["h"])
    if not abs(across / down - 1.0) <= 0.01:
        raise ValueError(f"images of {size} do not fit w {metadata['w']}, h {metadata['h']}")
    scaled: Floats = np.diag([across, down, 1.0]) @ k
    return scaled


def _depth(folder: Path, numbers: list[int]) -> DepthMaps | None:
    if not folder.is_dir():
        return None
    files = _by_number(folder)
    missing = [number for number in numbers if number not in files]
    if missing:
        raise BadScene(f"{len(missing)} depth maps are missing, first {missing[0]:05d}")
    return DepthMaps(lambda index: _read_depth(files[numbers[index]]), step=MILLIMETRE)


def _read_depth(path: Path) -> Depth:
    with reading(path.name), Image.open(path) as image:
        if not image.mode.startswith("I"):
            raise ValueError(f"depth of mode {image.mode}, not 16 bits")
        return np.asarray(image).astype(np.float32) * np.float32(MILLIMETRE)
