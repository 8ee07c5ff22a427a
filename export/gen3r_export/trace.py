"""A graph's module through `torch.export`, with the dynamic axes that its specs name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from gen3r_export.graph import DTYPES, Graph, TensorSpec

LEAST_MOST = 4  # of the lengths that an axis is traced for


class Flat(nn.Module):
    """``module(*inputs)`` whatever the names of its parameters are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.module(*inputs))


def trace(graph: Graph, *, keep_memory: bool = False) -> ExportedProgram:
    """The graph as an ExportedProgram; its axes are dynamic where the specs name them.

    keep_memory : inputs in the memory order of the graph's examples; contiguous zeros otherwise.

    Raises
    ------
    ValueError : the module cannot be traced with these axes.
    """
    lengths = trace_lengths(graph)
    if keep_memory:
        # Tensors of their own: of a view, the axes of what it is a view of would be traced too.
        examples = tuple(x.clone() for x in graph.example(lengths))
    else:
        examples = blank_inputs(graph, lengths)
    shapes = (tuple(dynamic_axes(graph)),) if graph.dims else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export on its own calls
        try:
            return torch.export.export(
                Flat(graph.module).eval(), examples, dynamic_shapes=shapes, strict=False
            )
        except (torch._dynamo.exc.UserError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{graph.name} cannot be traced at {lengths}: {first_line(error)}"
            ) from error


def blank_inputs(graph: Graph, lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
    """Zeros of the inputs' shapes: tracing reads no values, and examples may take minutes."""
    weights = next(graph.module.parameters(), None)
    device = torch.device("cpu") if weights is None else weights.device
    return tuple(
        torch.zeros(spec.sizes(lengths), dtype=DTYPES[spec.dtype], device=device)
        for spec in graph.inputs
    )


def first_line(error: Exception) -> str:
    """What an error says, in one line of at most 400 characters."""
    return " ".join(str(error).split())[:400]


def trace_lengths(graph: Graph) -> dict[str, int]:
    """Lengths to trace at: the best ones, at least 2 and if possible all different.

    An axis of length 1 is taken for a static one, and two of the same length for one axis.
    """
    chosen: dict[str, int] = {}
    for name, dim in graph.dims.items():
        length = min(max(dim.best, 2), dim.most)
        while length in chosen.values() and length < dim.most:
            length += 1
        while length in chosen.values() and length > max(dim.least, 2):
            length -= 1
        chosen[name] = length
    return chosen


def dynamic_axes(graph: Graph) -> Iterator[dict[int, Any]]:
    """Of each input, its dynamic axes as `torch.export` takes them."""
    # Tracing takes every length for 2 or more: a range of 1 to 2 would leave a single one.
    roots = {
        name: Dim(name, min=dim.least, max=max(dim.most, LEAST_MOST))
        for name, dim in graph.dims.items()
    }
    for spec in graph.inputs:
        yield {
            axis: _axis(length, roots)
            for axis, length in enumerate(spec.shape)
            if isinstance(length, str)
        }


def _axis(text: str, roots: dict[str, Any]) -> Any:
    """``"4*frames+1"`` as an expression of its root; texts are linear in one name."""
    name = next(name for name in roots if name in text.replace("*", "+").split("+"))
    added, both = (_length(text, dict.fromkeys(roots, value)) for value in (0, 1))
    root = roots[name]
    product = root if both - added == 1 else (both - added) * root
    return product + added if added else product


def _length(text: str, lengths: dict[str, int]) -> int:
    return TensorSpec("", (text,), "int64").sizes(lengths)[0]
