"""Write the model's parts as files to ship: ONNX, TensorRT plans, AOTInductor packages.

gen3r-engine export --list
gen3r-engine export --pretrained checkpoints/gen3r --parts vae_decoder,adapter_decoder \\
    --format onnx --precision fp16 --size 560 --frames 49 --out plans
gen3r-engine export --pretrained checkpoints/gen3r --parts all --format aoti --precision bf16 \\
    --device cuda --out plans
gen3r-engine run --plans plans --pretrained checkpoints/gen3r --frame_path photo.jpg

Is what a folder holds right, on this machine? Every file is verified, run and compared:
  gen3r-engine export --check plans --pretrained checkpoints/gen3r

A model repository for NVIDIA Triton Inference Server, of the folder given with --out:
  gen3r-engine export --triton-repository models --out plans

Exit code 0: done; 1: a graph could not be exported, or a check failed; 2: wrong input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gen3r_engine.cli.errors import UsageError, user_input
from gen3r_engine.cli.progress import note, print_table
from gen3r_engine.cli.requests import parse_size

if TYPE_CHECKING:
    from gen3r_export.config import ExportConfig
    from gen3r_export.manifest import Entry

HELP = "write parts of the model as ONNX, TensorRT or AOTInductor files"
MODES = ("list", "check", "triton_repository")
# Flags of an export itself, which the other modes do not take.
OF_EXPORT = (
    *("parts", "format", "precision", "size", "frames", "batch", "form", "no_run"),
    *("capabilities", "workspace_gib", "working_gib", "refit", "timing_cache", "device", "opset"),
)

OF_TENSORRT = ("capabilities", "workspace_gib", "refit", "timing_cache")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `export`."""
    add = parser.add_argument
    add(
        "--pretrained_model_name_or_path",
        "--pretrained",
        metavar="PATH_OR_ID",
        help="folder or hub id of a checkpoint; default: the small embedded model",
    )
    add("--parts", metavar="LIST", help="comma list of parts (see --list), or all (default)")
    add("--format", help="onnx (default), tensorrt or aoti")
    add("--precision", help="fp32 (default), fp16, bf16 or fp8")
    add("--size", metavar="N|HxW", help="pixels, multiples of 56; default: the model's (560)")
    add("--frames", metavar="N|N:M", help="4k + 1; N:M is dynamic; default: the model's (49)")
    add("--batch", metavar="N|N:M", help="scenes at once; N:M is dynamic (default: 1)")
    add("--out", type=Path, metavar="DIR", help="folder of the files and plans.json")
    add("--form", help="of the video autoencoders: clip, chunk or both (default)")
    add("--no-run", action="store_true", default=None, help="do not run and compare the files")
    add("--device", help="of AOTInductor packages: cpu (default) or cuda")
    add("--opset", type=int, metavar="N", help="of ONNX, 18 to 23 (default: 20)")
    add("--working-gib", type=float, metavar="GIB", help="for a whole clip's activations (4.5)")
    add("--allow_pickle", action="store_true", help="load .pth files too (weights only)")
    add = parser.add_argument_group("TensorRT").add_argument
    add(
        "--capabilities",
        metavar="LIST",
        help="compute capabilities that TensorRT-RTX builds for, such as 89,120",
    )
    add("--workspace-gib", type=float, metavar="GIB", help="memory of the builder")
    add("--refit", action="store_true", default=None, help="plans whose weights can be replaced")
    add("--timing-cache", type=Path, metavar="FILE", help="timings kept between builds")
    add = parser.add_argument_group("other than exporting").add_argument
    add("--list", action="store_true", help="say which parts and formats there are")
    add("--check", type=Path, metavar="DIR", help="verify, run and compare what a folder holds")
    add(
        "--triton-repository",
        type=Path,
        metavar="REPO",
        help="write a model repository for Triton Inference Server from the folder of --out",
    )


def main(args: argparse.Namespace) -> int:
    """Export, or do what another mode says."""
    modes = [name for name in MODES if getattr(args, name)]
    if len(modes) > 1:
        flags = " and ".join("--" + name.replace("_", "-") for name in modes)
        raise UsageError(f"{flags} do not go together; give one of them")
    if not modes:
        return _export(args)
    for name in OF_EXPORT:
        if getattr(args, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} belongs to an export, not to "
                f"--{modes[0].replace('_', '-')}; leave it out"
            )
    return {"list": _list, "check": _check, "triton_repository": _repository}[modes[0]](args)


# ----------------------------------------------------------------------------------------- export


