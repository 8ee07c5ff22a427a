"""Co3Dv2: objects filmed around, poses and depth of COLMAP, PyTorch3D's conventions.

    CATEGORY/frame_annotations.jgz, sequence_annotations.jgz       gzipped JSON lists
    CATEGORY/set_lists/set_lists_fewview_{train,dev,test}.json     {"train": [[SEQUENCE, ..]..], ..}
    CATEGORY/SEQUENCE/images/frame000001.jpg, depths/..., depth_masks/...

viewpoint : X_camera = X_world R + T with row vectors, axes x left, y up, z forward: transposed,
    and the first two rows change their signs
focal_length, principal_point : in one of two normalised spaces, both with the middle of the image
    at 0 and x to the left: `ndc_norm_image_bounds` has the image's borders at -1 and 1, so that the
    factor is half the width for x and half the height for y; `ndc_isotropic` takes half the shorter
    side for both. The borders are those of the pixels: the corner of the first is at 0.
depth : a 16-bit PNG whose values are the bits of float16; times scale_adjustment. Pixels that
    depth_masks has at 0 have none.

A sequence is in the split "val" when the few-view lists have it in val or test and never in train.
Sequences whose viewpoint_quality_score is below `min_quality` (many cameras of those are wrong) are
refused; one without a score is kept.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen3r_training.formats.cameras import checked_poses, pinhole
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
    reading,
    scene_name,
)

MIN_QUALITY = 0.5  # what preprocessing scripts of published models use
_FRAMES, _SEQUENCES = "frame_annotations.jgz", "sequence_annotations.jgz"
# x left, y up -> x right, y down.
_FLIP = np.diag([-1.0, -1.0, 1.0])

Entries = dict[str, list[dict[str, Any]]]


class _Annotations:
    """The frame annotations of the categories read last: a category's file is large."""

    def __init__(self, keep: int = 2) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Path, Entries] = OrderedDict()
        self._keep = keep

    def of(self, category: Path) -> Entries:
        """Frames by sequence, in the order of their numbers. Raises BadScene."""
        with self._lock:
            if category not in self._kept:
                self._kept[category] = _read_frames(category)
                while len(self._kept) > self._keep:
                    self._kept.popitem(last=False)
            return self._kept[category]


def find(source: Path, min_quality: float = MIN_QUALITY) -> Iterator[SceneEntry]:
    """The sequences of every category's annotations."""
    annotations = _Annotations()
    for category in find_folders(source, lambda names: bool(names & {_FRAMES, _SEQUENCES})):
        label = category.resolve().name
        try:
            with reading(_SEQUENCES):
                sequences = _read_jgz(category / _SEQUENCES)
                scores = {s["sequence_name"]: s.get("viewpoint_quality_score") for s in sequences}
            splits = _published_splits(category / "set_lists")
        except BadScene as error:
            yield SceneEntry(scene_name(label), partial(_refuse, error))
            continue
        for sequence, score in sorted(scores.items()):
            name = scene_name(label, sequence)
            load = partial(_load, annotations, category, sequence, score, min_quality)
            keys = (name, f"{label}/{sequence}", sequence)
            yield SceneEntry(name, load, keys, splits.get(sequence))


def _refuse(error: BadScene) -> Scene:
    raise error


