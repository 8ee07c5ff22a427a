"""Operators whose Triton kernels an ahead-of-time package can carry.

An operator that a custom op hides is called through Python wherever it runs. A package made by
AOTInductor has no Python: it takes a kernel only where it sees the launch. So every operator that
`operator` registers has a twin (`torch.library.triton_op`) of the same name in the namespace
``gen3r_carried``, made of the same body when it is first asked for. While a twin is traced,
`launch` and `describe` record kernels and tensor descriptors in the graph; at any other time they
are the kernel and Triton's descriptor themselves, so that nothing changes for calls, torch.compile
and the interpreter.

A body must not ask the GPU for more than its compute capability, must choose its launch by shapes
and dtypes alone, and takes kernels written in Gluon only where `carrying` is False: AOTInductor
re-compiles a kernel from its source as Triton and cannot take those.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import CustomOpDef, triton_op, wrap_triton
from triton.tools.tensor_descriptor import TensorDescriptor

NAMESPACE = "gen3r_carried"
Body = Callable[..., Any]

_BODIES: dict[str, Body] = {}
_TWINS: dict[str, Any] = {}


class _State(threading.local):
    carrying = False


_STATE = _State()


def carrying() -> bool:
    """Whether the body that asks is being traced as a twin."""
    return _STATE.carrying


@contextmanager
def _traced() -> Iterator[None]:
    before, _STATE.carrying = _STATE.carrying, True
    try:
        yield
    finally:
        _STATE.carrying = before


def operator(name: str) -> Callable[[Body], CustomOpDef]:
    """``torch.library.custom_op("gen3r::<name>")`` that mutates nothing and can be carried."""

    def register(body: Body) -> CustomOpDef:
        _BODIES[name] = body
        return torch.library.custom_op(f"gen3r::{name}", body, mutates_args=())

    return register


def carried_names() -> tuple[str, ...]:
    """The operators that have twins."""
    return tuple(sorted(_BODIES))


def twin(name: str) -> Any:
    """The overload ``gen3r_carried::<name>``, with the operator's schema.

    Raises
    ------
    ValueError : an operator that cannot be carried.
    """
    if name not in _BODIES:
        raise ValueError(
            f"operator gen3r::{name} cannot be carried into a package; carried are: "
            f"{', '.join(carried_names())}"
        )
    if name not in _TWINS:
        _TWINS[name] = triton_op(f"{NAMESPACE}::{name}", _recorded(_BODIES[name]), mutates_args=())
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _recorded(body: Body) -> Body:
    @functools.wraps(body)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _traced():
            return body(*args, **kwargs)

    # The schema is read from types; the body's annotations are text.
    run.__signature__ = inspect.signature(body, eval_str=True)  # type: ignore[attr-defined]
    return run


@dataclass(frozen=True)
class Box:
    """A tensor descriptor while a twin is traced: the tensor and the block that is moved."""

    tensor: Tensor
    block: tuple[int, ...]


def describe(x: Tensor, block: Sequence[int]) -> Any:
    """Triton's descriptor of blocks of x (16-byte aligned), or its record while traced."""
    if _STATE.carrying:
        return Box(x, tuple(block))
    return TensorDescriptor.from_tensor(x, list(block))


def empty_last(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor [N, C, ...] in channels-last memory.

    While a twin is traced it is made as [N, ..., C] and turned: Inductor (seen in torch 2.13) does
    not heed a memory format, and would copy between its own and what the kernel is given.
    """
    if _STATE.carrying:
        count, channels, *space = size
        return torch.empty((count, *space, channels), dtype=dtype, device=device).movedim(-1, 1)
    memory = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    return torch.empty(tuple(size), dtype=dtype, device=device, memory_format=memory)


def launch(kernel: Any) -> Any:
    """The kernel to be called as ``launch(kernel)[grid](...)``, or what records the call."""
    return _Recorder(kernel) if _STATE.carrying else kernel


class _Recorder:
    """Records a launch: by `wrap_triton`, or where there are descriptors, by the operator behind it
    (`wrap_triton` does not take them, seen in torch 2.13).

    A descriptor is recorded as its tensor with the block beside it. AOTInductor makes it anew in
    C++, for blocks of up to 128 bytes in the last axis. Written tensors must be given as plain
    pointers: the operator gives every written argument memory of its own, and would tear apart two
    descriptors over one result.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
        return functools.partial(self._record, grid)

    def _record(self, grid: tuple[Any, ...], *args: Any, **options: Any) -> None:
        if not any(isinstance(value, Box) for value in args):
            wrap_triton(self.kernel)[grid](*args, **options)
            return
        # Imported here: only an export needs them.
        from torch._higher_order_ops import triton_kernel_wrap as wrapping
        from torch.utils import _triton

        if not _triton.has_triton_tensor_descriptor_host_tma():
            raise ValueError(
                f"{self.kernel.__name__} is carried with tensor descriptors, which need a GPU of "
                "compute capability 9.0 or more; export there, or with operators='reference'"
            )

        given = dict(zip(self.kernel.arg_names, args, strict=True))
        boxes = {name: value for name, value in given.items() if isinstance(value, Box)}
        given |= {name: box.tensor for name, box in boxes.items()}
        tuned = triton.autotune(configs=[triton.Config({}, **options)], key=[])(self.kernel)
        table = wrapping.kernel_side_table
        wrapping.triton_kernel_wrapper_mutation(
            kernel_idx=table.add_kernel(tuned),
            constant_args_idx=table.add_constant_args({}),
            grid=[(*grid, 1, 1)[:3]],
            tma_descriptor_metadata={
                name: wrapping.create_tma_stable_metadata(list(box.block))
                for name, box in boxes.items()
            },
            kwargs=given,
        )
