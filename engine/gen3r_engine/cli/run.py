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
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen3r.folders import check_writable
from gen3r_engine.cli.errors import UsageError, user_input
from gen3r_engine.cli.progress import StageProgress, note, print_seconds
from gen3r_engine.cli.requests import Plan, read_plans, tell_shortened

if TYPE_CHECKING:
    from gen3r.scene import Scene, SceneRequest
    from gen3r_engine.outputs import OutputOptions

HELP = "make a scene from photos or a video"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Upstream's flags under upstream's names, then ours."""
    add = parser.add_argument
    add(
        "--pretrained_model_name_or_path",
        metavar="PATH_OR_ID",
        help="folder or hub id of a checkpoint; default: the small embedded model",
    )
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
    add(
        "--remove_far_points",
        action="store_true",
        help="keep the nearest 80 %% of the cloud, on a finer grid (0.003 instead of 0.005)",
    )
    add("--requests", metavar="SCENES.jsonl", help="many scenes, one JSON object per line")
    add("--batch", type=int, default=1, help="scenes per pass of the model (default: 1)")
    add("--steps", type=int, default=50, help="denoising steps (default: 50)")
    add("--guidance", type=float, default=5.0, help="guidance scale (default: 5)")
    add("--seed", type=int, default=42, help="seed of the noise (default: 42)")
    add("--frames", type=int, help="frames to make, 4k + 1; default: the model's (49)")
    add("--size", metavar="N|HxW", help="pixels, multiples of 56; default: the model's (560)")
    add("--stride", type=int, default=1, help="take every n-th frame of a video or folder")
    add("--negative_prompt", default="bad detailed", help="default: 'bad detailed'")
    add("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    add("--device", default="auto", help="cpu, cuda, cuda:1; default: cuda where there is one")
    add("--allow_pickle", action="store_true", help="load .pth files too (weights only)")
    add("--attention", default="auto", help="attention backend (see gen3r-engine doctor)")
    add(
        "--outputs",
        metavar="LIST",
        help="comma list of rgb,depth,points,cameras,preview,npz; default: all but npz",
    )


def main(args: argparse.Namespace) -> int:
    """Check everything, load the model, make and write the scenes."""
    _check_numbers(args)
    plans = read_plans(args)
    options = _output_options(args)
    with user_input(f"--output_dir {args.output_dir} can not be written", (OSError,)):
        check_writable(Path(args.output_dir))
    with user_input():
        frames, size = _model_defaults(args.pretrained_model_name_or_path)
    for plan in plans:
        plan.request(frames, size)
    target = _target(args)
    pipe = _load(args, target)
    frames, size = pipe.config.num_frames, pipe.config.size
    requests = [plan.request(frames, size) for plan in plans]
    tell_shortened(plans, requests, frames)
    for batch in _batches(plans, requests, args.batch):
        _run_batch(args, pipe, batch, options, target)
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("steps", "batch", "stride"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} is below 1; use 1 or more")
    if not 0 <= args.guidance < float("inf"):
        raise UsageError(f"--guidance {args.guidance} is out of range; use 5 (1 turns it off)")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed} is negative; use 0 or more")


def _output_options(args: argparse.Namespace) -> OutputOptions:
    from gen3r_engine.fusion import REMOVE_FAR, FusionConfig
    from gen3r_engine.outputs import DEFAULT_OUTPUTS, OutputOptions

    names = DEFAULT_OUTPUTS
    if args.outputs is not None:
        names = tuple(name.strip() for name in args.outputs.split(",") if name.strip())
    fusion = REMOVE_FAR if args.remove_far_points else FusionConfig()
    with user_input("--outputs"):
        return OutputOptions(outputs=frozenset(names), fusion=fusion)


@dataclass(frozen=True)
class _Target:
    """Where the model runs: device name, dtype name, attention backend."""

    device: str
    dtype: str
    attention: str


def _target(args: argparse.Namespace) -> _Target:
    import torch

    from gen3r_kernels import Backends

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with user_input(f"--device {device}", (RuntimeError,)):
        kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {device} is not supported; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device {device} was asked, but this torch ({torch.__version__}) finds no CUDA GPU; "
            "use --device cpu, or install a CUDA build of torch and the driver"
        )
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: there are {torch.cuda.device_count()} GPUs")
    with user_input("--attention"):
        backend = Backends(attention=args.attention).attention_backend
    reason = backend.why_not()
    if reason is None and backend.cuda_only and kind != "cuda":
        reason = "needs a CUDA GPU"
    if reason is not None:
        raise UsageError(f"--attention {args.attention}: {reason}; use --attention sdpa")
    dtype = args.dtype or ("bfloat16" if kind == "cuda" else "float32")
    return _Target(device, dtype, args.attention)


def _model_defaults(name: str | None) -> tuple[int, int]:
    """Frames and size that the model makes by default, without loading it."""
    from gen3r.config import GEN3R

    if name is None:
        from gen3r.nano import NANO

        return NANO.num_frames, NANO.size
    own: dict[str, Any] = {}
    if _is_local(name):
        from gen3r.checkpoint import CheckpointError, read_own_values

        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"{name} is not a folder; give a checkpoint folder or a hub id")
        own = read_own_values(folder)
    return own.get("num_frames", GEN3R.num_frames), own.get("size", GEN3R.size)


def _is_local(name: str) -> bool:
    """Whether a model name is a path. A hub id is `owner/name`, with nothing of that name here."""
    path = Path(name).expanduser()
    return path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1


def _load(args: argparse.Namespace, target: _Target) -> Any:
    import torch
    from safetensors import SafetensorError

    from gen3r_kernels import Backends

    dtype = getattr(torch, target.dtype)
    backends = Backends(attention=target.attention)
    name = args.pretrained_model_name_or_path
    if name is None:
        from gen3r.nano import build_nano

        pipe = build_nano(torch_dtype=dtype, device=target.device, backends=backends)
    else:
        from gen3r.pipeline import Gen3RPipeline

        path = str(Path(name).expanduser()) if _is_local(name) else name
        known = user_input(kinds=(ValueError, OSError, SafetensorError))
        with known, StageProgress() as progress:
            progress("load checkpoint", 0, 1)
            pipe = Gen3RPipeline.from_pretrained(
                path,
                torch_dtype=dtype,
                device=target.device,
                backends=backends,
                allow_pickle=args.allow_pickle,
            )
            progress("load checkpoint", 1, 1)
    if pipe.untrained:
        note("the embedded model's weights are untrained: the scene will be noise, not a place")
    return pipe


def _batches(
    plans: list[Plan], requests: list[SceneRequest], size: int
) -> Iterator[list[tuple[Plan, SceneRequest]]]:
    """Neighbours of one shape together, at most `size` of them."""
    pairs = zip(plans, requests, strict=True)
    for _, group in itertools.groupby(
        pairs, key=lambda pair: (pair[1].num_frames, pair[1].height, pair[1].width)
    ):
        members = list(group)
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _run_batch(
    args: argparse.Namespace,
    pipe: Any,
    batch: list[tuple[Plan, SceneRequest]],
    options: OutputOptions,
    target: _Target,
) -> None:
    import torch

    with StageProgress() as progress:
        try:
            scenes: list[Scene] = pipe(
                requests=[request for _, request in batch],
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                progress=progress,
            )
        except torch.cuda.OutOfMemoryError as error:
            raise UsageError(
                f"the GPU's memory is too small ({str(error).splitlines()[0]}); "
                "use a smaller --size, fewer --frames or --batch 1",
                code=1,
            ) from error
    from gen3r_engine.outputs import write_scene

    config = {
        "model": args.pretrained_model_name_or_path or "embedded",
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "batch": len(batch),
        "untrained": pipe.untrained,
        **target.__dict__,
    }
    seconds: dict[str, float] = {}
    for (plan, request), scene in zip(batch, scenes, strict=True):
        failed = user_input("the scene could not be written", (OSError,), code=1)
        with failed, StageProgress() as progress:
            written = write_scene(
                scene,
                request,
                args.output_dir,
                options,
                config=config,
                sources=plan.views.sources,
                progress=progress,
            )
        for text in written.notes:
            note(text)
        print(f"scene:   {written.path}")
        if "preview.png" in written.files:
            print(f"preview: {written.path / 'preview.png'}")
        for name, value in written.seconds.items():
            # The model's stages ran once for the whole batch; writing is each scene's own.
            before = seconds.get(name, 0.0) if name.startswith("write ") else 0.0
            seconds[name] = before + value
    print_seconds(seconds)
