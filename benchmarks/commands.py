"""What `gen3r-engine bench` does: run a suite, report on rows, compare two sets of rows.

The command line loads this module from the checkout; nothing below benchmarks/ is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import compare as comparison
from benchmarks import report as reporting
from benchmarks.harness import RESULTS, BadInput, read_rows

__all__ = ["SUITES", "BadInput", "compare", "report", "run_suite"]

# Suite name to module; each has main(argv) -> exit code.
SUITES = {
    "kernels": "benchmarks.kernels.suite",
    "pipeline": "benchmarks.pipeline",
    "loading": "benchmarks.loading",
    "cpu": "benchmarks.cpu",
    "fusion": "benchmarks.fusion",
    "export": "benchmarks.export.suite",
    "export_aoti": "benchmarks.export.packages",
    "step": "benchmarks.engine.step",
    "fidelity": "benchmarks.engine.fidelity",
    "e2e": "benchmarks.engine.e2e",
    "memory": "benchmarks.engine.memory",
    "startup": "benchmarks.engine.startup",
    "decode": "benchmarks.decode.suite",
    "training": "benchmarks.training.suite",
}


def run_suite(name: str, argv: Sequence[str]) -> int:
    """Run a suite with its own arguments; its rows go to benchmarks/results/<gpu>/<name>.jsonl."""
    main: Callable[[Sequence[str]], int] = importlib.import_module(SUITES[name]).main
    return main(argv)


def report(paths: Sequence[Path], folder: Path) -> int:
    """Print the tables of the rows and write them with the pictures into `folder`.

    Raises
    ------
    BadInput : files that hold no rows, or matplotlib is missing.
    """
    rows = read_rows(paths or [RESULTS])
    print(reporting.markdown(rows))
    for path in reporting.write_report(rows, folder):
        print(path)
    return 0


def compare(before: Path, after: Path, threshold: float) -> int:
    """Print what changed from `before` to `after`; 1 when something became worse.

    Raises
    ------
    BadInput : files that hold no rows, or rows that have nothing in common.
    """
    changes = comparison.compare(read_rows([before]), read_rows([after]), threshold)
    print(comparison.table(changes))
    worse = [change for change in changes.changes if change.verdict == "WORSE"]
    print(f"{len(worse)} worse of {len(changes.changes)} compared, threshold {threshold:.0%}")
    return 1 if worse else 0
