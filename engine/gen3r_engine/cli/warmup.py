"""Compile ahead of time what a scene runs, so that the first one of a later run does not wait.

  gen3r-engine warmup --pretrained_model_name_or_path checkpoints/gen3r --preset exact
  gen3r-engine warmup --preset fp8 --frames 49 --size 560 --batch 2

The compiled code is kept in --cache-dir (~/.cache/gen3r-engine), for this GPU, these versions and
this shape of a scene.
"""

from __future__ import annotations

import argparse
import time

from gen3r_engine.cli.errors import UsageError, plan_errors, user_input
from gen3r_engine.cli.model import add_model_arguments, engine_config, load_engine, model_defaults
from gen3r_engine.cli.requests import parse_size

HELP = "compile ahead of time for a shape of scene"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `warmup`."""
    parser.add_argument("--frames", type=int, help="frames, 4k + 1; default: the model's (49)")
    parser.add_argument(
        "--size", metavar="N|HxW", help="pixels, multiples of 56; default: the model's (560)"
    )
    add_model_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Load, compile, capture, run one step, write the manifest."""
    from gen3r_engine.engine import OutOfMemory

    config = engine_config(args)
    with user_input():
        frames, size = model_defaults(args.pretrained_model_name_or_path)
        frames, pixels = args.frames or frames, parse_size(args.size) or (size, size)
    start = time.perf_counter()
    engine = load_engine(args.pretrained_model_name_or_path, config)
    loaded = time.perf_counter() - start
    try:
        with user_input(), plan_errors():
            seconds = engine.warm_up(frames, pixels, args.batch)
    except OutOfMemory as error:
        raise UsageError(str(error), code=1) from error
    shape = (frames, *pixels, args.batch)
    planned = engine.plans is not None and engine.plans.choose(*shape, True).denoiser is not None
    state = "none" if planned else engine.warmth.before(shape)
    print(f"shape:   {frames} frames of {pixels[0]} x {pixels[1]}, {args.batch} at once")
    print(f"load:    {loaded:.1f} s")
    print(f"step:    {seconds['first']:.1f} s the first time, then {seconds['step']:.2f} s")
    print(f"stages:  {seconds['stages']:.1f} s for encoding and decoding, the first time")
    if state == "none":
        print("cache:   nothing is compiled here")
    else:
        print(f"cache:   {engine.warmth.folder.root} (was {state})")
    return 0
