"""``gen3r-engine train resident STAGE``: flags to configuration, errors in one line."""

from __future__ import annotations

import argparse
import sys
import traceback
from dataclasses import MISSING, fields
from pathlib import Path

from gen3r_training.resident.config import DEFAULTS, DEVICES, DTYPES, STAGES, ResidentConfig

_HELP = {
    "data": "folder of packed clips (gen3r-engine prepare procedural --form packed)",
    "output": "pipeline folder to write",
    "model": "pipeline folder to begin with (default: NANO with random weights)",
    "steps": "optimiser steps",
    "minutes": "end after so long, whatever is left",
    "batch": "clips a step",
    "scenes": "most training clips to load (default: all)",
    "held_out": "held-out clips of an evaluation",
    "learning_rate": "after the warm-up; it falls to 0 along a cosine",
    "weight_decay": "AdamW's",
    "beta2": "AdamW's",
    "warmup": "steps of linear warm-up",
    "ema": "decay of the averaged weights, 0 for none",
    "clip_norm": "limit of the gradient's norm, 0 for none",
    "dtype": "of the trained module on a GPU",
    "attention": "attention backend",
    "operators": "auto, triton or reference",
    "seed": "of all draws, and of random weights",
    "device": "where to train",
    "log_every": "steps between lines of the log",
    "evaluate_every": "steps between evaluations, 0: at the end only",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stage and a flag for every field of `ResidentConfig`."""
    add = parser.add_argument
    add("resident_stage", metavar="STAGE", choices=STAGES, help=", ".join(STAGES))
    choices = {"dtype": DTYPES, "device": DEVICES}
    for field in fields(ResidentConfig):
        if field.name not in _HELP:
            continue
        kind = {"int": int, "float": float, "Path": Path}.get(str(field.type).split(" | ")[0], str)
        add(
            f"--{field.name}",
            type=kind,
            default=argparse.SUPPRESS,
            required=field.default is MISSING,
            choices=choices.get(field.name),
            help=f"{_HELP[field.name]}{_default(field.name)}",
        )
    add(
        "--take",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=DIR",
        help="components that come from other pipeline folders",
    )
    add("--no-captured", action="store_true", help="launch every kernel instead of CUDA graphs")


def _default(name: str) -> str:
    field = next(f for f in fields(ResidentConfig) if f.name == name)
    if name in next(iter(DEFAULTS.values())):
        words = ", ".join(f"{stage} {values[name]}" for stage, values in DEFAULTS.items())
        return f" (default: {words})"
    plain = field.default is not MISSING and field.default is not None
    return f" (default: {field.default})" if plain else ""


def config_from(args: argparse.Namespace) -> ResidentConfig:
    """The configuration of parsed flags. ValueError for a wrong value."""
    stage = args.resident_stage
    values = dict(DEFAULTS[stage])
    values |= {k: v for k, v in vars(args).items() if k in _HELP}
    take: list[tuple[str, Path]] = []
    for text in args.take:
        name, found, folder = text.partition("=")
        if not found or not folder:
            raise ValueError(f"--take {text}: write NAME=DIR, e.g. vggt=outputs/nano/vggt")
        if name in dict(take):
            raise ValueError(f"--take {name} is given twice; name one folder")
        take.append((name, Path(folder)))
    return ResidentConfig(stage=stage, take=tuple(take), captured=not args.no_captured, **values)


def execute(args: argparse.Namespace) -> int:
    """Train as the flags say. 0 done, 1 diverged or no memory, 2 wrong input, 130 interrupted."""
    try:
        config = config_from(args)
        # Imported late: this takes seconds, and a wrong number is told before.
        import torch

        from gen3r_training.resident.loop import Diverged, train_resident
    except (ValueError, OSError) as error:
        return _told(error, 2, args.verbose)
    try:
        train_resident(config)
    except (ValueError, OSError) as error:
        return _told(error, 2, args.verbose)
    except Diverged as error:
        return _told(error, 1, args.verbose)
    except torch.cuda.OutOfMemoryError as error:
        text = f"the GPU's memory does not hold this: lower --batch ({config.batch}) or --scenes"
        return _told(RuntimeError(f"{text}; {error}"), 1, args.verbose)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _told(error: Exception, code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    print(f"error: {text}", file=sys.stderr)
    return code
