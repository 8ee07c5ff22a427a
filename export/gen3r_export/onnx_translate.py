"""How PyTorch operators become ONNX operators where the exporter's own choice will not do.

`nearest-exact` resampling becomes a table of indices and a GatherND in the exporter. ONNX has it as
Resize: output i of n outputs reads input floor((i + 1/2) m / n) of m, which is `half_pixel`
coordinates, x = (i + 1/2) m / n - 1/2, rounded to the nearest index, halves up
(`round_prefer_ceil`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import onnx_ir as ir

# What must not be in a graph, and what to write in its place.
FORBIDDEN = {
    "GatherND": "resample with Resize",
    "ScatterND": "concatenate; do not write in place",
    "ScatterElements": "concatenate; do not write in place",
    "NonZero": "select with Where or Slice",
    "If": "make one graph for each case",
    "Loop": "unroll it",
    "Scan": "unroll it",
    "SequenceConstruct": "concatenate tensors",
    "RandomNormal": "take noise as an input",
    "RandomNormalLike": "take noise as an input",
    "Dropout": "export in evaluation mode",
}
STANDARD = ("", "ai.onnx")


def forbidden(model: ir.Model) -> list[str]:
    """Operators that must not be in a graph, each with its number and the mend; empty: none is.

    Operators of another domain than ONNX's own belong to nobody who runs the graph.
    """
    found: Counter[str] = Counter()
    mends: dict[str, str] = {}
    for node in model.graph.all_nodes():
        if node.domain not in STANDARD:
            name = f"{node.domain}::{node.op_type}"
            mends[name] = "write it with PyTorch's own operators"
        elif node.op_type in FORBIDDEN:
            name = node.op_type
            mends[name] = FORBIDDEN[name]
        else:
            continue
        found[name] += 1
    return [f"{count} x {name} ({mends[name]})" for name, count in sorted(found.items())]


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """`custom_translation_table` of `torch.onnx.export`."""
    from onnxscript import opset18

    op: Any = opset18  # what the exporter writes before it raises the opset

    def nearest_exact(
        x: Any,  # [N, C, H, W]
        output_size: Sequence[int] | None = None,
        scale_factors: Sequence[float] | None = None,
    ) -> Any:  # [N, C, H', W']
        how = {
            "mode": "nearest",
            "coordinate_transformation_mode": "half_pixel",
            "nearest_mode": "round_prefer_ceil",
        }
        if output_size is None:
            factors = [1.0, 1.0, *(float(factor) for factor in scale_factors or ())]
            return op.Resize(x, None, op.Constant(value_floats=factors), None, **how)
        size = op.Constant(value_ints=[int(length) for length in output_size])
        return op.Resize(x, None, None, op.Concat(op.Shape(x, start=0, end=2), size, axis=0), **how)

    return {torch.ops.aten._upsample_nearest_exact2d.vec: nearest_exact}
