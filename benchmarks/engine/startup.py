"""From the start of a process to its first finished denoising step: cold, warm, prompt known.

gen3r-engine bench --suite startup --preset exact fp8
gen3r-engine bench --suite startup -- --model nano --frames 5 --size 112

Every run is a process of its own. cold: the cache folder is empty, everything is compiled (a row
of compile time). warm: the same again, the text encoder is loaded. startup_known_prompt: warm, and
the text features are in the disk cache, so that the text encoder is not loaded. Without
a checkpoint the real sizes take a sparse one, whose pages are holes: no disk time is in the
figures, as with a checkpoint that lies in the page cache. The seconds at which imports, loading and
encoding were done are in `config`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine.common import Options, Provider, Rows, parser, resolve_options
from benchmarks.engine.first_step import RESULT
from benchmarks.harness import COMPILE
from benchmarks.sparse_checkpoint import write_sparse_checkpoint
from gen3r.config import GEN3R

CHECKOUT = Path(__file__).resolve().parents[2]
FLOORS = ("", "kernels", "engine", "export", "training")
# Set by a suite that ran before in this process, they would lead past the empty folder.
COMPILE_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def first_step(config: dict[str, Any], checkpoint: str | None, options: Options) -> dict[str, Any]:
    """Run the process; its marks in seconds since it was started.

    Raises
    ------
    RuntimeError : it failed; the text is its last line.
    """
    paths = [str(CHECKOUT / name) for name in FLOORS]
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {k: v for k, v in os.environ.items() if k not in COMPILE_FOLDERS}
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [inherited])])
    command = [sys.executable, "-m", "benchmarks.engine.first_step"]
    command += ["--config", json.dumps(config), "--frames", str(options.frames)]
    command += ["--size", str(options.size)]
    command += ["--checkpoint", checkpoint] if checkpoint is not None else []
    started = time.time()
    run = subprocess.run(
        [*command, "--started", repr(started)], env=environment, capture_output=True, text=True
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith(RESULT)]
    if run.returncode != 0 or not lines:
        last = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"the process ended with {run.returncode}: {last}")
    found: dict[str, Any] = json.loads(lines[0].removeprefix(RESULT))
    return found


def measure(provider: Provider, checkpoint: str | None, options: Options, rows: Rows) -> None:
    """Three processes on one cache folder that begins empty."""
    provider.choice(options)  # a preset that does not run here is skipped, not failed
    base = provider.config(options)
    with tempfile.TemporaryDirectory() as folder:
        for name, case, prompts in (
            ("cold", "startup", "disk"),
            ("warm", "startup", "memory"),
            ("warm", "startup_known_prompt", "disk"),
        ):
            config = dataclasses.asdict(base) | {"cache_dir": folder, "prompt_cache": prompts}
            found = first_step(config, checkpoint, options)
            seconds = found["seconds"]
            extra = COMPILE if name == "cold" else {}
            rows.add(
                *(case, provider.name, "time", "s", [seconds["first step"]]),
                run=name,
                compile_cache=found["cache"],
                seconds_at=seconds,
                **extra,
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite and write benchmarks/results/<gpu>/startup.jsonl; 1 if a provider failed."""
    options = resolve_options(parser("startup", __doc__, ("exact",)).parse_args(argv))
    rows = Rows("startup", options)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = options.checkpoint
        if checkpoint is None and options.model is GEN3R:
            checkpoint = str(Path(scratch) / "checkpoint")
            write_sparse_checkpoint(Path(checkpoint))
        rows.each(lambda provider: measure(provider, checkpoint, options, rows))
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())
