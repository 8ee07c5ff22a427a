"""One scene in the layout that training reads.

SCENE/frames/000000.jpg ...     the frames; those that need no change are the source's files
SCENE/cameras.json              extrinsics F x 4 x 4 world to camera (OpenCV axes), intrinsics
                                F x 3 x 3 in pixels of the stored frames (corner of the first
                                pixel at 0), frames: their names
SCENE/prompt.txt                captions, one a line, where there are any
SCENE/depth/000000.png ...      16 bits, with scale.json: depth = scale * value, 0 = none
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from gen3r_training.formats.cameras import checked_intrinsics, checked_poses
from gen3r_training.formats.depth import find_scale, quantise, resized, write_scale
from gen3r_training.formats.distortion import IGNORED_PIXELS, Undistortion, largest_shift
from gen3r_training.formats.scene import BadScene, Depth, DepthMaps, Floats, Frame, Scene, reading

LINKS = ("symlink", "hardlink")
_JPEG = {"quality": 95, "subsampling": 0}  # of frames that have to be encoded anew


@dataclass(frozen=True)
class Written:
    """frames : their number. linked, undistorted, shrunk : how they came there."""

    frames: int
    linked: bool
    undistorted: bool
    shrunk: bool


@dataclass(frozen=True)
class _Plan:
    """How the frames of a scene change. `source` and `target` are width and height."""

    source: tuple[int, int]
    target: tuple[int, int]
    undistortion: Undistortion | None

    @classmethod
    def of(cls, scene: Scene, size: int | None) -> _Plan:
        source = scene.frames.size()
        target = source
        if size is not None and min(source) > size:
            factor = size / min(source)
            target = (round(source[0] * factor), round(source[1] * factor))
        undistortion = None
        if any(scene.distortion):
            intrinsics = scene.intrinsics
            if (np.abs(intrinsics - intrinsics[0]) > 1e-6).any():
                raise BadScene("frames with a distortion and different intrinsics")
            if largest_shift(intrinsics[0], source, scene.distortion) > IGNORED_PIXELS:
                undistortion = Undistortion.of(intrinsics[0], source, scene.distortion)
        return cls(source, target, undistortion)

    @property
    def unchanged(self) -> bool:
        return self.source == self.target and self.undistortion is None

    def intrinsics(self, values: Floats) -> Floats:  # [F, 3, 3]
        if self.undistortion is not None:
            values = np.tile(self.undistortion.intrinsics, (len(values), 1, 1))
        across, down = (t / s for t, s in zip(self.target, self.source, strict=True))
        scaled: Floats = np.diag([across, down, 1.0]) @ values
        return scaled

    def image(self, image: Image.Image) -> Image.Image:
        image = image.convert("RGB")
        if self.undistortion is not None:
            image = Image.fromarray(self.undistortion.image(np.asarray(image)))
        if self.source != self.target:
            image = image.resize(self.target, Image.Resampling.LANCZOS)
        return image

    def depth(self, depth: Depth) -> Depth:
        depth = resized(depth, self.source)
        if self.undistortion is not None:
            depth = self.undistortion.depth(depth)
        return resized(depth, self.target)


def write_scene(
    folder: Path,
    scene: Scene,
    *,
    captions: Sequence[str] = (),
    size: int | None = None,
    link: str | None = None,
    check: Callable[[], None] = lambda: None,
) -> Written:
    """Write a scene into an empty folder.

    Parameters
    ----------
    size : pixels of the short side; larger frames are shrunk to it, and the intrinsics with them
    link : one of `LINKS` for frames that stay as they are; None copies them
    check : called before every frame; what it raises ends the writing

    Raises
    ------
    BadScene : the scene is corrupt. OSError : the folder cannot be written.
    """
    count = len(scene.frames)
    for what, values in (("poses", scene.extrinsics), ("intrinsics", scene.intrinsics)):
        if len(values) != count:
            raise BadScene(f"{count} frames for {len(values)} {what}")
    if not count:
        raise BadScene("no frames")
    extrinsics = checked_poses(scene.extrinsics)
    checked_intrinsics(scene.intrinsics)
    plan = _Plan.of(scene, size)
    names, linked = _write_frames(folder / "frames", scene, plan, link, check)
    if scene.depth is not None:
        _write_depth(folder / "depth", scene.depth, names, plan, check)
    _write_cameras(folder / "cameras.json", extrinsics, plan.intrinsics(scene.intrinsics), names)
    if captions:
        (folder / "prompt.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return Written(count, linked, plan.undistortion is not None, plan.source != plan.target)


def _write_frames(
    folder: Path, scene: Scene, plan: _Plan, link: str | None, check: Callable[[], None]
) -> tuple[list[str], bool]:
    folder.mkdir()
    names: list[str] = []
    linked = False
    for index, frame in enumerate(scene.frames):
        check()
        if index == len(scene.frames):
            raise BadScene(f"more frames than the {len(scene.frames)} cameras")
        if frame.image.size != plan.source:
            raise BadScene(
                f"frame {index} has {frame.image.size} pixels, the first has {plan.source}"
            )
        if frame.path is None or not plan.unchanged:
            name, data = _encoded(index, frame, plan)
            (folder / name).write_bytes(data)
        else:
            name = f"{index:06d}{frame.path.suffix.lower()}"
            linked = _store(frame, frame.path, folder / name, link) or linked
        names.append(name)
    if len(names) != len(scene.frames):
        raise BadScene(f"{len(names)} frames for {len(scene.frames)} cameras")
    return names, linked


def _store(frame: Frame, source: Path, target: Path, link: str | None) -> bool:
    """Put the source's file at `target`; whether it is a link."""
    if link == "symlink":
        target.symlink_to(source.resolve())
    elif link == "hardlink":
        os.link(source.resolve(), target)
    else:
        target.write_bytes(frame.data)
    return link is not None


def _encoded(index: int, frame: Frame, plan: _Plan) -> tuple[str, bytes]:
    """A changed frame or one of a video: PNG where the source is PNG, else JPEG of high quality."""
    with reading(frame.path.name if frame.path else f"frame {index}"):
        image = plan.image(frame.image)
    buffer = BytesIO()
    if frame.path is not None and frame.path.suffix.lower() == ".png":
        image.save(buffer, "PNG", compress_level=1)
        return f"{index:06d}.png", buffer.getvalue()
    image.save(buffer, "JPEG", **_JPEG)
    return f"{index:06d}.jpg", buffer.getvalue()


def _write_depth(
    folder: Path,
    maps: DepthMaps,
    names: Sequence[str],
    plan: _Plan,
    check: Callable[[], None],
) -> None:
    scale = find_scale(maps, len(names), check)
    folder.mkdir()
    unknown = 0
    for index, name in enumerate(names):
        check()
        steps = quantise(plan.depth(maps.read(index)), scale)
        unknown += int((steps == 0).sum())
        Image.fromarray(steps).save(folder / f"{Path(name).stem}.png", compress_level=1)
    write_scale(folder, scale, unknown)


def _write_cameras(
    path: Path, extrinsics: Floats, intrinsics: Floats, names: Sequence[str]
) -> None:
    record = {
        "extrinsics": extrinsics.tolist(),
        "intrinsics": intrinsics.tolist(),
        "frames": list(names),
    }
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
