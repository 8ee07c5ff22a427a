"""Seconds and peak host memory of loading a checkpoint onto a device.

    python -m benchmarks.loading                        # a sparse checkpoint of the real layout
    python -m benchmarks.loading --checkpoint DIR --device cuda

A sparse checkpoint's pages are holes, so its seconds hold no disk time; its memory is real.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import Measurement, library_versions, write_rows
from benchmarks.sparse_checkpoint import write_sparse_checkpoint
from gen3r.checkpoint import inspect_checkpoint
from gen3r.config import GEN3R
from gen3r.nano import ARCHITECTURE
from gen3r.pipeline import Gen3RPipeline


def peak_host_gib() -> float:
    """Largest resident set of this process so far, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(folder: Path, device: str, kind: str) -> list[Measurement]:
    """Check and load once: seconds of both, and the host's peak memory."""
    largest = max(p.stat().st_size for p in folder.rglob("*.safetensors")) / 2**30
    torch.zeros(1, device=device)  # the CUDA context is not the loader's memory
    before = peak_host_gib()
    start = time.perf_counter()
    reports = inspect_checkpoint(folder)
    checked = time.perf_counter() - start
    start = time.perf_counter()
    pipeline = Gen3RPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, device=device)
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    config = {
        "checkpoint": kind,
        "ok": all(r.ok for r in reports),
        "largest_file_gib": round(largest, 3),
        "host_before_gib": round(before, 3),
        "versions": library_versions(),
    }

    def row(case: str, metric: str, unit: str, value: float) -> Measurement:
        what = ("reference", "whole pipeline", "bfloat16")
        return Measurement(case, *what, metric, unit, [value], config=config)

    return [
        row("checkpoint_check", "time", "ms", 1000 * checked),
        row("checkpoint_load", "time", "ms", 1000 * seconds),
        row("checkpoint_load", "memory", "GiB", peak_host_gib()),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write benchmarks/results/<gpu>/loading.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="default: a sparse one is made")
    parser.add_argument("--preset", choices=("gen3r", "nano"), default="gen3r")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", "--revision")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.checkpoint or Path(scratch) / "checkpoint"
        if options.checkpoint is None:
            config = GEN3R if options.preset == "gen3r" else ARCHITECTURE
            write_sparse_checkpoint(folder, config)
        rows = measure(folder, options.device, "given" if options.checkpoint else "sparse")
    for row in rows:
        print(f"{row.case:<18} {row.metric:<8} {row.samples[0]:>12,.1f} {row.unit}")
    print(write_rows(rows, "loading", options.out, options.commit))
    return 0


if __name__ == "__main__":
    sys.exit(main())
