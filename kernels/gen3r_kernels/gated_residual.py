"""Residual update and the next norm in one pass: s' = s + y * gate; h = layer_norm_modulate(s').

The stream s is float32; y is in the model's dtype; gate is per sample and channel (None means 1).
Bytes at [2, 31850, 1536]: reads s (391 MB) and y (196 MB), writes s' (391 MB) and h (196 MB):
0.41 ms at 2.86 TB/s, against two passes more when the parts run apart. Measured on an H100:
0.394 ms in bf16, 0.362 to 0.374 ms in 8 bits, 97 to 100 % of the copy's rate in the same run
(2.97 TB/s). The kernel is in layer_norm_rows.py, the backward in layer_norm_modulate_backward.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.carried import operator
from gen3r_kernels.dispatch import FLOAT8, use_triton
from gen3r_kernels.layer_norm_modulate import (
    layer_norm_modulate_reference,
    refuse_float8_gradients,
)
from gen3r_kernels.layer_norm_modulate_backward import layer_norm_backward, table_gradients
from gen3r_kernels.layer_norm_rows import allocate, launch_layer_norm
from gen3r_kernels.quantize import quantize_reference
from gen3r_kernels.quantized import Quantized

OP = "gated_residual"


@operator("gated_residual")
def _gated_residual_op(
    stream: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rows = launch_layer_norm(OP, stream, y, gate, scale, shift, weight, bias, eps, out_dtype)
    return rows.new_stream, rows.out


@_gated_residual_op.register_fake
def _(
    stream: Tensor,
    y: Tensor,
    gate: Any,
    scale: Any,
    shift: Any,
    weight: Any,
    bias: Any,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    rows = allocate(stream, True, out_dtype)
    return rows.new_stream, rows.out


@torch.library.custom_op("gen3r::gated_residual_float8", mutates_args=())
def _gated_residual_float8_op(
    stream: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = launch_layer_norm(OP, stream, y, gate, scale, shift, weight, bias, eps, FLOAT8)
    return rows.new_stream, rows.out, rows.scale, rows.length


@_gated_residual_float8_op.register_fake
def _(
    stream: Tensor,
    y: Tensor,
    gate: Any,
    scale: Any,
    shift: Any,
    weight: Any,
    bias: Any,
    eps: float,
) -> tuple[Tensor, ...]:
    return tuple(allocate(stream, True, FLOAT8))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    stream, y, *tables, eps, _ = inputs
    # The stream is needed after its update only, and y only for the gate's gradient.
    ctx.save_for_backward(output[0], y if ctx.needs_input_grad[2] else None, *tables)
    ctx.eps, ctx.dtypes = eps, (stream.dtype, y.dtype)


def _backward(ctx: Any, grad_stream: Tensor, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    stream, y, gate, scale, shift, weight, bias = ctx.saved_tensors
    with_sums = any(ctx.needs_input_grad[3:7])
    grad_s, grad_y, sum_grad, sum_normed, sum_gate = layer_norm_backward(
        grad_out, grad_stream, stream, y, gate, scale, weight, ctx.eps, *ctx.dtypes, with_sums
    )
    tables: tuple[Tensor | None, ...] = (None,) * 4
    if with_sums:
        tables = table_gradients(sum_grad, sum_normed, scale, shift, weight, bias)
    grad_gate = None if y is None else sum_gate.sum_to_size(gate.shape).to(gate.dtype)
    return grad_s, grad_y, grad_gate, *tables, None, None


_gated_residual_op.register_autograd(_backward, setup_context=_setup)


def gated_residual_reference(
    stream: Tensor,  # [B, S, C]
    y: Tensor,  # [B, S, C]
    gate: Tensor | None = None,  # [B, 1, C]
    scale: Tensor | None = None,  # [B, 1, C], of the norm that follows
    shift: Tensor | None = None,  # [B, 1, C]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # stream and normed, both [B, S, C] float32
    """The definition in float32."""
    stream = stream.float() + (y.float() if gate is None else y.float() * gate.float())
    return stream, layer_norm_modulate_reference(stream, scale, shift, weight, bias, eps)


def gated_residual(
    stream: Tensor,  # [B, S, C] float32
    y: Tensor,  # [B, S, C]
    gate: Tensor | None = None,  # [B, 1, C] float32
    scale: Tensor | None = None,  # [B, 1, C] float32
    shift: Tensor | None = None,  # [B, 1, C] float32
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype = torch.float32,
    backends: Backends = DEFAULT_BACKENDS,
) -> tuple[Tensor, Tensor | Quantized]:  # new stream [B, S, C] float32, normed [B, S, C] out_dtype
    """Add y * gate to the stream and normalise the result for the layer that follows.

    out_dtype: of the normed rows; float8_e4m3fn gives a `Quantized`.

    Raises
    ------
    ValueError : shapes or dtypes that the kernel does not take, or gradients asked of 8-bit rows.
    """
    tables = (gate, scale, shift, weight, bias)
    if out_dtype == FLOAT8:
        refuse_float8_gradients(OP, stream, y, *tables)
    if not use_triton(OP, stream, out_dtype, backends):
        stream, normed = gated_residual_reference(stream, y, *tables, eps)
        return stream, quantize_reference(normed) if out_dtype == FLOAT8 else normed.to(out_dtype)
    if out_dtype == FLOAT8:
        stream, *parts = _gated_residual_float8_op(stream, y, *tables, eps)
        return stream, Quantized(*parts)
    return _gated_residual_op(stream, y, *tables, eps, out_dtype)
