# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""The kernel under `layer_norm_modulate` and `gated_residual`: one pass over the rows of a stream.

    s' = s + y * gate                               (gated_residual; left out without y)
    h  = ((s' - mean) * rstd * weight + bias) * (1 + scale) + shift

Statistics are float32 and taken in two steps (mean, then the centred squares), as the row lies in
registers anyway: a stream whose mean is far from 0 loses nothing to cancellation. h may leave in 8
bits with the row's scale and length (see `Quantized`), which costs two more reductions and no
traffic.

Bytes and floors are in the two operators' files. About 10 operations an element: memory is the
bound. One row a program reaches the speed of a copy: the modulation tables (12 KB at C = 1536) come
from the L1 cache, and what counts is the number of rows in flight. Programs that loop over rows
with the tables in registers are 5 % slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.carried import launch
from gen3r_kernels.dispatch import FLOAT8, CompileCase

INPUTS = (torch.float32, torch.float16, torch.bfloat16)
OUTPUTS = (*INPUTS, FLOAT8)
MAX_WIDTH = 8192  # one row is held in registers


@triton.jit
def load_modulation(
    scale, shift, weight, bias, scale_batch, shift_batch, width, columns, BLOCK: tl.constexpr
):
    """Gain and offset [BLOCK] float32 of one sample; gain 1 and offset 0 where nothing is given."""
    batch = tl.program_id(1).to(tl.int64)
    inside = columns < width
    gain = tl.full([BLOCK], 1.0, tl.float32)
    offset = tl.zeros([BLOCK], tl.float32)
    if weight is not None:
        gain = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + columns, inside, 0.0).to(tl.float32)
    if scale is not None:
        factor = 1.0 + tl.load(scale + batch * scale_batch + columns, inside, 0.0).to(tl.float32)
        gain *= factor
        offset *= factor
    if shift is not None:
        offset += tl.load(shift + batch * shift_batch + columns, inside, 0.0).to(tl.float32)
    return gain, offset


@triton.jit
def normalise(x, columns, width, eps):
    """(x - mean) / sqrt(var + eps) of one row, 0 outside the width, and 1 / sqrt(var + eps)."""
    mean = tl.sum(x, 0) / width
    centred = tl.where(columns < width, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    return centred * rstd, rstd


@triton.jit
def _layer_norm_kernel(
    stream,  # [B, S, C]
    y,  # [B, S, C] or None: no update of the stream
    gate,  # [B, 1, C] or None: 1
    scale,  # [B, 1, C] or None
    shift,  # [B, 1, C] or None
    weight,  # [C] or None
    bias,  # [C] or None
    new_stream,  # [B, S, C], None where y is
    out,  # [B, S, C]
    out_scale,  # [B, S] or None: out is not quantised
    out_length,  # [B, S]
    rows,  # S
    width,  # C
    eps,
    stream_batch,  # strides in elements
    stream_row,
    y_batch,
    y_row,
    gate_batch,
    scale_batch,
    shift_batch,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """STEPS rows of one sample, one after the other."""
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    gain, offset = load_modulation(
        scale, shift, weight, bias, scale_batch, shift_batch, width, columns, BLOCK
    )
    if gate is not None:
        gates = tl.load(gate + batch * gate_batch + columns, inside, 0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * STEPS
    for step in range(min(STEPS, rows - first)):
        row = first + step
        place = batch * rows + row
        source = stream + batch * stream_batch + row * stream_row
        x = tl.load(source + columns, inside, 0.0).to(tl.float32)
        if y is not None:
            source = y + batch * y_batch + row * y_row
            update = tl.load(source + columns, inside, 0.0).to(tl.float32)
            if gate is not None:
                update *= gates
            x += update
            tl.store(new_stream + place * width + columns, x, inside)
        normed, _ = normalise(x, columns, width, eps)
        normed = normed * gain + offset
        if out_scale is not None:
            largest = tl.max(tl.abs(normed), 0)
            tl.store(out_scale + place, largest / 448.0)
            tl.store(out_length + place, tl.sqrt(tl.sum(normed * normed, 0)))
            # A row of zeros has scale 0 and values 0. Rounding of the inverse may push the largest
            # value past 448, where e4m3 has no numbers.
            normed *= 448.0 / tl.maximum(largest, 1e-30)
            normed = tl.minimum(tl.maximum(normed, -448.0), 448.0)
        tl.store(out + place * width + columns, normed.to(out.dtype.element_ty), inside)


@dataclass(frozen=True)
class LayerNormConfig:
    """Launch of the kernel: padded width, rows a program, warps."""

    block: int
    steps: int
    num_warps: int

    @classmethod
    def for_shape(cls, rows: int, width: int, has_y: bool, quantised: bool) -> LayerNormConfig:
        """For `rows` = B * S rows of `width` channels.

        Where memory is the bound, one row a program with 16 elements a thread. The 8-bit norm alone
        moves so little that the barriers of its four reductions show: fewer warps, and the tables
        kept over several rows.
        """
        block = max(triton.next_power_of_2(width), 128)
        if quantised and not has_y:
            return cls(block, min(8, max(1, rows // 1024)), min(max(block // 1024, 1), 16))
        return cls(block, 1, min(max(block // 512, 1), 16))


def contiguous_rows(x: Tensor) -> Tensor:
    """x itself where its last axis is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def table_stride(table: Tensor | None) -> int:
    """Elements from one sample's table [1, C] to the next; 0 for a table that all share."""
    return 0 if table is None or table.shape[0] == 1 else table.stride(0)


def check_rows(op: str, x: Tensor, tables: dict[str, Tensor | None]) -> None:
    """Raise ValueError for a stream or tables that the kernels do not take.

    tables : name to [B or 1, 1, C] or [C] or None.
    """
    if x.ndim != 3 or x.dtype not in INPUTS or x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"{op}: takes [B, S, C] of {INPUTS} with C <= {MAX_WIDTH}, got {list(x.shape)} "
            f"{x.dtype}; use operators='reference'"
        )
    batch, _, width = x.shape
    for name, table in tables.items():
        if table is None:
            continue
        shapes = [(width,)] if name in ("weight", "bias") else [(batch, 1, width), (1, 1, width)]
        if tuple(table.shape) not in shapes or table.dtype not in INPUTS:
            raise ValueError(
                f"{op}: {name} {list(table.shape)} {table.dtype} does not fit rows "
                f"{list(x.shape)}; expected one of {shapes} in {INPUTS}"
            )
        if table.device != x.device:
            raise ValueError(f"{op}: {name} is on {table.device}, the rows are on {x.device}")


class NormedRows(NamedTuple):
    """What a launch writes. new_stream without y, scale and length without 8 bits: empty."""

    new_stream: Tensor  # [B, S, C] float32
    out: Tensor  # [B, S, C]
    scale: Tensor  # [B, S, 1] float32
    length: Tensor  # [B, S, 1] float32


def allocate(stream: Tensor, has_y: bool, out_dtype: torch.dtype) -> NormedRows:
    """The outputs, uninitialised; also what the operators' fakes return."""
    batch, rows, _ = stream.shape
    per_row = (batch, rows, 1) if out_dtype == FLOAT8 else (0,)
    return NormedRows(
        stream.new_empty(stream.shape if has_y else (0,), dtype=torch.float32),
        stream.new_empty(stream.shape, dtype=out_dtype),
        stream.new_empty(per_row, dtype=torch.float32),
        stream.new_empty(per_row, dtype=torch.float32),
    )


def launch_layer_norm(
    op: str,
    stream: Tensor,  # [B, S, C]
    y: Tensor | None,  # [B, S, C]
    gate: Tensor | None,  # [B, 1, C]
    scale: Tensor | None,  # [B, 1, C]
    shift: Tensor | None,  # [B, 1, C]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
    out_dtype: torch.dtype,
) -> NormedRows:
    """Check and run; `op` names the operator in errors.

    Raises
    ------
    ValueError : shapes, dtypes or devices that the kernel does not take.
    """
    names = ("gate", "scale", "shift", "weight", "bias")
    tables = [None if t is None else contiguous_rows(t) for t in (gate, scale, shift, weight, bias)]
    check_rows(op, stream, dict(zip(names, tables, strict=True)))
    if out_dtype not in OUTPUTS:
        raise ValueError(f"{op}: out_dtype {out_dtype} is not one of {OUTPUTS}")
    if y is not None and (y.shape != stream.shape or y.device != stream.device):
        raise ValueError(
            f"{op}: y {list(y.shape)} on {y.device} does not fit the stream "
            f"{list(stream.shape)} on {stream.device}"
        )
    batch, rows, width = stream.shape
    result = allocate(stream, y is not None, out_dtype)
    if stream.numel() == 0:
        return result
    stream, y = contiguous_rows(stream), None if y is None else contiguous_rows(y)
    quantised = out_dtype == FLOAT8
    config = LayerNormConfig.for_shape(batch * rows, width, y is not None, quantised)
    launch(_layer_norm_kernel)[(triton.cdiv(rows, config.steps), batch)](
        stream,
        y,
        *tables,
        None if y is None else result.new_stream,
        result.out,
        result.scale if quantised else None,
        result.length if quantised else None,
        rows,
        width,
        eps,
        stream.stride(0),
        stream.stride(1),
        *((0, 0) if y is None else (y.stride(0), y.stride(1))),
        *(table_stride(t) for t in tables[:3]),
        BLOCK=config.block,
        STEPS=config.steps,
        num_warps=config.num_warps,
    )
    return result


def compile_cases() -> list[CompileCase]:
    """The model's uses (modulated, affine behind a gate, modulated behind a sum), two dtypes."""
    uses: dict[str, tuple[str, ...]] = {
        "modulate": ("scale", "shift"),
        "affine": ("y", "gate", "weight", "bias"),
        "sum": ("y", "scale", "shift"),
    }
    cases = []
    for use, given in uses.items():
        for name, out in (("bf16", "*bf16"), ("fp8", "*fp8e4nv")):
            config = LayerNormConfig.for_shape(63_700, 1536, "y" in given, name == "fp8")
            pointers = {"stream": "*fp32", "y": "*bf16", "new_stream": "*fp32", "out": out}
            pointers |= dict.fromkeys(("gate", "scale", "shift"), "*fp32")
            pointers |= dict.fromkeys(("weight", "bias"), "*bf16")
            pointers |= dict.fromkeys(("out_scale", "out_length"), "*fp32")
            present = {"stream", "out", *given}
            present |= {"new_stream"} if "y" in given else set()
            present |= {"out_scale", "out_length"} if name == "fp8" else set()
            strides = ("stream_batch", "stream_row", "y_batch", "y_row")
            tables = ("gate_batch", "scale_batch", "shift_batch")
            integers = ("rows", "width", *strides, *tables)
            absent: dict[str, Any] = {p: None for p in pointers if p not in present}
            cases.append(
                CompileCase(
                    name=f"layer-norm-{use}-{name}",
                    kernel=_layer_norm_kernel,
                    signature=pointers | dict.fromkeys(integers, "i32") | {"eps": "fp32"},
                    constexprs=absent | {"BLOCK": config.block, "STEPS": config.steps},
                    options={"num_warps": config.num_warps},
                    divisible=(*sorted(present), "width", *strides, *tables),
                )
            )
    return cases
