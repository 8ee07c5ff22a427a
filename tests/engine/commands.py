"""Ways to run the command line in tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gen3r_engine.cli import main
from tests.conftest import REPOSITORY

SMALL = ["--frames", "5", "--size", "56", "--outputs", "cameras"]


def run(*arguments: str) -> int:
    """`gen3r-engine run` in this process, small; the exit code."""
    return main(["run", *SMALL, *arguments])


def environment() -> dict[str, str]:
    floors = [REPOSITORY, *(REPOSITORY / x for x in ("kernels", "engine", "export", "training"))]
    inherited = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, floors), *inherited])}


def process(
    *arguments: str, cwd: Path, starter: Callable[..., Any] = subprocess.run, **settings: Any
) -> Any:
    """`gen3r-engine` as a process of its own, which Ctrl-C reaches.

    A shell starts background jobs with SIGINT ignored, and their children inherit that.
    """
    command = [sys.executable, "-m", "gen3r_engine.cli", *arguments]
    settings |= {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    return starter(command, cwd=cwd, env=environment(), text=True, **settings)
