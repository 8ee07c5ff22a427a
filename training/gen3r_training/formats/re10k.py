"""RealEstate10K: camera files as published, frames as images or as the videos they come from.

Camera file ``ID.txt``: the video's address, then one line a frame:

    timestamp  fx fy cx cy  k1 k2  r11 r12 r13 t1  r21 r22 r23 t2  r31 r32 r33 t3

timestamp : microseconds from the start of the video
fx, fy, cx, cy : over width (fx, cx) and height (fy, cy), so that they hold for any size of the
    frames; 0.5 is the middle of the image: the corner of the first pixel is at 0
k1, k2 : 0 in what was published; a file where they are not is refused
r, t : world to camera, OpenCV axes, up to the scale of the reconstruction

The release has no frames. They are looked for beside the camera file and in SRC, frames, images,
rgb, dataset, videos, video_clips and clips, each with and without the split's folder (train, test):

    ID/TIMESTAMP.png     images by timestamp (anything before a "_" is ignored), or as many images
                         as there are lines, in the order of the numbers in their names
    ID.mp4               a clip of this scene: a picture a line, or long enough for the timestamps
    YOUTUBE_ID.mp4       the whole video, read at the timestamps
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import numpy as np
from numpy.typing import NDArray

from gen3r_training.formats.cameras import checked_poses, pinhole, to_4x4
from gen3r_training.formats.scene import (
    AbsentScene,
    BadScene,
    Floats,
    FrameSource,
    ImageFiles,
    Scene,
    SceneEntry,
    list_images,
    read_rows,
    reading,
    scene_name,
)
from gen3r_training.formats.video import VIDEO_SUFFIXES, VideoFrames, video_facts

_CAMERA_FOLDERS = (
    *("", "RealEstate10K", "realestate10k", "cameras", "poses", "pose_files"),
    *("metadata", "annotations"),
)
_FRAME_FOLDERS = (
    *("", "frames", "images", "rgb", "dataset", "data", "videos", "video_clips", "clips"),
)
_SPLITS = {"": None, "train": "train", "test": "val", "val": "val", "validation": "val"}
_PUBLISHED_NAME = re.compile(r"[0-9a-f]{16}")
_COLUMNS = "time fx fy cx cy k1 k2 r11 r12 r13 t1 r21 r22 r23 t2 r31 r32 r33 t3"


def find(source: Path) -> Iterator[SceneEntry]:
    """The camera files in SRC and its usual folders, with or without a folder for each split."""
    for base in _CAMERA_FOLDERS:
        for folder, split in _SPLITS.items():
            for path in sorted((source / base / folder).glob("*.txt")):
                if _is_camera_file(path):
                    name = scene_name(path.stem)
                    load = partial(_load, source, path, folder)
                    yield SceneEntry(name, load, (path.stem, name), split)


def _is_camera_file(path: Path) -> bool:
    if _PUBLISHED_NAME.fullmatch(path.stem):
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"http"
    except OSError:
        return False


def _load(source: Path, path: Path, split: str) -> Scene:
    with reading(path.name):
        address, *lines = path.read_text(encoding="utf-8").strip().splitlines() or [""]
        values = read_rows(lines, _COLUMNS)
        times = [int(time) for time in values[:, 0]]
    if sorted(set(times)) != times:
        raise BadScene(f"{path.name}: the timestamps do not ascend")
    if np.any(values[:, 5:7]):
        raise BadScene(f"{path.name}: k1, k2 are not 0; undistort the frames first")
    bases = [path.parent]
    for name in _FRAME_FOLDERS:
        bases += [source / name / split, source / name] if split else [source / name]
    frames = _frames(bases, path.stem, _youtube_id(address), times)
    return Scene(
        frames,
        checked_poses(to_4x4(values[:, 7:].reshape(-1, 3, 4))),
        _intrinsics(values[:, 1:5], frames.size()),
    )


def _intrinsics(
    relative: NDArray[np.float64],  # [F, 4] fx, fy, cx, cy over width and height
    size: tuple[int, int],
) -> Floats:
    width, height = size
    scaled = relative * np.array([width, height, width, height])
    return np.stack([pinhole(*row) for row in scaled])


def _youtube_id(address: str) -> str:
    parts = urlparse(address.strip())
    return parse_qs(parts.query).get("v", [parts.path.rsplit("/", 1)[-1]])[0]


def _frames(bases: list[Path], name: str, video: str, times: list[int]) -> FrameSource:
    for base in bases:
        if (base / name).is_dir():
            return _images(base / name, times)
        for suffix in VIDEO_SUFFIXES:
            if (clip := base / f"{name}{suffix}").is_file():
                return _clip(clip, times)
            if video and (whole := base / f"{video}{suffix}").is_file():
                return VideoFrames(whole, len(times), tuple(times))
    raise AbsentScene(f"no frames: neither {name}/ nor {name}.mp4 nor {video or 'ID'}.mp4")


def _images(folder: Path, times: list[int]) -> FrameSource:
    numbered = {
        int(digits[-1]): path
        for path in list_images(folder)
        if (digits := re.findall(r"\d+", path.stem))
    }
    if not numbered:
        raise AbsentScene(f"no images in {folder.name}/")
    missing = [time for time in times if time not in numbered]
    if not missing:
        return ImageFiles([numbered[time] for time in times])
    if len(missing) == len(times):
        # Not one name is a timestamp: images are numbered, so that their count has to agree.
        if len(numbered) == len(times):
            return ImageFiles([numbered[number] for number in sorted(numbered)])
        raise BadScene(f"{len(numbered)} images for {len(times)} cameras")
    raise BadScene(f"{len(missing)} of {len(times)} frames are missing, first {missing[0]}")


def _clip(path: Path, times: list[int]) -> FrameSource:
    facts = video_facts(path)
    if facts.frames == len(times):
        return VideoFrames(path, len(times))
    if facts.seconds * 1e6 > times[-1]:
        return VideoFrames(path, len(times), tuple(times))
    raise BadScene(
        f"{path.name} has {facts.frames} frames for {len(times)} cameras, and ends before the last"
    )
