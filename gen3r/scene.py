"""What is asked (SceneRequest, Cameras) and what comes back (Scene)."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

TASKS = ("1view", "2view", "allview")
TRAJECTORIES = (
    *("free", "zoom_in", "zoom_out", "arc_left", "arc_right"),
    *("translate_up", "translate_down"),
)

# uint8 [H, W, 3 or 4] or [H, W]; float [3, H, W] in [0, 1]
ImageLike = Image.Image | np.ndarray | Tensor


@dataclass(frozen=True)
class Cameras:
    """A camera path. OpenCV axes (x right, y down, z forward), extrinsics map world to camera.

    Parameters
    ----------
    extrinsics : [F, 4, 4] float64, world to camera; any world frame (made relative to the first).
    intrinsics : [F, 3, 3] float64, pixels of the prepared (resized and cropped) frames.

    Raises
    ------
    ValueError : wrong shapes, different lengths, NaN or infinity, a pose without inverse.
    """

    extrinsics: Tensor
    intrinsics: Tensor

    def __post_init__(self) -> None:
        extrinsics = torch.as_tensor(self.extrinsics, dtype=torch.float64)
        intrinsics = torch.as_tensor(self.intrinsics, dtype=torch.float64)
        if extrinsics.ndim != 3 or extrinsics.shape[1:] != (4, 4):
            raise ValueError(f"extrinsics must be [F, 4, 4], got {list(extrinsics.shape)}")
        if intrinsics.ndim != 3 or intrinsics.shape[1:] != (3, 3):
            raise ValueError(f"intrinsics must be [F, 3, 3], got {list(intrinsics.shape)}")
        if len(extrinsics) != len(intrinsics) or len(extrinsics) == 0:
            raise ValueError(f"{len(extrinsics)} extrinsics and {len(intrinsics)} intrinsics")
        for name, value in (("extrinsics", extrinsics), ("intrinsics", intrinsics)):
            bad = (~torch.isfinite(value)).flatten(1).any(1).nonzero().flatten().tolist()
            if bad:
                raise ValueError(f"{name} of frame {bad[0]} hold NaN or infinity")
        for name, value in (("extrinsics", extrinsics), ("intrinsics", intrinsics)):
            singular = (torch.linalg.det(value).abs() < 1e-9).nonzero().flatten().tolist()
            if singular:
                raise ValueError(f"{name} of frame {singular[0]} have no inverse")
        object.__setattr__(self, "extrinsics", extrinsics)
        object.__setattr__(self, "intrinsics", intrinsics)

    def __len__(self) -> int:
        return len(self.extrinsics)

    def head(self, count: int) -> Cameras:
        """The first `count` cameras. ValueError when there are fewer."""
        if len(self) < count:
            raise ValueError(f"{len(self)} cameras given, {count} frames asked; give one per frame")
        return Cameras(self.extrinsics[:count], self.intrinsics[:count])


def trajectory_name(name: str) -> str:
    """The canonical trajectory name ("translate down" is accepted for translate_down).

    Raises
    ------
    ValueError : an unknown name, with the nearest known one.
    """
    canonical = name.strip().lower().replace(" ", "_").replace("-", "_")
    if canonical in TRAJECTORIES:
        return canonical
    near = difflib.get_close_matches(canonical, TRAJECTORIES, n=1, cutoff=0.0)
    raise ValueError(
        f"unknown trajectory '{name}'; did you mean '{near[0]}'? known: {', '.join(TRAJECTORIES)}"
    )


@dataclass(frozen=True)
class SceneRequest:
    """One scene to generate.

    Parameters
    ----------
    images : conditioning views: 1 for ``1view``, 2 for ``2view``, 3 or more for ``allview``.
    prompt, negative_prompt : text; both may be empty.
    task : ``1view``, ``2view``, ``allview``, or None to take it from the number of images.
    cameras : a trajectory name or a `Cameras`; ignored by ``allview``, as upstream.
    num_frames : frames to generate, 4k + 1. ``allview`` with fewer images uses the largest 4k + 1
        and warns.
    height, width : pixels, multiples of 56.
    seed : seed of this request's noise, unless the pipeline is given generators.

    Raises
    ------
    ValueError : any field outside its limits, with the value, the limit and what to do.
    """

    images: Sequence[ImageLike]
    prompt: str = ""
    task: str | None = None
    cameras: str | Cameras = "free"
    num_frames: int = 49
    height: int = 560
    width: int = 560
    negative_prompt: str = "bad detailed"
    seed: int = 42

    def __post_init__(self) -> None:
        count = len(self.images)
        if count == 0:
            raise ValueError("no images: give 1 (1view), 2 (2view) or a video (allview)")
        task = self.task or {1: "1view", 2: "2view"}.get(count, "allview")
        if task not in TASKS:
            raise ValueError(f"task '{task}' is unknown; known: {', '.join(TASKS)}")
        needed = {"1view": 1, "2view": 2}.get(task)
        if needed is not None and count != needed:
            raise ValueError(f"task {task} takes {needed} image(s), {count} given")
        if task == "allview" and count < 3:
            raise ValueError(
                f"allview takes a video of at least 3 frames, {count} given; use 1view or 2view"
            )
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            lower = max(1, (self.num_frames - 1) // 4 * 4 + 1)
            raise ValueError(
                f"num_frames {self.num_frames} is not of the form 4k + 1; "
                f"use {lower} or {lower + 4}"
            )
        if task == "2view" and self.num_frames < 5:
            raise ValueError(f"task 2view needs at least 5 frames, num_frames is {self.num_frames}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value <= 0 or value % 56:
                near = max(56, round(value / 56) * 56)
                raise ValueError(f"{name} {value} is not a multiple of 56; use {near}")
        if isinstance(self.cameras, str):
            object.__setattr__(self, "cameras", trajectory_name(self.cameras))
        if task == "allview" and count < self.num_frames:
            used = (count - 1) // 4 * 4 + 1
            message = f"allview: {count} images for {self.num_frames} frames; {used} will be made"
            warnings.warn(message, stacklevel=3)
            object.__setattr__(self, "num_frames", used)
        if task != "allview" and isinstance(self.cameras, Cameras):
            self.cameras.head(self.num_frames)
        object.__setattr__(self, "task", task)


@dataclass(frozen=True)
class PointCloud:
    """The points of all frames as one cloud: one point a cell in cell order, or without a voxel
    size in the input's order.

    points : [N, 3] float64, world frame; colors : [N, 3] uint8
    normals : [N, 3] float32, of unit length or 0 where unknown; None unless asked for
    counts : points given, dropped by each step, kept by all of them, and returned (cells)
    backend : what computed it: "cuda", "native" or "python"
    """

    points: NDArray[np.float64]
    colors: NDArray[np.uint8]
    normals: NDArray[np.float32] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    backend: str = "python"

    def __len__(self) -> int:
        return len(self.points)


@dataclass(frozen=True)
class Scene:
    """One generated scene. Arrays live on the host.

    rgb : [F, H, W, 3] uint8
    depth : [F, H, W] float32, along the optical axis, in the model's own scale (no metric unit)
    depth_confidence : [F, H, W] float32, >= 1, larger is surer
    extrinsics : [F, 4, 4] float32, world to camera, OpenCV; intrinsics : [F, 3, 3] float32, pixels
    points : [F, H, W, 3] float64, world; mask : [F, H, W] bool, points worth keeping
    point_map, point_confidence : the point head's own world points, only when asked
    cloud : the fused points, where the engine was asked for them
    info : request, seed, seconds per stage, versions (plain JSON values)
    """

    rgb: Tensor
    depth: Tensor
    depth_confidence: Tensor
    extrinsics: Tensor
    intrinsics: Tensor
    points: Tensor
    mask: Tensor
    point_map: Tensor | None = None
    point_confidence: Tensor | None = None
    cloud: PointCloud | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def save(self, directory: str | Path) -> Path:
        """Write rgb.mp4, cameras.json, pcds.ply (masked points) and scene.npz; returns the folder.

        The folder is written beside its final name and renamed, so it is whole or not there. A
        folder of that name must not exist yet.

        Raises
        ------
        FileExistsError : the folder exists. OSError : it cannot be written.
        """
        from gen3r.writers import save_scene

        return save_scene(self, Path(directory))
