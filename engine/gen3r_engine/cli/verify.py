"""Compare a preset with the plain pipeline on your checkpoint and GPU, and say if it holds.

gen3r-engine verify --pretrained_model_name_or_path checkpoints/gen3r --preset fp8
gen3r-engine verify --preset fp8 --frame_path photo.jpg --prompts "a stone arena" --steps 20
gen3r-engine verify --json verify.json                       # the embedded model
gen3r-engine verify --preset fp8 --yardstick --scenes 8      # and its quality on held-out scenes

Both make the same scene from the same noise, one after the other. Printed are the latents' error
after each step, PSNR of the video, error of depth, angles between the cameras, and a verdict.
--yardstick adds scenes whose truth is known, rendered at the model's size: the preset against the
exact one, both against the truth, and exact with another seed to compare with; no verdict on it.
Exit code 0: within the limits that are printed with it; 1: not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen3r_engine.cli.errors import UsageError, plan_errors, user_input
from gen3r_engine.cli.files import check_file, write_file
from gen3r_engine.cli.model import add_model_arguments, engine_config, model_defaults
from gen3r_engine.cli.progress import StageProgress, note
from gen3r_engine.cli.requests import check_clip, parse_size, read_plans

if TYPE_CHECKING:
    import numpy as np

    from gen3r.scene import SceneRequest
    from gen3r_engine.config import EngineConfig
    from gen3r_engine.verify import Verification

HELP = "compare a preset with the plain pipeline on your checkpoint"
SHOWN = 8  # steps of the curve that are printed
SCENES = 4  # of the yardstick


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `verify`."""
    add = parser.add_argument
    add("--frame_path", nargs="+", metavar="PATH", help="as `run`; default: a made-up photo")
    add("--prompts", metavar="TEXT|FILE.txt", help="text, or a .txt file")
    add("--task", help="1view, 2view or allview; default: from what --frame_path gives")
    add("--cameras", nargs="+", default=["zoom_in"], help="as `run` (default: zoom_in)")
    add("--frames", type=int, help="frames, 4k + 1; default: the model's (49)")
    add("--size", metavar="N|HxW", help="pixels, multiples of 56; default: the model's (560)")
    add("--steps", type=int, default=50, help="denoising steps (default: 50)")
    add("--guidance", type=float, help="guidance scale; default: the model's (5)")
    add("--seed", type=int, default=42, help="seed of the noise (default: 42)")
    add(
        "--reference_dtype",
        choices=("bfloat16", "float32"),
        help="of the plain pipeline (default: the preset's; float32 takes ten times as long)",
    )
    add("--yardstick", action="store_true", help="measure quality on held-out scenes too")
    add("--scenes", type=int, help="held-out scenes of --yardstick (default: 4)")
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    add_model_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Run both, print the comparison; 0 when the preset holds, else 1."""
    if args.steps < 1:
        raise UsageError(f"--steps {args.steps} is below 1; use 1 or more")
    if args.guidance is not None and not 0 <= args.guidance < float("inf"):
        raise UsageError(f"--guidance {args.guidance} is out of range; use 5 (1 turns it off)")
    _check_clips(args)
    if args.yardstick and args.plans is not None:
        raise UsageError("--yardstick runs the model's own modules; leave --plans out, or it")
    check_file("--json", args.json)
    config = engine_config(args)
    with user_input():
        request = _request(args)
    from safetensors import SafetensorError

    from gen3r_engine.memory import OutOfMemory
    from gen3r_engine.verify import verify

    note("made twice, in the preset and plainly: this takes more than twice a scene's time")
    try:
        with user_input(kinds=(ValueError, OSError, SafetensorError)), plan_errors():
            found = verify(
                args.pretrained_model_name_or_path,
                config,
                request,
                steps=args.steps,
                guidance=args.guidance,
                reference_dtype=args.reference_dtype,
                tell_plans=note,
            )
    except OutOfMemory as error:
        raise UsageError(str(error), code=1) from error
    print(report(found), flush=True)
    values = found.to_dict()
    if args.yardstick:
        values["yardstick"] = _yardstick(args, config)
    if args.json is not None:
        write_file("--json", args.json, json.dumps(values, indent=1) + "\n")
    return 0 if found.passed else 1


def _check_clips(args: argparse.Namespace) -> None:
    if args.scenes is not None and not args.yardstick:
        raise UsageError("--scenes belongs to --yardstick; give both or leave it out")
    if args.scenes is not None and args.scenes < 1:
        raise UsageError(f"--scenes {args.scenes} is below 1; use 1 or more")
    with user_input("--size"):
        sides = parse_size(args.size)
    if not args.yardstick:
        return
    if sides is not None and sides[0] != sides[1]:
        raise UsageError(f"--size {args.size}: held-out scenes are square; use --size {sides[0]}")
    with user_input():
        check_clip(args.frames, None if sides is None else sides[0])


def _yardstick(args: argparse.Namespace, config: EngineConfig) -> dict[str, Any]:
    """Measure and print the quality on held-out scenes; returns it as JSON values."""
    import torch

    from gen3r_engine.evaluation.preset_quality import held_out_quality
    from gen3r_engine.evaluation.yardstick_report import markdown
    from gen3r_engine.memory import OutOfMemory

    sides = parse_size(args.size)
    try:
        with user_input(), StageProgress() as progress:
            found = held_out_quality(
                args.pretrained_model_name_or_path,
                config,
                scenes=SCENES if args.scenes is None else args.scenes,
                frames=args.frames,
                size=None if sides is None else sides[0],
                steps=args.steps,
                guidance=args.guidance,
                told=progress,
            )
    except (OutOfMemory, torch.cuda.OutOfMemoryError) as error:
        raise UsageError(f"--yardstick: {error}", code=1) from error
    print("\nyardstick:", markdown(found), flush=True)
    return found.to_dict()


def _request(args: argparse.Namespace) -> SceneRequest:
    frames, size = model_defaults(args.pretrained_model_name_or_path)
    if args.frame_path is not None:
        for name, value in (("requests", None), ("negative_prompt", "bad detailed"), ("stride", 1)):
            setattr(args, name, value)
        return read_plans(args)[0].request(frames, size)
    import numpy as np

    from gen3r.scene import SceneRequest

    height, width = parse_size(args.size) or (size, size)
    return SceneRequest(
        [made_up_photo(np.arange(height), np.arange(width))],
        args.prompts or "a red brick room with two columns and a blue sphere",
        task=args.task,
        cameras=" ".join(args.cameras),
        num_frames=args.frames or frames,
        height=height,
        width=width,
        seed=args.seed,
    )


def made_up_photo(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Waves of three colours, uint8 [H, W, 3]: content at several scales, the same everywhere."""
    import numpy as np

    y, x = rows[:, None] / len(rows), columns[None] / len(columns)
    waves = [np.sin(9 * x + 5 * y), np.sin(23 * y - 7 * x), np.sin(4 * x) * np.sin(41 * y)]
    photo: np.ndarray = (127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
    return photo


def report(found: Verification) -> str:
    """The comparison as text."""
    limits, steps = found.limits, len(found.curve.rel_error)
    lines = [
        f"preset {found.preset} ({found.dtype}) against the plain pipeline "
        f"({found.reference_dtype}), {found.steps} steps",
        "",
        "  step   latent error   cosine",
    ]
    stride = max(1, -(-steps // SHOWN))
    for index in sorted({*range(0, steps, stride), steps - 1}):
        error, cosine = found.curve.rel_error[index], found.curve.cosine[index]
        lines.append(f"  {index + 1:>4}   {error:>12.3e}   {cosine:.7f}")
    lines += ["", f"  {'figure':<34} {'found':>10} {'limit':>10}"]
    for name, value, limit in (
        ("latents, relative error", found.curve.last, f"<= {limits.latents:g}"),
        ("video, PSNR in dB", found.psnr, f">= {limits.psnr:g}"),
        ("depth, mean relative error", found.depth, f"<= {limits.depth:g}"),
        ("cameras, rotation in degrees", found.rotation, f"<= {limits.rotation:g}"),
        ("cameras, direction in degrees", found.translation, f"<= {limits.translation:g}"),
    ):
        shown = "no motion" if value is None else f"{value:.4g}"
        lines.append(f"  {name:<34} {shown:>10} {limit:>10}")
    lines += ["", f"limits: {limits.reason}", ""]
    verdict = "holds" if found.passed else "DOES NOT HOLD: " + "; ".join(found.failures)
    return "\n".join([*lines, f"verdict: preset {found.preset} {verdict}"])
