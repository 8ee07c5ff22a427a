# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""Backward of `layer_norm_modulate` and of `gated_residual`, in one pass over the rows.

With n = (s' - mean) * rstd, gain = weight * (1 + scale) and t = grad_h * gain:

    grad_s' = grad_new_stream + rstd * (t - mean(t) - n * mean(t * n))
    grad_stream = grad_s',   grad_y = grad_s' * gate,   grad_gate = sum_s(grad_s' * y)

Every other gradient follows from two sums over a sample's rows, P = sum_s(grad_h) and
N = sum_s(grad_h * n): shift P, scale N * weight + P * bias, and summed over the samples
bias P * (1 + scale), weight N * (1 + scale). A program sums the rows it owns in registers; torch
adds up the programs.

mean and rstd are computed again from the row, which the kernel reads in any case: two reductions in
registers instead of two more outputs of the forward pass.

Bytes at [2, 31850, 1536], gated: reads s' 391 MB, y 196, grad_h 196, grad_new_stream 391, writes
grad_stream 391 and grad_y 196: 1.76 GB, 0.62 ms on an H100 (2.86 TB/s). Without y: 0.98 GB,
0.34 ms. Measured there, the addition of the parts included: 0.65 and 0.40 ms (92 and 82 % of a
copy's rate).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.dispatch import CompileCase
from gen3r_kernels.layer_norm_rows import (
    contiguous_rows,
    load_modulation,
    normalise,
    table_stride,
)


@triton.jit
def _layer_norm_backward_kernel(
    grad_out,  # [B, S, C]
    grad_new_stream,  # [B, S, C] or None
    stream,  # [B, S, C], after the update
    y,  # [B, S, C], None where sum_gate is
    gate,  # [B, 1, C] or None
    scale,  # [B, 1, C] or None
    weight,  # [C] or None
    grad_stream,  # [B, S, C]
    grad_y,  # [B, S, C] or None: the operator has no y
    sum_grad,  # [B, P, C] float32 or None; P programs a sample
    sum_normed,  # [B, P, C] float32, None where sum_grad is
    sum_gate,  # [B, P, C] float32 or None
    rows,
    width,
    eps,
    grad_out_batch,  # strides in elements
    grad_out_row,
    grad_new_batch,
    grad_new_row,
    stream_batch,
    stream_row,
    y_batch,
    y_row,
    gate_batch,
    scale_batch,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """STEPS rows of one sample and their part of the three sums; loads run STAGES rows ahead."""
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gain, _ = load_modulation(scale, None, weight, None, scale_batch, 0, width, columns, BLOCK)
    if gate is not None:
        gates = tl.load(gate + batch * gate_batch + columns, inside, 0.0).to(tl.float32)
    if sum_grad is not None:
        total = tl.zeros([BLOCK], tl.float32)
        total_normed = tl.zeros([BLOCK], tl.float32)
    if sum_gate is not None:
        total_gate = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * STEPS
    for step in tl.range(0, min(STEPS, rows - first), num_stages=STAGES):
        row = first + step
        place = (batch * rows + row) * width + columns
        source = stream + batch * stream_batch + row * stream_row
        x = tl.load(source + columns, inside, 0.0).to(tl.float32)
        source = grad_out + batch * grad_out_batch + row * grad_out_row
        grad = tl.load(source + columns, inside, 0.0).to(tl.float32)
        normed, rstd = normalise(x, columns, width, eps)
        if sum_grad is not None:
            total += grad
            total_normed += grad * normed
        grad *= gain
        mean = tl.sum(grad, 0) / width
        mean_normed = tl.sum(grad * normed, 0) / width
        grad = (grad - mean - normed * mean_normed) * rstd
        if grad_new_stream is not None:
            source = grad_new_stream + batch * grad_new_batch + row * grad_new_row
            grad += tl.load(source + columns, inside, 0.0).to(tl.float32)
        tl.store(grad_stream + place, grad.to(grad_stream.dtype.element_ty), inside)
        if sum_gate is not None:
            source = y + batch * y_batch + row * y_row
            total_gate += grad * tl.load(source + columns, inside, 0.0).to(tl.float32)
        if grad_y is not None:
            if gate is not None:
                grad *= gates
            tl.store(grad_y + place, grad.to(grad_y.dtype.element_ty), inside)
    part = (batch * tl.num_programs(0) + tl.program_id(0)) * width + columns
    if sum_grad is not None:
        tl.store(sum_grad + part, total, inside)
        tl.store(sum_normed + part, total_normed, inside)
    if sum_gate is not None:
        tl.store(sum_gate + part, total_gate, inside)


@dataclass(frozen=True)
class LayerNormBackwardConfig:
    """Launch: padded width, rows a program (one partial sum each), loads ahead, warps."""

    block: int
    steps: int
    stages: int
    num_warps: int

    @classmethod
    def for_shape(cls, rows: int, width: int, with_sums: bool) -> LayerNormBackwardConfig:
        """For `rows` = B * S rows of `width` channels.

        The sums take registers, so that few programs fit a processor; loads that run ahead through
        shared memory make up for it (a third of the time). Without sums one row a program is best.
        """
        block = max(triton.next_power_of_2(width), 128)
        steps = min(64, max(1, rows // 1024)) if with_sums else 1
        stages = 3 if with_sums and block <= 2048 else 1  # four rows a stage in shared memory
        return cls(block, steps, stages, min(max(block // 512, 1), 16))


class RowGradients(NamedTuple):
    """Gradients of the rows, and the sums over a sample's rows that all others follow from.

    What nobody asked for is empty.
    """

    stream: Tensor  # [B, S, C] dtype of the stream
    y: Tensor  # [B, S, C] y_dtype
    sum_grad: Tensor  # [B, 1, C] float32
    sum_normed: Tensor  # [B, 1, C] float32
    sum_gate: Tensor  # [B, 1, C] float32


def _allocate(
    stream: Tensor,
    stream_dtype: torch.dtype,
    y_dtype: torch.dtype | None,
    programs: int,
    with_sums: bool,
    with_gate: bool,
) -> RowGradients:
    parts = (stream.shape[0], programs, stream.shape[2])
    sums = (parts if wanted else (0,) for wanted in (with_sums, with_sums, with_gate))
    return RowGradients(
        stream.new_empty(stream.shape, dtype=stream_dtype),
        stream.new_empty((0,) if y_dtype is None else stream.shape, dtype=y_dtype),
        *(stream.new_empty(shape, dtype=torch.float32) for shape in sums),
    )


@torch.library.custom_op("gen3r::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad_out: Tensor,  # [B, S, C]
    grad_new_stream: Tensor | None,  # [B, S, C]
    stream: Tensor,  # [B, S, C], after the update
    y: Tensor | None,  # [B, S, C]: the gate's gradient is wanted
    gate: Tensor | None,  # [B, 1, C]
    scale: Tensor | None,  # [B, 1, C]
    weight: Tensor | None,  # [C]
    eps: float,
    stream_dtype: torch.dtype,  # of the stream before the update
    y_dtype: torch.dtype | None,  # None: the operator has no y
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The launcher; the forward pass has checked the inputs. Returns a `RowGradients`."""
    batch, rows, width = stream.shape
    config = LayerNormBackwardConfig.for_shape(batch * rows, width, with_sums or y is not None)
    programs = triton.cdiv(rows, config.steps)
    result = _allocate(stream, stream_dtype, y_dtype, programs, with_sums, y is not None)
    tables = [None if t is None else contiguous_rows(t) for t in (gate, scale, weight)]
    sources = (grad_out, grad_new_stream, stream, y)
    grids = [None if t is None else contiguous_rows(t) for t in sources]
    strides = [s for t in grids for s in ((0, 0) if t is None else (t.stride(0), t.stride(1)))]
    if stream.numel() > 0:
        _layer_norm_backward_kernel[(programs, batch)](
            *grids,
            *tables,
            result.stream,
            None if y_dtype is None else result.y,
            result.sum_grad if with_sums else None,
            result.sum_normed if with_sums else None,
            None if y is None else result.sum_gate,
            rows,
            width,
            eps,
            *strides,
            *(table_stride(t) for t in tables[:2]),
            BLOCK=config.block,
            STEPS=config.steps,
            STAGES=config.stages,
            num_warps=config.num_warps,
        )
    # On no rows there are no programs either, and the sums are 0.
    sums = [s.sum(1, keepdim=True) if s.ndim == 3 else s for s in result[2:]]
    return result.stream, result.y, sums[0], sums[1], sums[2]


@layer_norm_backward.register_fake
def _(
    grad_out: Tensor,
    grad_new_stream: Any,
    stream: Tensor,
    y: Any,
    gate: Any,
    scale: Any,
    weight: Any,
    eps: float,
    stream_dtype: torch.dtype,
    y_dtype: torch.dtype | None,
    with_sums: bool,
) -> Any:
    return tuple(_allocate(stream, stream_dtype, y_dtype, 1, with_sums, y is not None))


class TableGradients(NamedTuple):
    """Gradients of the norm's tables in their shapes and dtypes; None for tables not given."""

    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def table_gradients(
    sum_grad: Tensor,  # [B, 1, C] float32
    sum_normed: Tensor,  # [B, 1, C] float32
    scale: Tensor | None,  # [B, 1, C]
    shift: Tensor | None,  # [B, 1, C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
) -> TableGradients:
    """See the module's formulas."""

    def fit(gradient: Tensor, table: Tensor | None) -> Tensor | None:
        if table is None:
            return None
        lead = (1, 1) if table.ndim == 1 else ()
        return gradient.sum_to_size(*lead, *table.shape).view(table.shape).to(table.dtype)

    factor = 1.0 if scale is None else 1.0 + scale.float()
    of_scale = sum_normed if weight is None else sum_normed * weight.float()
    if bias is not None:
        of_scale = of_scale + sum_grad * bias.float()
    return TableGradients(
        fit(of_scale, scale),
        fit(sum_grad, shift),
        fit(sum_normed * factor, weight),
        fit(sum_grad * factor, bias),
    )


def compile_cases() -> list[CompileCase]:
    """The model's uses, with and without the sums."""
    uses: dict[str, tuple[str, ...]] = {
        "modulate": ("scale",),
        "affine": ("grad_new_stream", "y", "gate", "weight", "grad_y", "sum_gate"),
        "sum": ("grad_new_stream", "scale", "grad_y"),
    }
    pointers = dict.fromkeys(("grad_out", "y", "weight", "grad_y"), "*bf16")
    pointers |= dict.fromkeys(("grad_new_stream", "stream", "grad_stream"), "*fp32")
    pointers |= dict.fromkeys(("gate", "scale", "sum_grad", "sum_normed", "sum_gate"), "*fp32")
    sources = ("grad_out", "grad_new", "stream", "y")
    strides = [f"{name}_{axis}" for name in sources for axis in ("batch", "row")]
    integers = ("rows", "width", *strides, "gate_batch", "scale_batch")
    cases = []
    for use, given in uses.items():
        for summed in (True, False):
            present = {"grad_out", "stream", "grad_stream", *given}
            present |= {"sum_grad", "sum_normed"} if summed else set()
            config = LayerNormBackwardConfig.for_shape(63_700, 1536, summed or "y" in given)
            sizes = {"BLOCK": config.block, "STEPS": config.steps, "STAGES": config.stages}
            absent: dict[str, Any] = {p: None for p in pointers if p not in present}
            cases.append(
                CompileCase(
                    name=f"layer-norm-backward-{use}{'-sums' if summed else ''}",
                    kernel=_layer_norm_backward_kernel,
                    signature=pointers | dict.fromkeys(integers, "i32") | {"eps": "fp32"},
                    constexprs=absent | sizes,
                    options={"num_warps": config.num_warps},
                    divisible=(*sorted(present), *(i for i in integers if i != "rows")),
                )
            )
    return cases
