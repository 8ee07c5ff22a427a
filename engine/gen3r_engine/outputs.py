"""A scene on disk: upstream's result files and ours, in a folder that appears whole.

OUTPUT/TASK/TIME, TIME being the minute (20261122_1730; a second scene of that minute gets -2):

    rgb.mp4       12 fps                          (upstream)
    pcds.ply      the fused cloud                 (upstream; its mask is honoured here)
    cameras.json  extrinsics and intrinsics       (upstream)
    prompts.txt   the prompt                      (upstream)
    depth.mp4     inverse depth in colour, 12 fps
    preview.png   one sheet: views, frames, depths, cloud
    scene.npz     every array, only when asked
    run.json      request, configuration, seed, versions, seconds per stage, peak memory
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gen3r.folders import whole_folder
from gen3r.scene import Cameras, ImageLike, Scene, SceneRequest
from gen3r.writers import masked_cloud, save_video, write_cameras, write_npz, write_ply
from gen3r_engine.depth_colors import depth_colors
from gen3r_engine.fusion import FusionConfig, fuse_points
from gen3r_engine.preview import PreviewContent, contact_sheet
from gen3r_engine.versions import peak_memory, versions

OUTPUTS = ("rgb", "depth", "points", "cameras", "preview", "npz")
DEFAULT_OUTPUTS = ("rgb", "depth", "points", "cameras", "preview")


@dataclass(frozen=True)
class OutputOptions:
    """What is written.

    Parameters
    ----------
    outputs : names of `OUTPUTS`; prompts.txt and run.json are always written.
    fusion : how the saved cloud is filtered and thinned out.

    Raises
    ------
    ValueError : an unknown name, or none.
    """

    outputs: frozenset[str] = frozenset(DEFAULT_OUTPUTS)
    fusion: FusionConfig = field(default_factory=FusionConfig)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.outputs) - set(OUTPUTS))
        if unknown or not self.outputs:
            given = f"output '{unknown[0]}' is unknown" if unknown else "no outputs named"
            raise ValueError(f"{given}; choose from {', '.join(OUTPUTS)}")


@dataclass(frozen=True)
class WrittenScene:
    """Where the scene lies, what it holds, and the seconds of every stage, writing included.

    notes : what could not be done as asked; also in run.json.
    """

    path: Path
    files: list[str]
    seconds: dict[str, float]
    notes: list[str]


def time_stamp(when: datetime | None = None) -> str:
    """The folder name of a minute, as upstream: 20261122_1730."""
    return (when or datetime.now()).strftime("%Y%m%d_%H%M")


def write_scene(
    scene: Scene,
    request: SceneRequest,
    output_dir: str | Path,
    options: OutputOptions | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    sources: Sequence[str] = (),
    when: datetime | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> WrittenScene:
    """Write one scene to OUTPUT/TASK/TIME (see the module's docstring).

    Parameters
    ----------
    config : plain JSON values for run.json: model, steps, guidance, dtype, device, ... With
        `untrained` true the preview says so.
    sources : where the conditioning views came from, for run.json.
    when : the minute in the folder's name; now when None.
    progress : called with ("write rgb", 0, 1) before and ("write rgb", 1, 1) after each part.

    Raises
    ------
    OSError : the folder can not be written; nothing is left behind then.
    """
    options = options or OutputOptions()
    task = str(request.task)
    with whole_folder(Path(output_dir) / task, time_stamp(when), numbered=True) as folder:
        writer = _Writer(scene, request, options, folder.path, config or {})
        seconds = writer.write_all(progress or (lambda stage, done, total: None))
        record = _record(scene, request, options, config or {}, sources, seconds)
        record["notes"] = writer.notes
        text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
        (folder.path / "run.json").write_text(text + "\n", encoding="utf-8")
    files = sorted(p.name for p in folder.path.iterdir())
    return WrittenScene(folder.path, files, record["seconds"], writer.notes)


class _Writer:
    """Writes the parts of one scene into a folder and times them."""

    def __init__(
        self,
        scene: Scene,
        request: SceneRequest,
        options: OutputOptions,
        folder: Path,
        config: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.scene, self.request, self.options, self.folder = scene, request, options, folder
        self.rgb = np.asarray(scene.rgb)
        self.cloud: tuple[np.ndarray, np.ndarray] | None = None
        self.depth: np.ndarray | None = None
        self.notes: list[str] = []

    def write_all(self, progress: Callable[[str, int, int], None]) -> dict[str, float]:
        steps: dict[str, Callable[[], None]] = {
            "rgb": lambda: save_video(self.rgb, self.folder / "rgb.mp4"),
            "depth": lambda: save_video(self._depth(), self.folder / "depth.mp4"),
            "points": self._points,
            "cameras": lambda: write_cameras(
                self.folder / "cameras.json", self.scene.extrinsics, self.scene.intrinsics
            ),
            "preview": self._preview,
            "npz": lambda: write_npz(self.scene, self.folder / "scene.npz"),
        }
        seconds = {}
        (self.folder / "prompts.txt").write_text(self.request.prompt + "\n", encoding="utf-8")
        for name, step in steps.items():
            if name in self.options.outputs:
                progress(f"write {name}", 0, 1)
                start = time.perf_counter()
                step()
                seconds[f"write {name}"] = time.perf_counter() - start
                progress(f"write {name}", 1, 1)
        return seconds

    def _depth(self) -> np.ndarray:
        if self.depth is None:
            self.depth = depth_colors(np.asarray(self.scene.depth))
        return self.depth

    def _points(self) -> None:
        points, colors = masked_cloud(self.scene)
        try:
            cloud = fuse_points(points, colors, self.options.fusion)
        except ValueError as error:
            # A scene that took minutes is not thrown away because its cloud is too wide for the
            # grid (a field of view near 180 degrees does that): it is saved at full density.
            self.notes.append(f"pcds.ply is not thinned out: {error}")
            whole = dataclasses.replace(self.options.fusion, voxel_size=None)
            cloud = fuse_points(points, colors, whole)
        self.cloud = cloud.points, cloud.colors
        write_ply(self.folder / "pcds.ply", *self.cloud)

    def _preview(self) -> None:
        request = self.request
        height, width = self.rgb.shape[1:3]
        facts = [str(request.task), f"{len(self.rgb)} frames", f"{width} x {height}"]
        facts += [_cameras_text(request), f"seed {request.seed}"]
        if self.config.get("untrained"):
            facts.append("embedded model with untrained weights: not a picture of the scene")
        points, colors = self.cloud or masked_cloud(self.scene)
        sheet = contact_sheet(
            PreviewContent(
                title=request.prompt or "(no prompt)",
                subtitle="  ·  ".join(facts),
                views=[_as_uint8(image) for image in request.images],
                rgb=self.rgb,
                depth=self._depth(),
                points=points,
                colors=colors,
                extrinsics=np.asarray(self.scene.extrinsics, dtype=np.float64),
            )
        )
        sheet.save(self.folder / "preview.png", optimize=True)


def _cameras_text(request: SceneRequest) -> str:
    if request.task == "allview":
        return "cameras estimated"
    return "cameras given" if isinstance(request.cameras, Cameras) else f"cameras {request.cameras}"


def _as_uint8(image: ImageLike) -> np.ndarray:
    """uint8 RGB [H, W, 3] of anything that a request takes as an image."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    array = np.asarray(image)
    if array.dtype != np.uint8:
        array = (array.clip(0.0, 1.0) * 255.0).astype(np.uint8).transpose(1, 2, 0)
    return np.asarray(Image.fromarray(array).convert("RGB"))


def _record(
    scene: Scene,
    request: SceneRequest,
    options: OutputOptions,
    config: Mapping[str, Any],
    sources: Iterable[str],
    writing: Mapping[str, float],
) -> dict[str, Any]:
    info = dict(scene.info)
    seconds = {**info.pop("seconds", {}), **writing}
    given = isinstance(request.cameras, Cameras)
    return {
        "request": {
            "task": request.task,
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "views": list(sources),
            "cameras": "given" if given else request.cameras,
            "num_frames": request.num_frames,
            "height": request.height,
            "width": request.width,
        },
        "config": {**config, "outputs": [n for n in OUTPUTS if n in options.outputs]}
        | {"fusion": options.fusion.__dict__},
        "seed": request.seed,
        "versions": versions(),
        "seconds": {name: round(float(value), 4) for name, value in seconds.items()},
        "peak_memory": peak_memory(),
        "scene": info,
    }
