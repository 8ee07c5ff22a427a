"""What every export format is given: one graph of one part, with its names, shapes and examples.

Nothing here knows the model, so that whoever runs exported files needs no model code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Tell = Callable[[str], None]  # a line about what is being done
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
}


@dataclass(frozen=True)
class DimRange:
    """Lengths that a dynamic axis may have: least, the one to optimise for, most."""

    least: int
    best: int
    most: int

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.best <= self.most:
            raise ValueError(
                f"lengths {self.least}, {self.best}, {self.most} of an axis must be above 0 and "
                "rise"
            )


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph.

    shape : a length, or the name of a dynamic axis (a key of `Graph.dims`), or for an axis that
        follows one a text like ``"2*batch"`` or ``"4*frames"``.
    dtype : a key of `DTYPES`.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def sizes(self, lengths: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every axis a number."""
        return tuple(s if isinstance(s, int) else _length(s, lengths) for s in self.shape)


def _length(text: str, lengths: Mapping[str, int]) -> int:
    """``"frames"``, ``"4*frames"`` or ``"4*frames+1"`` with the axes' lengths put in."""
    product, _, added = text.partition("+")
    factor, _, name = product.rpartition("*")
    return int(factor or 1) * lengths[name] + int(added or 0)


@dataclass(frozen=True)
class Graph:
    """One file to be exported.

    Parameters
    ----------
    name : stem of its files, e.g. ``vae_decoder_next``.
    part, form : what it is of, and which of the part's graphs: ``clip`` (or ``whole`` where there
        is no clip), ``first`` and ``next`` of a clip taken in chunks.
    module : in evaluation mode, in the target dtype; ``module(*inputs)`` gives the outputs as a
        tuple, in the order of `outputs`.
    inputs, outputs : names, shapes and dtypes, in order.
    dims : lengths of the dynamic axes that the shapes name; empty for a static graph.
    example : makes inputs at given lengths of the dynamic axes (seeded, on the module's device).
    wide : makes the same module in float32, what results are compared with; None: `module` itself.
    """

    name: str
    part: str
    form: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, DimRange]
    example: Callable[[Mapping[str, int]], tuple[Tensor, ...]]
    wide: Callable[[], nn.Module] | None = None

    def lengths(self, which: str = "best") -> dict[str, int]:
        """Lengths of the dynamic axes: ``least``, ``best`` or ``most`` of each."""
        return {name: getattr(dim, which) for name, dim in self.dims.items()}

    def examples(self, which: str = "best") -> tuple[Tensor, ...]:
        """Inputs at these lengths."""
        return self.example(self.lengths(which))


@dataclass(frozen=True)
class Exported:
    """What exporting one graph gave.

    files : names inside the folder, the one to open first.
    seconds : of ``export``, ``build``, ``check``.
    errors : relative errors against PyTorch, by what was compared.
    checked : what was checked, in a word or a reason: {"onnx.checker": "passed", "run": "..."}.
    facts : anything else about the files that the manifest shall keep (JSON values).
    """

    files: tuple[str, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    checked: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def file_bytes(folder: Path, names: tuple[str, ...]) -> int:
    """Size of the files together."""
    return sum((folder / name).stat().st_size for name in names)
