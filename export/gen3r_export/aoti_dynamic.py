"""Dynamic axes stay dynamic while AOTInductor compiles.

Lowering asks questions about lengths (is this batch 16 or more?). The answers are not kept as
conditions of an exported program: the range of the axis shrinks to where the answer for the traced
length holds, down to that one length, and the package gives wrong shapes for all others without a
word (seen in torch 2.13). Here the one question that our graphs meet is answered without a range,
and whatever else shrinks a range is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram


@contextmanager
def unchanged_axes(program: ExportedProgram, name: str) -> Iterator[None]:
    """Inside, the program is compiled.

    Raises
    ------
    ValueError : on leaving, where a dynamic axis was bound to fewer lengths than it had.
    """
    before = _ranges(program)
    with _convolutions_of_any_length():
        yield
    for symbol, (environment, bounds) in before.items():
        found = environment.replace(symbol), environment.var_to_range[symbol]
        if found != (symbol, bounds):
            raise ValueError(
                f"{name} cannot be compiled for every length from {bounds.lower} to "
                f"{bounds.upper}: AOTInductor takes {found[1].lower} to {found[1].upper}; "
                "export it with static axes"
            )


def _ranges(program: ExportedProgram) -> dict[Any, tuple[Any, Any]]:
    """Of every dynamic axis of the inputs its symbol, with its environment and range."""
    found: dict[Any, tuple[Any, Any]] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor):
            continue
        for length in value.shape:
            if isinstance(length, torch.SymInt):
                environment = length.node.shape_env
                for symbol in length.node.expr.free_symbols:
                    found[symbol] = environment, environment.var_to_range[symbol]
    return found


@contextmanager
def _convolutions_of_any_length() -> Iterator[None]:
    """Inside, PyTorch chooses a convolution's library by the traced lengths, without binding them.

    The choice decides the memory format of the result, which is the same for all of them: every
    length runs on the CPU's or the GPU's library in the format of its input.
    """
    select = torch._C._select_conv_backend

    def chosen(x: Tensor, *args: Any, **options: Any) -> Any:
        if any(isinstance(n, torch.SymInt) for n in (*x.shape, *x.stride())):
            sizes, strides = ([_hint(n) for n in axes] for axes in (x.shape, x.stride()))
            x = torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device)
        return select(x, *args, **options)

    torch._C._select_conv_backend = chosen  # type: ignore[assignment]
    try:
        yield
    finally:
        torch._C._select_conv_backend = select


def _hint(length: int | torch.SymInt) -> int:
    return int(length.node.hint) if isinstance(length, torch.SymInt) else int(length)
