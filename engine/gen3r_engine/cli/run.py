"""Turn photos or a video into a scene: RGB video, depth, cameras and a point cloud.

One photo, with the small embedded model:
  gen3r-engine run --frame_path examples/1view/photo.jpg --cameras zoom_out

Two photos and a camera path, with the published checkpoint on a GPU:
  gen3r-engine run --pretrained_model_name_or_path checkpoints/gen3r --task 2view \\
    --frame_path first.png last.png --prompts prompts.txt --cameras cameras.json

Many scenes: one JSON object per line with the same names (paths relative to the file):
  gen3r-engine run --requests scenes.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen3r.folders import check_writable
from gen3r_engine.cli.errors import UsageError, plan_errors, user_input
from gen3r_engine.cli.model import (
    add_model_arguments,
    engine_config,
    engine_record,
    load_engine,
    model_defaults,
)
from gen3r_engine.cli.progress import StageProgress, note, print_seconds
from gen3r_engine.cli.requests import Plan, read_plans, tell_shortened

if TYPE_CHECKING:
    from gen3r.scene import Scene, SceneRequest
    from gen3r_engine.engine import Engine
    from gen3r_engine.events import Event
    from gen3r_engine.fusion import FusionConfig
    from gen3r_engine.outputs import OutputOptions
    from gen3r_engine.workers import BoundedWorker

HELP = "make a scene from photos or a video"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Upstream's flags under upstream's names, then ours."""
    add = parser.add_argument
    add("--task", help="1view, 2view or allview; default: from what --frame_path gives")
    add("--prompts", metavar="TEXT|FILE.txt", help="text, or a .txt file (first line is read)")
    add(
        "--frame_path",
        nargs="+",
        metavar="PATH",
        help="1 image, 2 images (first and last view), a folder of images, or a video",
    )
    add(
        "--cameras",
        nargs="+",
        default=["free"],
        metavar="CAMERAS",
        help="cameras.json, or free, zoom_in, zoom_out, arc_left, arc_right, translate_up, "
        "translate_down (default: free)",
    )
    add("--output_dir", default="outputs", help="results go to OUTPUT_DIR/TASK/TIME")
    add("--requests", metavar="SCENES.jsonl", help="many scenes, one JSON object per line")
    add("--steps", type=int, default=50, help="denoising steps (default: 50)")
    add("--guidance", type=float, help="guidance scale; default: the model's (5)")
    add("--seed", type=int, default=42, help="seed of the noise (default: 42)")
    add("--frames", type=int, help="frames to make, 4k + 1; default: the model's (49)")
    add("--size", metavar="N|HxW", help="pixels, multiples of 56; default: the model's (560)")
    add("--stride", type=int, default=1, help="take every n-th frame of a video or folder")
    add("--negative_prompt", default="bad detailed", help="default: 'bad detailed'")
    add(
        "--outputs",
        metavar="LIST",
        help="comma list of rgb, depth, points (or ply), cameras, preview, npz, glb, colmap, "
        "colmap_text, nerfstudio, depth_png, html, or all; default: the first five",
    )
    add_fusion_arguments(parser)
    add_model_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Check everything, load the model, make and write the scenes."""
    _check_numbers(args)
    plans = read_plans(args)
    options = _output_options(args)
    with user_input(f"--output_dir {args.output_dir} can not be written", (OSError,)):
        check_writable(Path(args.output_dir))
    with user_input():
        frames, size = model_defaults(args.pretrained_model_name_or_path)
    for plan in plans:
        plan.request(frames, size)
    engine = load_engine(args.pretrained_model_name_or_path, engine_config(args))
    frames, size = engine.pipeline.config.num_frames, engine.pipeline.config.size
    requests = [plan.request(frames, size) for plan in plans]
    tell_shortened(plans, requests, frames)
    _Job(args, engine, plans, requests, options).run()
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("steps", "stride"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} is below 1; use 1 or more")
    if args.guidance is not None and not 0 <= args.guidance < float("inf"):
        raise UsageError(f"--guidance {args.guidance} is out of range; use 5 (1 turns it off)")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed} is negative; use 0 or more")


def add_fusion_arguments(parser: argparse.ArgumentParser) -> None:
    """How the saved cloud is filtered and thinned out."""
    add = parser.add_argument_group("point cloud").add_argument
    add(
        "--remove_far_points",
        action="store_true",
        help="keep the nearest 80 %% of the cloud, on a finer grid (0.003 instead of 0.005)",
    )
    add(
        "--voxel-size",
        type=float,
        metavar="LENGTH",
        help="edge of a grid cell in the scene's unit, one point a cell; 0 keeps every point",
    )
    add(
        "--confidence",
        type=float,
        metavar="PERCENTILE",
        help="drop the points that the model is least sure of, this many percent of them",
    )
    add("--normals", action="store_true", help="points carry normals, which face their camera")
    add(
        "--fusion-backend",
        default="auto",
        metavar="NAME",
        help="auto, cuda, native (C++) or python; auto takes the first that can run",
    )


def _output_options(args: argparse.Namespace) -> OutputOptions:
    from gen3r_engine.outputs import DEFAULT_OUTPUTS, OutputOptions

    names = DEFAULT_OUTPUTS
    if args.outputs is not None:
        names = tuple(name.strip() for name in args.outputs.split(",") if name.strip())
    fusion = _fusion_config(args)
    with user_input("--outputs"):
        return OutputOptions(outputs=frozenset(names), fusion=fusion)


def _fusion_config(args: argparse.Namespace) -> FusionConfig:
    import torch

    from gen3r_engine.fusion import REMOVE_FAR, FusionConfig
    from gen3r_engine.native import native, why_missing

    config = REMOVE_FAR if args.remove_far_points else FusionConfig()
    with user_input("--fusion-backend"):
        config = dataclasses.replace(config, backend=args.fusion_backend)
        if config.backend == "native" and native() is None:
            raise ValueError(f"native is {why_missing()}; or use auto or python")
        if config.backend == "cuda" and not torch.cuda.is_available():
            raise ValueError("cuda needs a CUDA GPU, none is here; use auto, native or python")
    with user_input("--confidence"):
        config = dataclasses.replace(config, confidence_percentile=args.confidence)
    if args.voxel_size is not None:
        with user_input("--voxel-size"):
            config = dataclasses.replace(config, voxel_size=args.voxel_size or None)
    return dataclasses.replace(config, normals=args.normals)


@dataclass
class _Job:
    """All scenes of one command: made by the engine, written beside it by a thread."""

    args: argparse.Namespace
    engine: Engine
    plans: list[Plan]
    requests: list[SceneRequest]
    options: OutputOptions
    seconds: dict[str, float] = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Make and write every scene. UsageError when memory or disk do not hold one."""
        # An empty cloud is told in a note of the scene's own; warnings' filters are not a thread's.
        warnings.filterwarnings("ignore", "no point of", UserWarning)
        try:
            self._run()
        except (KeyboardInterrupt, UsageError) as stop:
            if self.kept:
                finished = f"{len(self.kept)} finished scenes" if len(self.kept) > 1 else "1 scene"
                stop.add_note(f"{finished} kept in {self.args.output_dir}")
            raise
        if self.incomplete:
            raise UsageError("; ".join(self.incomplete), code=1)

    def _run(self) -> None:
        from gen3r_engine.engine import OutOfMemory
        from gen3r_engine.workers import BoundedWorker

        many = len(self.requests) > 1
        start = time.perf_counter()
        with StageProgress(brief=many) as progress, BoundedWorker("write") as writer:
            with user_input():  # a request that does not fit is refused before anything runs
                scenes = self.engine.stream(
                    self.requests,
                    steps=self.args.steps,
                    guidance=self.args.guidance,
                    fusion=self.options.cloud_fusion,
                    on_event=lambda event: self._show(progress, event),
                )
            try:
                with plan_errors(), contextlib.closing(scenes):
                    for scene in scenes:
                        writer.submit(self._write, scene, progress, writer)
            except OutOfMemory as error:
                raise UsageError(str(error), code=1) from error
        print_seconds(self.seconds)
        if many:
            print(f"{len(self.requests)} scenes in {time.perf_counter() - start:.1f} s")

    def _name(self, index: int) -> str:
        """What stands behind a stage's name where there are many scenes."""
        return f" [{index + 1}/{len(self.requests)}]" if len(self.requests) > 1 else ""

    def _show(self, progress: StageProgress, event: Event) -> None:
        if event.kind == "progress":
            progress(event.stage + self._name(event.index), event.done, event.total)

    def _write(self, scene: Scene, progress: StageProgress, writer: BoundedWorker) -> None:
        from gen3r_engine.outputs import IncompleteScene, write_scene

        index = scene.info["index"]

        def report(stage: str, done: int, total: int) -> None:
            if writer.stopping.is_set():
                raise KeyboardInterrupt  # the unfinished folder goes
            progress(stage + self._name(index), done, total)

        with user_input("the scene could not be written, nothing of it was kept", (OSError,), 1):
            try:
                written = write_scene(
                    scene,
                    self.requests[index],
                    self.args.output_dir,
                    self.options,
                    config=self._config(scene),
                    sources=self.plans[index].views.sources,
                    progress=report,
                )
            except IncompleteScene as error:
                # A disk that is full or gone stays so: no further scene is made for it.
                if error.written is None or isinstance(error.__cause__, OSError):
                    raise UsageError(str(error), code=1) from error
                self.incomplete.append(str(error))
                written = error.written
        self.kept.append(written.path)
        for text in written.notes:
            note(text)
        progress.say(f"scene:   {written.path}")
        if "preview.png" in written.files:
            progress.say(f"preview: {written.path / 'preview.png'}")
        for name, value in written.seconds.items():
            # Encoding and denoising ran once for a whole batch: each scene has its share of them.
            shared = name.startswith(("encode", "denoise"))
            share = value / scene.info.get("batch", 1) if shared else value
            self.seconds[name] = self.seconds.get(name, 0.0) + share

    def _config(self, scene: Scene) -> dict[str, Any]:
        choice = self.engine.choice
        record = engine_record(self.engine)
        if "plans" in scene.info:
            record["plans"] |= scene.info["plans"]
        return {
            "model": self.args.pretrained_model_name_or_path or "embedded",
            "num_inference_steps": self.args.steps,
            "guidance_scale": scene.info["guidance_scale"],
            "batch": scene.info.get("batch", 1),
            "untrained": self.engine.pipeline.untrained,
            "device": str(self.engine.device),
            "dtype": choice.dtype,
            "attention": choice.attention,
            "engine": record,
        }