def _export(args: argparse.Namespace) -> int:
    if args.out is None:
        raise UsageError("no folder to export into; give --out DIR")
    _refuse_others(args)
    config = export_config(args)
    from safetensors import SafetensorError

    from gen3r_export.export import load_model, run_export

    name = args.pretrained_model_name_or_path
    with user_input(kinds=(ValueError, OSError, SafetensorError)):
        done = run_export(
            lambda: load_model(name, config, args.allow_pickle),
            config,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
    print_table(HEADINGS, [_row(entry) for entry in done.entries])
    word = "entry" if len(done.entries) == 1 else "entries"
    print(f"{len(done.entries)} {word} in {config.out / 'plans.json'}")
    for graph, reason in done.failed.items():
        note(f"{graph} was not exported: {reason}")
    return 1 if done.failed else 0


def _refuse_others(args: argparse.Namespace) -> None:
    """UsageError for a flag that the format does not read."""
    format = args.format or "onnx"
    idle = OF_TENSORRT if format != "tensorrt" else ()
    if format == "aoti":
        idle = (*idle, "opset")
    elif args.device == "cuda":
        idle = (*idle, "device")
    for name in idle:
        if getattr(args, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} has no meaning for format {format}; leave it out"
            )


def export_config(args: argparse.Namespace) -> ExportConfig:
    """The config that the flags ask for. UsageError for a value that cannot be."""
    from gen3r_export.config import ExportConfig
    from gen3r_export.parts import chosen_parts

    with user_input("--size"):
        size = parse_size(args.size)
    given = {
        "parts": _names(args.parts) if args.parts not in (None, "all") else None,
        "format": args.format,
        "precision": args.precision,
        "height": None if size is None else size[0],
        "width": None if size is None else size[1],
        "frames": parse_range("--frames", args.frames),
        "batch": parse_range("--batch", args.batch),
        "form": args.form,
        "out": args.out.expanduser(),
        "run": None if args.no_run is None else False,
        "opset": args.opset,
        "capabilities": None if args.capabilities is None else _names(args.capabilities),
        "workspace_gib": args.workspace_gib,
        "working_gib": args.working_gib,
        "refit": args.refit,
        "timing_cache": args.timing_cache,
        "device": args.device,
    }
    with user_input():
        config = ExportConfig(**{k: v for k, v in given.items() if v is not None})
        chosen_parts(config)
    return config


def parse_range(flag: str, text: str | None) -> tuple[int, int] | None:
    """``4`` as (4, 4), ``1:4`` as (1, 4). UsageError for anything else."""
    if text is None:
        return None
    least, colon, most = text.partition(":")
    try:
        return int(least), int(most if colon else least)
    except ValueError:
        raise UsageError(f"{flag} {text} is no number and no range such as 1:4") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


HEADINGS = ("graph", "format", "checked", "error", "MB", "seconds")


def _row(entry: Entry) -> Sequence[str]:
    error = entry.errors.get("float32", max(entry.errors.values(), default=None))
    where = f" {entry.gpu}" if entry.gpu is not None else ""
    checked = entry.checked.get("run") or "; ".join(f"{k}: {v}" for k, v in entry.checked.items())
    seconds = sum(entry.seconds.get(name, 0.0) for name in ("export", "parse", "build", "check"))
    return (
        entry.name,
        f"{entry.format} {entry.precision}{where}",
        checked,
        "" if error is None else f"{error:.1e}",
        f"{entry.bytes / 1e6:.1f}",
        f"{seconds:.1f}",
    )


# ------------------------------------------------------------------------------------ other modes


def _list(args: argparse.Namespace) -> int:
    from gen3r_export.config import FORMATS, ExportConfig
    from gen3r_export.export import check_installed
    from gen3r_export.parts import COMPONENT, PART_NAMES

    graphs = {
        "denoiser": "denoiser_prepare, denoiser_step",
        **{
            name: f"{name}, {name}_first, {name}_next"
            for name in PART_NAMES
            if name.startswith(("vae", "adapter"))
        },
    }
    rows = [(name, COMPONENT[name], graphs.get(name, name)) for name in PART_NAMES]
    print_table(("part", "component", "graphs"), rows)
    found = []
    for name in FORMATS:
        try:
            check_installed(ExportConfig(format=name))
        except ValueError as error:
            found.append((name, f"no: {error}"))
        else:
            found.append((name, "yes"))
    print_table(("format", "can be exported here"), found)
    return 0


def _check(args: argparse.Namespace) -> int:
    from safetensors import SafetensorError

    from gen3r_export.selftest import FAILED, PASSED, check_folder

    name = args.pretrained_model_name_or_path
    with user_input(kinds=(ValueError, OSError, SafetensorError)):
        rows = check_folder(
            args.check.expanduser(),
            name,
            lambda line: print(line, flush=True),
            args.allow_pickle,
        )
    failed = sum(row.verdict == FAILED for row in rows)
    passed = sum(row.verdict == PASSED for row in rows)
    others = len(rows) - failed - passed
    print(f"{passed} passed, {failed} failed, {others} not run here")
    return 1 if failed else 0


def _repository(args: argparse.Namespace) -> int:
    from gen3r_export.serving import write_triton_repository

    if args.out is None:
        raise UsageError("--triton-repository is made from an export folder; give it as --out DIR")
    with user_input():
        done = write_triton_repository(args.out.expanduser(), args.triton_repository)
    for name, entry in done.models.items():
        print(f"{name}: {entry}")
    for entry_name, reason in done.refused.items():
        note(f"{entry_name} is left out: {reason}")
    print(f"{len(done.models)} models in {done.path}")
    return 0
