"""Every part in every format: exported, checked, compared with PyTorch; size and seconds.

gen3r-engine bench --suite export                       # NANO, all formats, a few minutes
gen3r-engine bench --suite export -- --format onnx --precision fp16 --part vae_decoder
gen3r-engine bench --suite export -- --model real       # published sizes, random weights: minutes
gen3r-engine bench --suite export -- --table            # the committed rows as a table

Rows: `time` (s, of exporting, or of building from the ONNX file), `size` (MB on disk); `rel_error`
is against PyTorch in float32 where the result was run. Formats tensorrt: TensorRT proper where a
GPU and the library are there, else TensorRT-RTX for the capabilities in the provider's name.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.export.real import real_pipeline
from benchmarks.harness import RESULTS, Measurement, Row, device_name, read_rows, slug, write_rows
from gen3r.nano import build_nano
from gen3r_export.config import ExportConfig
from gen3r_export.export import Model, model_of, run_export
from gen3r_export.manifest import Entry
from gen3r_export.parts import PART_NAMES
from gen3r_kernels import Backends

SUITE = "export"


@dataclass(frozen=True)
class Job:
    """One export. model : ``nano`` or ``real``. values : of the `ExportConfig`."""

    model: str
    parts: tuple[str, ...]
    format: str
    precision: str
    values: dict[str, Any] = field(default_factory=dict)

    def config(self, out: Path) -> ExportConfig:
        return ExportConfig(
            parts=self.parts, format=self.format, precision=self.precision, out=out, **self.values
        )


NANO_PRECISIONS = {
    "onnx": ("fp32", "fp16", "bf16", "fp8"),
    "tensorrt": ("fp32", "fp16", "bf16", "fp8"),
    "aoti": ("fp32", "fp16"),
}
# Chunks of one latent frame: a clip's activations take the memory of a GPU.
_CHUNKS = {"form": "chunk", "frames": (49, 49), "working_gib": 0.5}
_HEADS = {"frames": (5, 5)}
_SHORT = {"frames": (5, 5), "height": 112, "width": 112}
REAL: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("vae_encoder", "vae_decoder"), _CHUNKS),
    (("adapter_encoder", "adapter_decoder"), _CHUNKS),
    (("camera_head", "depth_head", "point_head"), _HEADS),
    (("image_encoder",), {}),
    # The loop's two graphs at a size whose scores a CPU can hold.
    (("denoiser",), _SHORT),
)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """What the options ask for."""
    # A TensorRT export makes the ONNX file first, which has rows of its own.
    formats = options.format or ["tensorrt", "aoti"]
    if options.model == "nano":
        parts = tuple(options.part or PART_NAMES)
        for name in formats:
            for precision in options.precision or NANO_PRECISIONS[name]:
                if precision in NANO_PRECISIONS[name]:
                    yield Job("nano", parts, name, precision)
        return
    for parts, values in REAL:
        chosen = tuple(p for p in parts if not options.part or p in options.part)
        for name in formats if chosen else ():
            for precision in options.precision or ("fp16",):
                run = {"run": False} if options.no_run else {}
                yield Job("real", chosen, name, precision, values | run)


def load(job: Job, config: ExportConfig) -> Model:
    """The model of a job, in the config's dtype."""
    dtype = getattr(torch, config.dtype)
    if job.model == "real":
        return model_of(real_pipeline(config.parts, dtype), "random weights")
    backends = Backends() if job.format == "aoti" else Backends(operators="reference")
    return model_of(build_nano(dtype, backends=backends), "embedded")


def provider_of(entry: Entry) -> str:
    """The format, with what it was built for."""
    if entry.format != "tensorrt" or entry.gpu is None:
        return entry.format
    kind = next((k for k in entry.versions if k.startswith("tensorrt")), "tensorrt")
    return f"{kind} sm{entry.gpu.capability}"


def rows_of(entry: Entry, model: str) -> list[Measurement]:
    """Seconds and size of an entry."""
    least, most = entry.frames
    frames = f"{least}" if least == most else f"{least}..{most}"
    what = (
        entry.name,
        provider_of(entry),
        f"{model} {frames}x{entry.height}x{entry.width}",
        entry.precision,
    )
    config = {
        "checked": dict(entry.checked),
        "errors": dict(entry.errors),
        "seconds": dict(entry.seconds),
        "versions": dict(entry.versions),
        "phase": "compile",
    }
    seconds = seconds_of(entry)
    return [
        Measurement(
            *what, "time", "s", [seconds], rel_error=entry.errors.get("float32"), config=config
        ),
        Measurement(*what, "size", "MB", [entry.bytes / 1e6]),
    ]


def seconds_of(entry: Entry) -> float:
    """Of making the files, checks apart."""
    made = [value for name, value in entry.seconds.items() if name in ("export", "build")]
    return max(sum(made), 1e-3)


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown: one line per graph, format and precision."""
    sizes = {_key(r): r["p50"] for r in rows if r["metric"] == "size"}
    lines = [
        "| model, frames x pixels | graph | format | precision | checked | error | MB | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (r for r in rows if r["metric"] == "time"):
        error = "" if row["rel_error"] is None else f"{row['rel_error']:.1e}"
        checked = "; ".join(f"{k} {v}" for k, v in row["config"]["checked"].items())
        lines.append(
            f"| {row['shape']} | {row['case']} | {row['provider']} | {row['dtype']} | {checked} | "
            f"{error} | {sizes[_key(row)]:.1f} | {row['p50']:.1f} |"
        )
    return "\n".join(lines)


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("case", "provider", "shape", "dtype"))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gen3r-engine bench --suite export --")
    parser.add_argument("--model", choices=("nano", "real"), default="nano")
    parser.add_argument("--format", nargs="+", choices=tuple(NANO_PRECISIONS))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "fp16", "bf16", "fp8"))
    parser.add_argument("--part", nargs="+", choices=PART_NAMES)
    parser.add_argument("--no-run", action="store_true", help="export only, compare nothing")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the files here")
    parser.add_argument("--table", action="store_true", help="print the committed rows")
    parser.add_argument("--out", type=Path, help="results folder (benchmarks/results)")
    parser.add_argument("--commit", help="commit to record where the tree is no git checkout")
    return parser.parse_args(list(argv))


def main(argv: Sequence[str] = ()) -> int:
    """Export and write the rows; 1 when a graph failed."""
    options = parse(argv)
    if options.table:
        path = (options.out or RESULTS) / slug(device_name()) / f"{SUITE}.jsonl"
        print(table(read_rows([path])))
        return 0
    failed: list[tuple[str, str]] = []
    for job in jobs(options):
        with tempfile.TemporaryDirectory() as scratch:
            out = (options.keep or Path(scratch)) / f"{job.model}-{job.format}-{job.precision}"
            config = job.config(out)
            done = run_export(lambda j=job, c=config: load(j, c), config, print)  # type: ignore[misc]
        found = [row for entry in done.entries for row in rows_of(entry, job.model)]
        if found:
            print(write_rows(found, SUITE, options.out, options.commit, merge=True))
        failed += [(f"{n} ({job.format} {job.precision})", why) for n, why in done.failed.items()]
    report = Table("graph", "failed", title=f"{len(failed)} graphs failed")
    for name, why in failed:
        report.add_row(name, why)
    Console().print(report)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
