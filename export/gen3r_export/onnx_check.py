"""An ONNX file against PyTorch: the checker, a run in onnxruntime, relative errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gen3r_export.compare import largest_error, wrong
from gen3r_export.graph import DTYPES, Graph
from gen3r_export.onnx_runner import open_onnx
from gen3r_export.trace import trace_lengths

PASSED = "passed"


@dataclass(frozen=True)
class Found:
    """What `check_onnx` found: see `gen3r_export.graph.Exported`."""

    errors: dict[str, float] = field(default_factory=dict)
    checked: dict[str, str] = field(default_factory=dict)


def check_onnx(path: Path, graph: Graph, precision: str, *, run: bool) -> Found:
    """Check a file and, where asked, run it at two lengths of its axes, see `measure`.

    Raises
    ------
    ValueError : a file that the checker refuses, results of another shape or dtype than the graph
        says, or beyond the precision's bound and twice PyTorch's own error.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path.name} does not pass onnx.checker: {reason}") from error
    checked = {"onnx.checker": PASSED}
    if not run:
        return Found(checked=checked | {"run": "not asked for"})
    if "bfloat16" in {spec.dtype for spec in (*graph.inputs, *graph.outputs)}:
        reason = "not run: onnxruntime has no bf16 convolutions and products on a CPU"
        return Found(checked=checked | {"run": reason})
    runner = open_onnx(path)
    errors = measure(runner, graph)
    refusal = wrong(errors["float32"], precision, errors["module"])
    if refusal is not None:
        raise ValueError(f"{path.name} is wrong in onnxruntime: {refusal}")
    return Found(errors, checked | {"run": "onnxruntime on the CPU"})


def measure(runner: Callable[..., tuple[Tensor, ...]], graph: Graph) -> dict[str, float]:
    """Relative errors of an open file, the largest over outputs and lengths.

    ``same`` is against the module in its own dtype, ``float32`` against it in float32; ``module``
    is that of the module itself. Lengths are the least, and those that it was traced at: the best,
    but not 1 where an axis can be longer.
    """
    wide = graph.module if graph.wide is None else graph.wide()
    errors: dict[str, float] = {}
    lengths = [graph.lengths("least"), trace_lengths(graph)]
    for chosen in lengths[:1] if lengths[0] == lengths[1] else lengths:
        inputs = graph.example(chosen)
        found = runner(*(x.cpu() for x in inputs))
        _check_outputs(graph, chosen, found)
        own = _run(graph.module, inputs)
        exact = _run(wide, [_widened(x) for x in inputs])
        for name, given, expected in (
            ("same", found, own),
            ("float32", found, exact),
            ("module", own, exact),
        ):
            errors[name] = max(largest_error(given, expected), errors.get(name, 0.0))
    return errors


def _run(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(module(*inputs))


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def _check_outputs(graph: Graph, lengths: dict[str, int], found: Sequence[Tensor]) -> None:
    for spec, y in zip(graph.outputs, found, strict=True):
        if tuple(y.shape) != spec.sizes(lengths) or y.dtype != DTYPES[spec.dtype]:
            raise ValueError(
                f"output '{spec.name}' of {graph.name} is {y.dtype} {tuple(y.shape)} at {lengths}; "
                f"the graph says {spec.dtype} {spec.sizes(lengths)}"
            )
