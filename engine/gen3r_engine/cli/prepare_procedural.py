"""``gen3r-engine prepare procedural``: rooms and courtyards that the project renders itself."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen3r_engine.cli.errors import UsageError, user_input
from gen3r_engine.cli.progress import StageProgress

if TYPE_CHECKING:
    from gen3r_training.procedural.prepare import ProceduralReport


def add_procedural_arguments(parser: argparse.ArgumentParser) -> None:
    """The fields of `ProceduralOptions`, whose defaults count where a flag is not given."""
    add = parser.add_argument
    add("destination", metavar="DST", help="where the clips go")
    add("--scenes", type=int, required=True, metavar="N", help="clips to train on")
    add("--held_out", type=int, metavar="K", help="clips to evaluate on (default: 0)")
    add("--seed", type=int, help="of layouts, textures and paths (default: 0)")
    add("--frames", type=int, metavar="N", help="frames of a clip (default: 17)")
    add("--size", type=int, metavar="PX", help="pixels of a side (default: 112)")
    add(
        "--supersample",
        type=int,
        metavar="N",
        help="N x N colour rays a pixel (default: 2)",
    )
    add(
        "--form",
        choices=("packed", "folders", "both"),
        help="shards for training in memory, scene folders with PNG files, or both "
        "(default: packed)",
    )
    add("--device", help="auto, cpu or cuda (default: auto)")
    add("--workers", type=int, metavar="N", help="threads that write PNG files (default: 4)")
    add("--overwrite", action="store_true", default=None, help="write again what is there")


def main(args: argparse.Namespace) -> int:
    """Render and write the clips; 0 when they are all there then."""
    from gen3r.folders import check_writable
    from gen3r_training.procedural.prepare import ProceduralOptions, prepare_procedural

    given = {f.name: getattr(args, f.name, None) for f in fields(ProceduralOptions)}
    values: dict[str, Any] = {name: v for name, v in given.items() if v is not None}
    values["destination"] = Path(os.path.abspath(args.destination))
    values["device"] = _device(args.device or "auto")
    with user_input():
        options = ProceduralOptions(**values)
    with user_input(f"DST {options.destination} can not be written", (OSError,)):
        check_writable(options.destination)
    with (
        StageProgress() as progress,
        user_input("DST can not be written", (OSError,), code=1),
        user_input(kinds=(ValueError,)),
    ):
        report = prepare_procedural(options, progress)
    _tell(report, options.destination)
    return 0


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    with user_input(f"--device {name}", (RuntimeError,)):
        device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name} is neither cpu nor cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: PyTorch sees no GPU; use --device cpu")
    return name


def _tell(report: ProceduralReport, folder: Path) -> None:
    made = sum(report.rendered.values())
    there = sum(report.existing.values())
    rate = f" ({made / report.seconds:.1f} clips/s)" if report.seconds and made else ""
    print(
        f"{made} clips rendered in {report.seconds:.1f} s{rate}, {there} there already, "
        f"{report.total_seconds:.1f} s in all: {folder}"
    )
