"""What every benchmark row carries, and where rows go.

A row is one JSON object on a line of ``benchmarks/results/<gpu>/<suite>.jsonl`` with exactly the
keys of `KEYS`: one metric of one provider of one case. docs/benchmarks.md says what each key means.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gen3r_engine.evaluation import record

RESULTS = Path(__file__).resolve().parent / "results"
KEYS = (
    *("suite", "case", "provider", "shape", "dtype", "metric", "unit", "p20", "p50", "p80"),
    *("share_of_ceiling", "rel_error", "gpu", "capability", "driver", "torch", "triton"),
    *("commit", "utc", "config"),
)
UNITS = {
    "time": ("ms", "s"),
    "tflops": ("TFLOP/s",),
    "gbps": ("GB/s",),
    "memory": ("GiB",),
    "energy": ("J",),
    "size": ("MB",),
    "latent_error": ("1",),
    "psnr": ("dB",),
    "lpips": ("1",),
    "abs_rel": ("1",),
    "pose_auc": ("1",),
}
LOWER_IS_BETTER = frozenset(
    {"time", "memory", "size", "energy", "latent_error", "lpips", "abs_rel"}
)
COMPILE: dict[str, Any] = {"phase": "compile"}  # the config of rows that hold compile time
LIBRARIES = (
    "transformers",
    "diffusers",
    "safetensors",
    "numpy",
    "fa3-fwd",
    "flash-attn",
    "flash-attn-4",
    "onnx",
    "onnxruntime",
)

Row = dict[str, Any]  # a line of a results file: KEYS


class BadInput(ValueError):
    """A file, name or number given to a benchmark command is wrong; the text says the mend."""


@dataclass(frozen=True)
class Measurement:
    """One metric of one provider of one case, before the environment is added.

    Parameters
    ----------
    samples : the repeats, in `unit`; a row holds their percentiles.
    share_of_ceiling : achieved / the ceiling measured in the same run, where there is one.
    rel_error : |out - reference| / |reference| (Frobenius), the worst of several outputs.
    config : launch configuration, ceiling, counted work: whatever else is worth keeping.
    """

    case: str
    provider: str
    shape: str
    dtype: str
    metric: str
    unit: str
    samples: Sequence[float]
    share_of_ceiling: float | None = None
    rel_error: float | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.unit not in UNITS.get(self.metric, ()):
            known = ", ".join(f"{m} in {' or '.join(u)}" for m, u in UNITS.items())
            raise ValueError(f"metric '{self.metric}' in '{self.unit}' is unknown; known: {known}")
        if not self.samples:
            raise ValueError(f"{self.case}/{self.provider}: no samples were taken")


@dataclass(frozen=True)
class Environment:
    """Where and with what a run was made."""

    gpu: str
    capability: str | None
    driver: str | None
    torch: str
    triton: str | None
    commit: str
    utc: str


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50 and p80 of the repeats, linear between samples, to five digits."""
    if len(samples) == 1:
        values = [samples[0]] * 3
    else:
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        values = [cuts[1], cuts[4], cuts[7]]
    p20, p50, p80 = (five_digits(value) for value in values)
    return p20, p50, p80


def five_digits(value: float) -> float:
    """Rounded to five significant digits: more is noise."""
    return float(f"{value:.5g}")


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def library_versions() -> dict[str, str]:
    """Python and the packages beside torch and triton that a figure can depend on."""
    found = {name: version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **{k: v for k, v in found.items() if v}}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """The GPU's name, or the processor architecture and thread count."""
    return record.machine_name(_device())


def environment(revision: str | None = None) -> Environment:
    """This machine, now. `revision` stands for the commit where the tree is not a git checkout."""
    found = record.environment(_device(), revision)
    same = {name: found[name] for name in ("gpu", "capability", "driver", "commit", "utc")}
    return Environment(torch=torch.__version__, triton=version("triton"), **same)


def make_row(suite: str, measurement: Measurement, where: Environment) -> Row:
    """The measurement as a row, keys in the order of `KEYS`."""
    values = {"suite": suite, **asdict(measurement), **asdict(where)}
    values["p20"], values["p50"], values["p80"] = percentiles(values.pop("samples"))
    for name in ("share_of_ceiling", "rel_error"):
        if values[name] is not None:
            values[name] = float(f"{values[name]:.4g}")
    values["config"] = {"repeats": len(measurement.samples), **values["config"]}
    return {key: values[key] for key in KEYS}


def phase(row: Row) -> str:
    """ "compile" for compile time, "run" for everything else."""
    return str(row["config"].get("phase", "run"))


def identity(row: Row) -> tuple[str, ...]:
    """What a row measures: two rows with the same identity (and gpu) are comparable."""
    return (
        *(row[k] for k in ("suite", "case", "shape", "dtype", "provider", "metric")),
        phase(row),
    )


def slug(gpu: str) -> str:
    """The results folder of a GPU."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of files, and of all .jsonl files in folders.

    Raises
    ------
    BadInput : no such file, a line that is not a row, or no rows at all.
    """
    rows: list[Row] = []
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path} does not exist; give a .jsonl file or a folder of them")
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                rows.append(_parse(line, f"{file}:{number}"))
    if not rows:
        raise BadInput("no rows found; run a suite first: gen3r-engine bench --suite kernels")
    return rows


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInput(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict) or set(row) != set(KEYS):
        wrong = set(KEYS) ^ set(row) if isinstance(row, dict) else {"not an object"}
        raise BadInput(f"{where}: not a benchmark row; missing or unknown: {sorted(wrong)}")
    return row


def write_rows(
    measurements: Sequence[Measurement],
    suite: str,
    folder: Path | None = None,
    revision: str | None = None,
    *,
    merge: bool = False,
    where: Environment | None = None,
    finished: bool = True,
) -> Path:
    """Write a suite's rows for this GPU; returns the file.

    An earlier file of the suite is replaced, or with `merge` (a run of some cases only) loses just
    the rows of the providers that were measured anew. Rows of a run that is not finished go to a
    file <suite>.part beside it, which the finished run takes away.
    """
    where = where or environment(revision)
    rows = [make_row(suite, measurement, where) for measurement in measurements]
    target = (folder or RESULTS) / slug(where.gpu) / f"{suite}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    if merge and target.exists():
        rows = _merged(read_rows([target]), rows)
    scratch = target.with_suffix(".part")
    scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if not finished:
        return scratch
    os.replace(scratch, target)
    return target


def _merged(old: list[Row], new: list[Row]) -> list[Row]:
    """The old rows with those of newly measured providers replaced, cases in their old order."""
    fresh = {identity(row)[:-2] for row in new}
    rows = [row for row in old if identity(row)[:-2] not in fresh] + new
    order = list(dict.fromkeys(row["case"] for row in (*old, *new)))
    return sorted(rows, key=lambda row: order.index(row["case"]))
