"""Clips of real data sets in the project's layout, with all that a generated scene is held against.

Which scenes and which frames of them are taken is a function of the seed and the scenes' names.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gen3r.cameras import invert_pose, relative_poses
from gen3r.conditioning import center_crop
from gen3r_training.data.dataset import read_clip
from gen3r_training.data.layout import SceneFolder, read_scene, scene_paths
from gen3r_training.data.samples import derive_seed


@dataclass(frozen=True)
class DataSet:
    """title : as the paper writes it. scenes : how many the paper draws. geometry : has depth."""

    title: str
    scenes: int
    geometry: bool


# Section 4.2 of the paper.
DATA_SETS = {
    "realestate10k": DataSet("RealEstate10K", 200, False),
    "dl3dv": DataSet("DL3DV-10K", 200, False),
    "co3d": DataSet("Co3Dv2", 300, True),
    "wildrgbd": DataSet("WildRGB-D", 300, True),
    "tartanair": DataSet("TartanAir", 80, True),
}
LEAST_DEPTH = 3  # pixels: fewer points do not fix an alignment
ALIASES = {"re10k": "realestate10k", "co3dv2": "co3d"}


@dataclass(frozen=True)
class ClipPlace:
    """A clip that was chosen and not yet read: rows are frame numbers of the scene."""

    dataset: str
    scene: SceneFolder
    rows: tuple[int, ...]

    @property
    def name(self) -> str:
        """The scene's folder name."""
        return self.scene.path.name


@dataclass(frozen=True)
class Truth:
    """What a clip really shows.

    frames : [F, 3, S, S] float32 in [0, 1]
    w2c : [F, 4, 4] float64, the world is the first camera, in the data set's own unit
    intrinsics : [F, 3, 3] float64, pixels of the cropped frames
    depth : [F, S, S] float32 along the optical axis, 0: none; None where the scene has no depth
    prompt : the scene's first caption, or ""
    """

    frames: Tensor
    w2c: Tensor
    intrinsics: Tensor
    depth: Tensor | None
    prompt: str


def parse_roots(texts: Sequence[str]) -> dict[str, Path]:
    """Data roots by data set, from ``NAME=DIR`` each.

    Raises
    ------
    ValueError : another form, an unknown or repeated name, or no such folder.
    """
    roots: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        key = ALIASES.get(name.strip().lower(), name.strip().lower())
        if not equals or key not in DATA_SETS:
            raise ValueError(f"--data '{text}' is not NAME=DIR; names: {', '.join(DATA_SETS)}")
        if key in roots:
            raise ValueError(f"--data names {key} twice; give one folder of it")
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise ValueError(f"--data {key}: no folder {root}; gen3r-engine prepare writes it")
        roots[key] = root
    return roots


class Draw:
    """Up to `count` scenes of a data set in an order drawn by the seed, and a clip of each.

    A scene that is too short or does not fit the layout gives its place to the next one, and so
    does one that `leave_out` is called with.

    Attributes
    ----------
    clips : those that are taken. left_out : scenes that are not, by name, with the reason.

    Raises
    ------
    ValueError : no split, no scenes, or none that can be used.
    """

    def __init__(
        self,
        dataset: str,
        root: Path,
        split: str,
        *,
        count: int,
        frames: int,
        stride: int,
        seed: int,
    ) -> None:
        def place(path: Path) -> int:
            return derive_seed("paper", seed, dataset, path.name)

        self.dataset, self.clips, self.left_out = dataset, list[ClipPlace](), dict[str, str]()
        self._frames, self._stride, self._seed = frames, stride, seed
        self._rest = iter(sorted(scene_paths(root, split), key=place))
        while len(self.clips) < count and self._next() is not None:
            pass
        self._check()

    def leave_out(self, clip: ClipPlace, reason: str) -> ClipPlace | None:
        """Take another scene in place of this one, which cannot be used; None: there is none.

        Raises
        ------
        ValueError : it was the last one.
        """
        self.clips.remove(clip)
        self.left_out[clip.name] = reason
        found = self._next()
        self._check()
        return found

    def _next(self) -> ClipPlace | None:
        for path in self._rest:
            try:
                scene = read_scene(path)
                rows = _rows(scene, self._frames, self._stride, self._seed)
            except (ValueError, OSError) as error:
                self.left_out[path.name] = str(error)
                continue
            self.clips.append(ClipPlace(self.dataset, scene, rows))
            return self.clips[-1]
        return None

    def _check(self) -> None:
        if not self.clips:
            name, reason = next(iter(self.left_out.items()))
            raise ValueError(
                f"--data {self.dataset}: none of {len(self.left_out)} scenes fits; {name}: {reason}"
            )


def _rows(scene: SceneFolder, frames: int, stride: int, seed: int) -> tuple[int, ...]:
    needed, total = (frames - 1) * stride + 1, len(scene.frames)
    if needed > total:
        raise ValueError(f"{total} frames, a clip of {frames} at stride {stride} takes {needed}")
    draw = random.Random(derive_seed("paper clip", seed, scene.path.name))
    start = draw.randint(0, total - needed)
    return tuple(range(start, start + needed, stride))


def read_truth(place: ClipPlace, size: int, with_depth: bool) -> Truth:
    """Frames, cameras and depth of a clip, cropped to size x size.

    Raises
    ------
    ValueError : a frame or a depth map that cannot be read or does not fit, or too little depth to
        align points by.
    """
    scene, rows = place.scene, list(place.rows)
    clip = read_clip(scene, rows, size)
    if clip.unreadable:
        raise ValueError(f"{clip.unreadable[0]} cannot be read")
    c2w = relative_poses(invert_pose(scene.extrinsics[rows]))
    depth = read_depth(scene, rows, size) if with_depth and scene.depth is not None else None
    if depth is not None and int((depth > 0).sum()) < LEAST_DEPTH:
        raise ValueError(f"fewer than {LEAST_DEPTH} pixels of the clip have a depth")
    prompt = scene.captions[0] if scene.captions else ""
    return Truth(clip.frames, invert_pose(c2w), clip.intrinsics.double(), depth, prompt)


def read_depth(
    scene: SceneFolder, rows: Sequence[int], size: int
) -> Tensor:  # [F, size, size] float32, 0: none
    """Depth maps of some frames, resized and cropped as the frames are; values are not mixed.

    Raises
    ------
    ValueError : no scale, a map that is missing, damaged, or not of its frame's size.
    """
    if scene.depth is None:
        raise ValueError(f"{scene.path} has no folder depth/")
    try:
        scale = float(json.loads((scene.depth / "scale.json").read_text())["scale"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{scene.depth}/scale.json gives no scale ({error})") from error
    planes = []
    for frame in scene.frame_paths(rows):
        file = scene.depth / f"{frame.stem}.png"
        try:
            with Image.open(file) as image, Image.open(frame) as of:
                if image.size != of.size:
                    raise ValueError(f"{image.size} pixels for a frame of {of.size}")
                steps = np.asarray(image, dtype=np.float32)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"depth {file}: {error}") from error
        planes.append(_cover_nearest(torch.from_numpy(steps * np.float32(scale)), size))
    return torch.stack(planes)


def _cover_nearest(plane: Tensor, size: int) -> Tensor:  # [h, w] -> [size, size]
    """`gen3r.conditioning.resize_center_crop` with the nearest value: depths do not mix."""
    factor = max(size / extent for extent in plane.shape)
    target = [max(round(extent * factor), size) for extent in plane.shape]
    resized = F.interpolate(plane[None, None], target, mode="nearest-exact")
    return center_crop(resized[0, 0], size, size)