def _read_jgz(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        content = json.load(file)
    if not isinstance(content, list):
        raise ValueError("not a list of annotations")
    return content


def _read_frames(category: Path) -> Entries:
    with reading(_FRAMES):
        found: Entries = defaultdict(list)
        for entry in _read_jgz(category / _FRAMES):
            kept = {key: entry.get(key) for key in ("frame_number", "image", "viewpoint", "depth")}
            found[entry["sequence_name"]].append(kept)
        for entries in found.values():
            entries.sort(key=lambda entry: entry["frame_number"])
        return dict(found)


def _published_splits(folder: Path) -> dict[str, str]:
    train, held_out = set[str](), set[str]()
    for path in sorted(folder.glob("set_lists_fewview_*.json")):
        with reading(path.name):
            lists = json.loads(path.read_text(encoding="utf-8"))
            train.update(row[0] for row in lists.get("train", []))
            held_out.update(row[0] for part in ("val", "test") for row in lists.get(part, []))
    return dict.fromkeys(train, "train") | dict.fromkeys(held_out - train, "val")


def _load(
    annotations: _Annotations,
    category: Path,
    sequence: str,
    score: float | None,
    min_quality: float,
) -> Scene:
    if not (category / sequence).is_dir():
        raise AbsentScene("no folder of this sequence")
    if score is not None and min_quality > 0 and not score >= min_quality:
        raise BadScene(f"viewpoint_quality_score {score:.3g} is below {min_quality:g}")
    entries = annotations.of(category).get(sequence)
    if not entries:
        raise BadScene(f"no frame in {_FRAMES}")
    with reading(_FRAMES):
        if any(entry["viewpoint"] is None for entry in entries):
            raise BadScene("no cameras: frames without a viewpoint")
        paths = [category.parent / entry["image"]["path"] for entry in entries]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise BadScene(f"{len(missing)} of {len(paths)} frames are missing, first {missing[0]}")
        frames = ImageFiles(paths)
        size = frames.size()
        poses = np.stack([world_to_camera(entry["viewpoint"]) for entry in entries])
        intrinsics = np.stack([_stored_intrinsics(entry, size) for entry in entries])
        depth = _depth(category.parent, entries)
    return Scene(frames, checked_poses(poses), intrinsics, depth=depth)


def world_to_camera(viewpoint: dict[str, Any]) -> Floats:
    """[4, 4] OpenCV world to camera of a PyTorch3D viewpoint."""
    pose = np.eye(4)
    pose[:3, :3] = _FLIP @ np.array(viewpoint["R"], dtype=np.float64).T
    pose[:3, 3] = _FLIP @ np.array(viewpoint["T"], dtype=np.float64)
    return pose


def intrinsics_in_pixels(viewpoint: dict[str, Any], width: int, height: int) -> Floats:
    """[3, 3] pixels of an image of this size, from either of the two normalised spaces."""
    space = str(viewpoint.get("intrinsics_format", "ndc_norm_image_bounds")).lower()
    half = np.array([width, height]) / 2.0
    if space == "ndc_norm_image_bounds":
        factor = half
    elif space == "ndc_isotropic":
        factor = np.full(2, half.min())
    else:
        raise ValueError(
            f"intrinsics_format {space} is neither ndc_norm_image_bounds nor ndc_isotropic"
        )
    focal = np.array(viewpoint["focal_length"], dtype=np.float64) * factor
    centre = half - np.array(viewpoint["principal_point"], dtype=np.float64) * factor
    return pinhole(focal[0], focal[1], centre[0], centre[1])


def _stored_intrinsics(entry: dict[str, Any], size: tuple[int, int]) -> Floats:
    """For the image as it is stored, should it have been resized since it was annotated."""
    height, width = entry["image"]["size"]
    across, down = size[0] / width, size[1] / height
    if not abs(across / down - 1.0) <= 0.01:
        raise ValueError(f"an image of {size[0]} x {size[1]} is annotated as {width} x {height}")
    stored: Floats = np.diag([across, down, 1.0]) @ intrinsics_in_pixels(
        entry["viewpoint"], width, height
    )
    return stored


def _depth(root: Path, entries: list[dict[str, Any]]) -> DepthMaps | None:
    found = [entry["depth"] for entry in entries if entry["depth"]]
    if len(found) != len(entries) or not any((root / item["path"]).exists() for item in found):
        return None  # annotated, not downloaded: depth is a part of its own
    return DepthMaps(lambda index: _read_depth(root, found[index]))


def _read_depth(root: Path, item: dict[str, Any]) -> Depth:
    with reading(Path(item["path"]).name), Image.open(root / item["path"]) as image:
        bits = np.asarray(image).astype(np.uint16)
        depth = bits.view(np.float16).astype(np.float32) * np.float32(item["scale_adjustment"])
    mask_path = root / item["mask_path"] if item.get("mask_path") else None
    if mask_path is not None and mask_path.is_file():
        with reading(mask_path.name), Image.open(mask_path) as mask:
            valid = np.asarray(mask.convert("L")) > 0
            if valid.shape != depth.shape:
                raise ValueError(f"a mask of {valid.shape} for a depth of {depth.shape}")
        depth = np.where(valid, depth, np.float32(0.0))
    return depth
