"""A golden fixture file: tensors, weights, metadata, and comparison with a record of the errors.

Sizes come from the metadata and the tensors, never from a test, so that a folder of fixtures made
with other seeds, widths or lengths runs as well.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

COMPONENT_TOLERANCE = 2e-5  # of max|ref|, float32 on CPU; noise floor measured 3e-7 to 4e-6
END_TO_END_TOLERANCE = 1e-4
MASK_TOLERANCE = 1e-4  # share of boolean entries that may differ (percentile edges)


@dataclass(frozen=True)
class Row:
    """One comparison."""

    folder: str
    kind: str
    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


RECORD: list[Row] = []


@cache
def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, "pt") as handle:
        metadata = dict(handle.metadata() or {})
    parsed: dict[str, Any] = {}
    for key, text in metadata.items():
        try:
            parsed[key] = json.loads(text)
        except json.JSONDecodeError:
            parsed[key] = text
    return load_file(path), parsed


def widen(tensor: Tensor) -> Tensor:
    """float16 storage is exact float32 data; everything else stays as it is."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


@dataclass
class Golden:
    """One fixture file of one folder. `kind` is the file's stem."""

    folder: Path
    kind: str
    failures: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.kind}.safetensors"

    @property
    def meta(self) -> dict[str, Any]:
        return _read(self.path)[1]

    @property
    def names(self) -> list[str]:
        """Every tensor name that is not a weight, sorted."""
        return sorted(n for n in _read(self.path)[0] if not n.startswith("w/"))

    def sibling(self, kind: str) -> Golden:
        """Another file of the same folder (e2e weights, say)."""
        return Golden(self.folder, kind, self.failures)

    def __contains__(self, name: str) -> bool:
        return name in _read(self.path)[0]

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, float16 widened to float32."""
        return widen(_read(self.path)[0][name])

    def weights(self, prefix: str = "w/") -> dict[str, Tensor]:
        """The state dict stored under `prefix` (``w/``, or ``<component>/`` in e2e_weights)."""
        tensors = _read(self.path)[0]
        return {
            n.removeprefix(prefix): widen(t) for n, t in tensors.items() if n.startswith(prefix)
        }

    def cases(self, pattern: str) -> list[str]:
        """Distinct first groups of `pattern` over the tensor names, in natural order."""
        found = {m.group(1) for n in self.names if (m := re.match(pattern, n))}
        return sorted(
            found, key=lambda s: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", s)]
        )

    def stored(self, name: str) -> tuple[str, int] | None:
        """(stored name, spatial stride) of a result kept whole or as ``<name>_s<stride>``."""
        if name in self:
            return name, 1
        for candidate in self.names:
            if m := re.fullmatch(re.escape(name) + r"_s(\d+)", candidate):
                return candidate, int(m.group(1))
        return None

    def check(
        self,
        name: str,
        actual: Tensor,
        tolerance: float = COMPONENT_TOLERANCE,
        *,
        axes: tuple[int, ...] = (-2, -1),
    ) -> None:
        """Compare with the stored result, sampled along `axes` as it is. An absent name fails.

        The error is max|actual - ref| / max|ref|; for booleans the share of entries that differ.
        """
        found = self.stored(name)
        if found is None:
            self.failures.append(f"{self.kind}/{name}: not in {self.path}")
            return
        reference, stride = self[found[0]], found[1]
        for axis in axes if stride > 1 else ():
            index = torch.arange(0, actual.shape[axis], stride, device=actual.device)
            actual = actual.index_select(axis, index)
        self.compare(name, actual, reference, tolerance)

    def compare(
        self, name: str, actual: Tensor, reference: Tensor, tolerance: float = COMPONENT_TOLERANCE
    ) -> None:
        """Compare two tensors and record the error under `name`."""
        if actual.shape != reference.shape:
            self.failures.append(
                f"{self.kind}/{name}: shape {tuple(actual.shape)}, "
                f"expected {tuple(reference.shape)}"
            )
            return
        if reference.dtype == torch.bool:
            error = (actual.cpu() != reference).double().mean().item()
            tolerance = max(MASK_TOLERANCE, 1 / reference.numel())  # one entry of a small mask
        else:
            error = relative_error(actual, reference)
        row = Row(str(self.folder), self.kind, name, error, tolerance)
        RECORD.append(row)
        if not row.ok:
            self.failures.append(f"{self.kind}/{name}: error {error:.2e} > {tolerance:.0e}")

    def finish(self) -> None:
        """Fail with every mismatch at once."""
        failures, self.failures = self.failures, []
        assert not failures, "\n".join(failures)


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """max|actual - reference| / max|reference| in float64; NaN when one side alone has a NaN."""
    a, r = actual.detach().cpu().double(), reference.double()
    if r.numel() == 0:
        return 0.0
    same = (a == r) | (a.isnan() & r.isnan())
    difference = torch.where(same, 0.0, (a - r).abs())
    scale = r[r.isfinite()].abs().max().item() if r.isfinite().any() else 1.0
    return difference.max().item() / max(scale, 1e-30)
