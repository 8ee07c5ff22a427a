# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""Backward of `rms_norm_rope` and `rms_norm`, for one tensor a launch.

With r = 1 / sqrt(mean(x^2) + eps), n = x * r and g the gradient rotated back by the angle:

    grad_x = r * (g * weight - n * mean(g * weight * n)),   grad_weight = sum over rows of g * n

r is computed again from the row. A program sums the rows it owns in registers; torch adds up the
programs. The angle tables are constants and get no gradient.

Bytes at [2, 31850, 12, 128] in bf16: 196 MB of x and of the gradient in, 196 MB out, tables 16 MB:
0.6 GB a tensor, 0.21 ms on an H100 (2.86 TB/s). Measured there: 0.237 ms, 86 % of a copy's rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.dispatch import CompileCase


@triton.jit
def _rms_norm_rope_backward_kernel(
    grad_out,  # [B, S, H, D]
    x,  # [B, S, H * D]
    weight,  # [H * D]
    cos,  # [S, D / 2] or None: no rotation
    sin,  # [S, D / 2]
    grad_x,  # [B, S, H * D]
    grad_weight,  # [B, P, H * D] float32 or None; P programs a sample
    rows,
    heads,
    dim,
    eps,
    grad_batch,  # strides in elements
    grad_row,
    grad_head,
    x_batch,
    x_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """STEPS rows of one sample and their part of the weight's gradient."""
    batch = tl.program_id(1).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    inside = (head < heads) & (channel < dim)
    columns = head * dim + channel
    width = heads * dim
    weights = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    total = tl.zeros([HEADS, DIM], tl.float32)
    pair = tl.arange(0, DIM // 2)[None, :]
    first = tl.program_id(0).to(tl.int64) * STEPS
    for step in tl.range(0, min(STEPS, rows - first), num_stages=STAGES):
        row = first + step
        normed = tl.load(x + batch * x_batch + row * x_row + columns, inside, 0.0).to(tl.float32)
        source = grad_out + batch * grad_batch + row * grad_row + head * grad_head + channel
        grad = tl.load(source, inside, 0.0).to(tl.float32)
        if cos is not None:
            cosine = tl.load(cos + row * (dim // 2) + pair, pair < dim // 2, 0.0)
            sine = tl.load(sin + row * (dim // 2) + pair, pair < dim // 2, 0.0)
            even, odd = tl.split(tl.reshape(grad, (HEADS, DIM // 2, 2)))
            grad = tl.join(even * cosine + odd * sine, odd * cosine - even * sine)
            grad = tl.reshape(grad, (HEADS, DIM))
        r = tl.rsqrt(tl.sum(tl.sum(normed * normed, 1), 0) / width + eps)
        normed *= r
        total += grad * normed
        grad *= weights
        mean = tl.sum(tl.sum(grad * normed, 1), 0) / width
        grad = (grad - normed * mean) * r
        place = (batch * rows + row) * width + columns
        tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), inside)
    if grad_weight is not None:
        part = (batch * tl.num_programs(0) + tl.program_id(0)) * width + columns
        tl.store(grad_weight + part, total, inside)


@dataclass(frozen=True)
class RmsNormRopeBackwardConfig:
    """Launch: padded heads and head size, rows a program, loads ahead, warps."""

    heads: int
    dim: int
    steps: int
    stages: int
    num_warps: int

    @classmethod
    def for_shape(cls, rows: int, heads: int, dim: int) -> RmsNormRopeBackwardConfig:
        """For `rows` = B * S rows of `heads` heads of `dim` channels."""
        heads, dim = triton.next_power_of_2(heads), max(triton.next_power_of_2(dim), 16)
        steps = min(32, max(1, rows // 1024))
        stages = 3 if heads * dim <= 4096 else 1  # two rows a stage in shared memory
        return cls(heads, dim, steps, stages, min(max(heads * dim // 512, 1), 16))


@torch.library.custom_op("gen3r::rms_norm_rope_backward", mutates_args=())
def rms_norm_rope_backward(
    grad_out: Tensor,  # [B, S, H, D]
    x: Tensor,  # [B, S, H * D]
    weight: Tensor,  # [H * D]
    cos: Tensor | None,  # [S, D / 2] float32
    sin: Tensor | None,  # [S, D / 2] float32
    eps: float,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:  # grad_x like x, grad_weight [H * D] (empty without)
    """The launcher; the forward pass has checked the inputs."""
    batch, rows, heads, dim = grad_out.shape
    config = RmsNormRopeBackwardConfig.for_shape(batch * rows, heads, dim)
    programs = triton.cdiv(rows, config.steps)
    grad_x = x.new_empty(x.shape)
    parts = x.new_empty((batch, programs, heads * dim), dtype=torch.float32)
    x = x if x.stride(-1) == 1 else x.contiguous()
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    if x.numel() > 0:
        _rms_norm_rope_backward_kernel[(programs, batch)](
            grad_out,
            x,
            weight.contiguous(),
            None if cos is None else cos.contiguous(),
            None if sin is None else sin.contiguous(),
            grad_x,
            parts if with_weight else None,
            rows,
            heads,
            dim,
            eps,
            *grad_out.stride()[:3],
            *x.stride()[:2],
            HEADS=config.heads,
            DIM=config.dim,
            STEPS=config.steps,
            STAGES=config.stages,
            num_warps=config.num_warps,
        )
    return grad_x, parts.sum((0, 1)).to(weight.dtype) if with_weight else weight.new_empty(0)


@rms_norm_rope_backward.register_fake
def _(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Any,
    sin: Any,
    eps: float,
    with_weight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if with_weight else (0,))


def compile_cases() -> list[CompileCase]:
    """The model's q and k (rotated) and cross-attention's (not), in bf16."""
    cases = []
    for name, heads, dim in (("rope", 12, 128), ("norm", 1, 1536)):
        config = RmsNormRopeBackwardConfig.for_shape(63_700, heads, dim)
        halves = ("grad_out", "x", "weight", "grad_x")
        pointers = dict.fromkeys(halves, "*bf16") | {"grad_weight": "*fp32"}
        absent: dict[str, Any] = {"cos": None, "sin": None}
        if name == "rope":
            pointers, absent = pointers | {"cos": "*fp32", "sin": "*fp32"}, {}
        strides = ("grad_batch", "grad_row", "grad_head", "x_batch", "x_row")
        sizes = {"HEADS": config.heads, "DIM": config.dim}
        sizes |= {"STEPS": config.steps, "STAGES": config.stages}
        integers = ("rows", "heads", "dim", *strides)
        cases.append(
            CompileCase(
                name=f"rms-norm-backward-{name}",
                kernel=_rms_norm_rope_backward_kernel,
                signature=pointers | dict.fromkeys(integers, "i32") | {"eps": "fp32"},
                constexprs=absent | sizes,
                options={"num_warps": config.num_warps},
                divisible=(*pointers, "dim", *strides),
            )
        )
    return cases
