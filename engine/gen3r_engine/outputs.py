"""A scene on disk: upstream's result files and ours, in a folder that appears whole.

OUTPUT/TASK/TIME, TIME being the minute (20261122_1730; a second scene of that minute gets -2):

    output       files
    rgb          rgb.mp4        12 fps                          (upstream)
    points       pcds.ply       the fused cloud                 (upstream; the mask counts here)
    cameras      cameras.json   extrinsics and intrinsics       (upstream)
    always       prompts.txt    the prompt                      (upstream)
    depth        depth.mp4      inverse depth in colour, 12 fps
    preview      preview.png    one sheet: views, frames, depths, cloud
    glb          scene.glb      the cloud and camera frusta
    colmap       sparse/0/*.bin, images/    a COLMAP model and the frames
    colmap_text  sparse/0/*.txt, images/    the same as text
    nerfstudio   transforms.json, images/, pcds.ply
    depth_png    depth/*.png    16 bits a pixel; scale.json
    html         view.html      a page that shows the cloud in any browser
    npz          scene.npz      every array
    always       run.json       request, configuration, seed, versions, seconds, counts, peak memory

An output that fails (a full disk) costs no other: it is removed, the others are kept, run.json and
the `IncompleteScene` that is raised name it. When none can be written, nothing is left behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from gen3r.folders import whole_folder
from gen3r.scene import Cameras, Scene, SceneRequest
from gen3r_engine.fusion import FusionConfig
from gen3r_engine.versions import peak_memory, versions
from gen3r_engine.writing import FUSED, SceneWriter

OUTPUTS = (
    *("rgb", "depth", "points", "cameras", "preview", "npz", "glb", "colmap", "colmap_text"),
    *("nerfstudio", "depth_png", "html"),
)
ALIASES = {"ply": "points"}
DEFAULT_OUTPUTS = ("rgb", "depth", "points", "cameras", "preview")


@dataclass(frozen=True)
class OutputOptions:
    """What is written.

    Parameters
    ----------
    outputs : names of `OUTPUTS`, of `ALIASES`, or "all"; prompts.txt and run.json are always
        written. nerfstudio brings points with it.
    fusion : how the saved cloud is filtered and thinned out; a scene that has a cloud already
        (`Scene.cloud`) keeps it.

    Raises
    ------
    ValueError : an unknown name, or none.
    """

    outputs: frozenset[str] = frozenset(DEFAULT_OUTPUTS)
    fusion: FusionConfig = field(default_factory=FusionConfig)

    def __post_init__(self) -> None:
        names = {ALIASES.get(name, name) for name in self.outputs}
        if "all" in names:
            names = names - {"all"} | set(OUTPUTS)
        unknown = sorted(names - set(OUTPUTS))
        if unknown or not names:
            given = f"output '{unknown[0]}' is unknown" if unknown else "no outputs named"
            raise ValueError(f"{given}; choose from {', '.join(OUTPUTS)}, or all")
        if "nerfstudio" in names:
            names.add("points")
        object.__setattr__(self, "outputs", frozenset(names))

    @property
    def cloud_fusion(self) -> FusionConfig | None:
        """How the cloud is made, for `Engine.stream`; None where no output holds one."""
        return self.fusion if self.outputs & FUSED else None


@dataclass(frozen=True)
class WrittenScene:
    """Where the scene lies, what it holds, and the seconds of every stage, writing included.

    notes : what could not be done as asked; also in run.json.
    failed : outputs that could not be written, and why.
    """

    path: Path
    files: list[str]
    seconds: dict[str, float]
    notes: list[str]
    failed: dict[str, str]


class IncompleteScene(Exception):
    """Some outputs could not be written. `written` says what was kept; None when nothing was."""

    def __init__(self, failed: Mapping[str, str], asked: int, written: WrittenScene | None) -> None:
        by_reason: dict[str, list[str]] = {}
        for name, reason in failed.items():
            by_reason.setdefault(reason, []).append(name)
        what = "; ".join(f"{', '.join(names)}: {text}" for text, names in by_reason.items())
        kept = "nothing was kept"
        if written is not None:
            kept = f"kept in {written.path}: {', '.join(written.files)}"
        super().__init__(f"{len(failed)} of {asked} outputs could not be written ({what}); {kept}")
        self.written = written


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
    IncompleteScene : an output could not be written, whatever the error; the others are there.
    OSError : the folder can not be written; nothing is left behind then.
    """
    options = options or OutputOptions()
    config = config or {}
    task = str(request.task)
    with whole_folder(Path(output_dir) / task, time_stamp(when), numbered=True) as folder:
        writer = SceneWriter(scene, request, options.outputs, options.fusion, folder.path, config)
        writer.write_all(progress or (lambda stage, done, total: None))
        failed = {name: _reason(error, folder.path) for name, error in writer.errors.items()}
        if len(failed) == len(options.outputs):
            raise IncompleteScene(failed, len(failed), None) from _first(writer)
        record = _record(scene, request, options, config, sources, writer, failed)
        text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
        (folder.path / "run.json").write_text(text + "\n", encoding="utf-8")
    files = sorted(p.name for p in folder.path.iterdir())
    written = WrittenScene(folder.path, files, record["seconds"], writer.notes, failed)
    if failed:
        raise IncompleteScene(failed, len(options.outputs), written) from _first(writer)
    return written


def _first(writer: SceneWriter) -> Exception:
    return next(iter(writer.errors.values()))


def _reason(error: Exception, folder: Path) -> str:
    """One line that does not name the temporary folder, which is gone when it is read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).replace(f"{folder}/", "").split())
    return text or type(error).__name__


def _record(
    scene: Scene,
    request: SceneRequest,
    options: OutputOptions,
    config: Mapping[str, Any],
    sources: Iterable[str],
    writer: SceneWriter,
    failed: Mapping[str, str],
) -> dict[str, Any]:
    info = dict(scene.info)
    seconds = {**info.pop("seconds", {}), **writer.seconds}
    cloud = writer.cloud
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
        "cloud": None
        if cloud is None
        else {"points": len(cloud), "backend": cloud.backend, "counts": cloud.counts},
        "notes": writer.notes,
        "failed": dict(failed),
        "scene": info,
    }
