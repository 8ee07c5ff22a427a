"""What every benchmark row carries, and where rows go.

A row is one JSON object on a line of ``benchmarks/results/<gpu>/<suite>.jsonl``: op, provider,
shape, dtype, p20/p50/p80 in ms, what else was measured, GPU, versions, commit.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent
PACKAGES = ("torch", "triton", "transformers", "diffusers", "safetensors", "numpy", "fa3-fwd")


def versions() -> dict[str, str]:
    """Python, the packages that matter here, CUDA and the driver."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[
            0
        ]
    return found


def commit() -> str:
    """The checkout's commit, with a plus when tracked files differ; "unknown" outside git."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True)
    return head.stdout.strip() + ("+" if changed.returncode else "")


def device_name() -> str:
    """The GPU's name, or the processor architecture and core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu {platform.machine()} {torch.get_num_threads()} threads"


def percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 of the repeats."""
    if len(milliseconds) == 1:
        return dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), round(milliseconds[0], 3))
    cuts = statistics.quantiles(milliseconds, n=10, method="inclusive")
    values = {"p20_ms": cuts[1], "p50_ms": cuts[4], "p80_ms": cuts[7]}
    return {name: round(value, 3) for name, value in values.items()}


@dataclass(frozen=True)
class Row:
    """One measurement. `extra` holds memory, rates, errors: whatever the suite measures besides."""

    op: str
    provider: str
    shape: str
    dtype: str
    milliseconds: list[float]
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self, environment: dict[str, Any]) -> dict[str, Any]:
        values = asdict(self)
        times, extra = values.pop("milliseconds"), values.pop("extra")
        repeats = {"repeats": len(times)}
        return {**values, **percentiles(times), **repeats, **extra, **environment}


def write_rows(
    rows: Sequence[Row], suite: str, folder: Path | None = None, revision: str | None = None
) -> Path:
    """Write the rows of a suite, replacing its earlier ones for this GPU; returns the file."""
    gpu = device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    target = (folder or ROOT / "results") / slug / f"{suite}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    environment = {"gpu": gpu, "versions": versions(), "commit": revision or commit()}
    lines = [json.dumps(row.to_json(environment)) for row in rows]
    target.write_text("\n".join(lines) + "\n")
    return target
