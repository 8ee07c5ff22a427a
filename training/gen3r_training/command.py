"""A training command from flags to exit code, for the scripts and ``gen3r-engine train``.

Exit codes: 0 done, 1 failed, 2 wrong input (one line says what and how to mend it), 130 stopped by
Ctrl-C, 143 by SIGTERM; a stopped run has saved its last step.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gen3r_training.arguments import OneLineParser, add_arguments, config_from

if TYPE_CHECKING:
    from gen3r_training.config import TrainConfig
    from gen3r_training.data import SceneDataset

LONGEST = 600  # characters of an error's line
SHOWN = 5  # scenes that are named where some are left out
INTERRUPTED = 130


def main(stage: str, description: str | None, argv: Sequence[str] | None = None) -> int:
    """A script's command line (the process's arguments when `argv` is None); the exit code."""
    parser = OneLineParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_arguments(parser, stage)
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or the error
        return int(stop.code or 0)
    return execute(args, stage)


def execute(args: argparse.Namespace, stage: str) -> int:
    """Train as the flags say; errors are told in one line. Returns the exit code."""
    try:
        config = config_from(args, stage)
        _require_accelerate()
        # Imported late: this takes seconds, and a wrong number is told before.
        from gen3r_training.stopping import Stopped, TrainingError
    except (ValueError, OSError) as error:
        return _told(error, 2, args.verbose)
    try:
        folder = run(config)
    except (ValueError, OSError) as error:
        return _told(error, 2, args.verbose)
    except TrainingError as error:
        return _told(error, 1, args.verbose)
    except Stopped as stop:
        return _told(stop, stop.exit_code, args.verbose, "")
    except KeyboardInterrupt:
        return _told(KeyboardInterrupt("interrupted"), INTERRUPTED, args.verbose, "")
    if _is_main():
        print(folder)
    return 0


def run(config: TrainConfig) -> Path:
    """Check everything, load the model, train; returns OUTPUT/final_pipeline.

    Raises
    ------
    ValueError, OSError : wrong input. TrainingError, Stopped : see `gen3r_training.loop.train`.
    """
    from gen3r_training.stages import plan_stage

    plan = plan_stage(config)
    from gen3r_training.checkpoints import check_module
    from gen3r_training.loop import train
    from gen3r_training.parallel import start
    from gen3r_training.resume import check_output

    parallel = start(config)
    try:
        found = check_output(config, parallel.data_ranks).checkpoint
        if found is not None:  # a model of another size is told before weights are loaded
            check_module(found, plan.outline())
        if config.deterministic:
            _repeat_to_the_bit()
        if parallel.is_main:
            _tell_skipped(plan.dataset)
        return train(plan.build(parallel), config, parallel)
    finally:
        parallel.close()


def _repeat_to_the_bit() -> None:
    """Let PyTorch and our operators choose what repeats; told where there is no choice."""
    import torch

    # cuBLAS reads this when a device is first used; without it PyTorch refuses its products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def _require_accelerate() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("training needs the package accelerate: pip install 'gen3r-engine[train]'")


def _tell_skipped(dataset: SceneDataset) -> None:
    skipped = dataset.skipped
    if not skipped:
        return
    kept = sum(dataset.counts)
    print(f"skipped {len(skipped)} of {kept + len(skipped)} training scenes:", file=sys.stderr)
    for name, reason in list(skipped.items())[:SHOWN]:
        print(f"  {name}: {reason}", file=sys.stderr)
    if len(skipped) > SHOWN:
        print(f"  and {len(skipped) - SHOWN} more", file=sys.stderr)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _told(error: BaseException, code: int, verbose: bool, prefix: str = "error: ") -> int:
    """Print the error on one line (every rank fails alike: the first one speaks)."""
    if verbose:
        traceback.print_exception(error)
    if _is_main():
        parts = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = "; ".join(parts).replace(":;", ":") or type(error).__name__
        if len(text) > LONGEST:
            text = text[:LONGEST].rstrip() + " ... (-v shows all of it)"
        print(f"{prefix}{text}", file=sys.stderr)
    return code
