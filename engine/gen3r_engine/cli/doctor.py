"""Say what this machine can run, and check a checkpoint folder against the expected tensors.

gen3r-engine doctor
gen3r-engine doctor --pretrained_model_name_or_path checkpoints/gen3r
"""

from __future__ import annotations

import argparse
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from gen3r_engine.cli.errors import UsageError, user_input
from gen3r_engine.native import native, why_missing
from gen3r_engine.versions import EXTENSION, versions

HELP = "say what this machine can run, and check a checkpoint"
# triton has no CPU-only platform wheels everywhere; gen3r-engine may run from a source tree.
_OPTIONAL = ("triton", "gen3r-engine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `doctor`."""
    parser.add_argument(
        "--pretrained_model_name_or_path", metavar="PATH", help="checkpoint folder to check"
    )


def main(args: argparse.Namespace) -> int:
    """Print the findings; 1 when something is wrong, else 0."""
    problems: list[str] = []
    sections: list[Callable[[list[str]], None]] = [_system, _libraries, _gpu, _attention]
    for section in sections:
        section(problems)
    if args.pretrained_model_name_or_path is not None:
        _checkpoint(Path(args.pretrained_model_name_or_path).expanduser(), problems)
    print()
    if not problems:
        print("all well")
        return 0
    print(f"{len(problems)} problem(s):")
    for problem in problems:
        print(f"  - {problem}")
    return 1


def _heading(text: str) -> None:
    print(f"\n{text}")


def _row(name: str, value: str) -> None:
    print(f"  {name:<16} {value}")


def _system(problems: list[str]) -> None:
    _heading("system")
    _row("python", platform.python_version())
    _row("platform", platform.platform())
    disk = shutil.disk_usage(Path.cwd())
    _row("disk here", f"{disk.free / 2**30:.0f} GiB free")


def _libraries(problems: list[str]) -> None:
    _heading("libraries")
    for name, version in versions().items():
        if name in ("python", EXTENSION):
            continue
        _row(name, version or "not installed")
        if version is None and name not in _OPTIONAL:
            problems.append(f"{name} is not installed: pip install {name}")
    _row(EXTENSION, f"no: {why_missing()}" if native() is None else "yes (C++)")
    import av

    if "libx264" not in av.codecs_available:
        problems.append("av has no H.264 encoder: install av from its binary wheel")


def _gpu(problems: list[str]) -> None:
    import torch

    _heading("GPU")
    if not torch.cuda.is_available():
        built = torch.version.cuda or "none, a CPU build"
        _row("none", f"torch's CUDA: {built}; everything runs on the CPU")
        return
    _row("torch's CUDA", str(torch.version.cuda))
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        _row(
            f"cuda:{index}",
            f"{found.name}, compute capability {found.major}.{found.minor}, "
            f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        )


def _attention(problems: list[str]) -> None:
    import torch

    from gen3r_kernels import ATTENTION_BACKENDS
    from gen3r_kernels.attention_libraries import fa4_is_installed
    from gen3r_kernels.backends import explain

    _heading("attention backends")
    for name, backend in ATTENTION_BACKENDS.items():
        reason = backend.why_not()
        notes = [] if backend.has_backward else ["no backward"]
        if not backend.exact:
            notes.append("8-bit products, never taken by auto")
        state = f"no: {reason}" if reason else "yes"
        _row(name, f"{state} ({', '.join(notes)})" if notes else state)
    # A sequence as long as the transformer's at 49 frames of 560 x 560; one head is enough to ask.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.empty((1, 31_850, 1, 128), dtype=torch.bfloat16, device=device)
    for line in explain(tokens):
        _row("", line)
    missing = "not installed (on Hopper, for training: pip install 'gen3r-engine[fa4]')"
    _row("backward: fa4", "yes" if fa4_is_installed() else missing)


def _checkpoint(path: Path, problems: list[str]) -> None:
    from gen3r.checkpoint import inspect_checkpoint

    if not path.is_dir():
        raise UsageError(f"checkpoint {path} is not a folder; give the downloaded folder's path")
    _heading(f"checkpoint {path}")
    with user_input():
        reports = inspect_checkpoint(path)
    for report in reports:
        _row(report.name, ("ok, " if report.ok else "WRONG, ") + report.detail)
        for problem in report.problems:
            print(f"    {problem}")
        if not report.ok:
            first = report.problems[0] if report.problems else report.detail
            more = f" (and {len(report.problems) - 1} more)" if len(report.problems) > 1 else ""
            problems.append(f"{report.name}: {first}{more}")
