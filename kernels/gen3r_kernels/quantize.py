# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rows to 8-bit floating point: values = x * 448 / max |x|, with the row's scale and length.

One scale per row (token of x, output channel of a weight). e4m3 has 4 bits of significand and
normal numbers from 2^-6 to 448, so a value keeps a relative error below 2^-4 down to 1 / 28,672 of
its row's maximum.
Bytes at [63700, 1536]: 196 MB in (bf16), 98 MB out; 0.1026 ms on an H100, 2.87 TB/s (a copy in the
same run: 2.92 TB/s).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.dispatch import FLOAT8, CompileCase, use_triton
from gen3r_kernels.quantized import Quantized

FLOAT8_MAX = 448.0
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 16_384  # one row is held in registers


class QuantizedWeight(NamedTuple):
    """weight[j] is approximately values[j] * scale[j].

    values : [N, K] float8_e4m3fn
    scale : [N] float32, per output channel: max |w_j| / 448
    length : [N] float32, the Euclidean norm of values[j] * scale[j]
    """

    values: Tensor
    scale: Tensor
    length: Tensor


@triton.jit
def _quantize_kernel(
    x_ptr,  # [rows, WIDTH], row stride x_stride
    values_ptr,  # [rows, WIDTH] float8
    scale_ptr,  # [rows] float32
    length_ptr,  # [rows] float32
    rows,
    x_stride,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_WIDTH)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    offset = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + offset * x_stride + column[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    largest = tl.max(tl.abs(x), axis=1)
    length = tl.sqrt(tl.sum(x * x, axis=1))
    # A row of zeros has scale 0 and values 0.
    inverse = 448.0 / tl.where(largest > 0, largest, 448.0)
    # Rounding of the inverse may push the largest value past 448, where e4m3 has no numbers.
    values = tl.minimum(tl.maximum(x * inverse[:, None], -448.0), 448.0)
    values = values.to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + offset * WIDTH + column[None, :], values, mask=inside)
    tl.store(scale_ptr + row, largest / 448.0, mask=row < rows)
    tl.store(length_ptr + row, length, mask=row < rows)


@dataclass(frozen=True)
class QuantizeConfig:
    """Launch of the quantise kernel: whole rows, so that one pass over x is enough."""

    block_rows: int
    block_width: int
    num_warps: int

    @classmethod
    def for_shape(cls, width: int) -> QuantizeConfig:
        """About 32 elements a thread: four 16-byte loads of bf16 in flight (2.87 TB/s)."""
        block_width = max(triton.next_power_of_2(width), 16)
        block_rows = max(4096 // block_width, 1)
        elements = block_rows * block_width
        return cls(block_rows, block_width, min(max(elements // 1024, 4), 16))


def _launch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # x [rows, width]
    rows, width = x.shape
    values = torch.empty(rows, width, dtype=FLOAT8, device=x.device)
    scale, length = (torch.empty(rows, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows > 0:
        config = QuantizeConfig.for_shape(width)
        _quantize_kernel[(triton.cdiv(rows, config.block_rows),)](
            x,
            values,
            scale,
            length,
            rows,
            x.stride(0),
            WIDTH=width,
            BLOCK_ROWS=config.block_rows,
            BLOCK_WIDTH=config.block_width,
            num_warps=config.num_warps,
        )
    return values, scale, length


@torch.library.custom_op("gen3r::quantize", mutates_args=())
def _quantize_op(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _launch(x)


@_quantize_op.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    values = x.new_empty(x.shape, dtype=FLOAT8)
    scale, length = (x.new_empty((rows, 1), dtype=torch.float32) for _ in range(2))
    return values, scale, length


def quantize_reference(
    x: Tensor,  # [..., C]
) -> Quantized:
    """The definition in plain PyTorch."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / FLOAT8_MAX
    values = torch.where(scale > 0, wide / scale, 0.0).clamp(-FLOAT8_MAX, FLOAT8_MAX)
    return Quantized(values.to(FLOAT8), scale, wide.norm(dim=-1, keepdim=True))


def dequantize(x: Quantized) -> Tensor:  # [..., C] float32
    """values * scale."""
    return x.values.float() * x.scale


def quantize(
    x: Tensor,  # [..., C] bfloat16, float16 or float32
    *,
    backends: Backends = DEFAULT_BACKENDS,
) -> Quantized:
    """x in 8 bits with one scale per row, and the rows' Euclidean norms.

    Raises
    ------
    ValueError : gradients are asked for (rounding has none), or a dtype or width that the kernel
        does not take.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("quantize: 8-bit rounding has no backward; use bfloat16 to train")
    if not use_triton("quantize", x, FLOAT8, backends):
        return quantize_reference(x)
    if x.dtype not in INPUT_DTYPES:
        raise ValueError(f"quantize: dtype {x.dtype} is not one of {INPUT_DTYPES}; convert x first")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"quantize: {x.shape[-1]} columns are above {MAX_WIDTH}; use operators='reference'"
        )
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    values, scale, length = _quantize_op(rows)
    lead = x.shape[:-1]
    return Quantized(values.view(x.shape), scale.view(*lead, 1), length.view(*lead, 1))


def quantize_weight(
    weight: Tensor,  # [N, K]
) -> QuantizedWeight:
    """A linear layer's weight in 8 bits, one scale per output channel; done once, when loading."""
    with torch.no_grad():
        rows = quantize_reference(weight.detach())
        length = dequantize(rows).norm(dim=-1)
        return QuantizedWeight(rows.values.contiguous(), rows.scale[:, 0].contiguous(), length)


def compile_cases() -> list[CompileCase]:
    """Every kernel here at the widths of the model."""
    cases = []
    for width in (1536, 8960):
        config = QuantizeConfig.for_shape(width)
        cases.append(
            CompileCase(
                name=f"quantize-{width}",
                kernel=_quantize_kernel,
                signature={
                    "x_ptr": "*bf16",
                    "values_ptr": "*fp8e4nv",
                    "scale_ptr": "*fp32",
                    "length_ptr": "*fp32",
                    "rows": "i32",
                    "x_stride": "i32",
                },
                constexprs={
                    "WIDTH": width,
                    "BLOCK_ROWS": config.block_rows,
                    "BLOCK_WIDTH": config.block_width,
                },
                options={"num_warps": config.num_warps},
                divisible=("x_ptr", "values_ptr", "scale_ptr", "length_ptr", "x_stride"),
            )
        )
    return cases
