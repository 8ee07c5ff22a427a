# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""RMSNorm over the full width of q and k, then 3D rotary embedding, in the attention layout.

n(x) = x / sqrt(mean(x^2) + eps) * weight over all H * D channels (not per head); then channel pairs
(2i, 2i+1) of each head are rotated by the angle table: (a, b) -> (a cos - b sin, a sin + b cos).
Source: Wan2.1 (arXiv 2503.20314); rotary embedding: arXiv 2104.09864.

`rms_norm` is the same without the rotation (queries and keys of cross-attention).

Bytes at [2, 31850, 12 * 128] in bf16: q and k 391 MB in and 391 MB out, tables 16 MB once:
799 MB, 0.28 ms at the 2.86 TB/s that a copy reaches on an H100. Measured there: 0.278 ms, 97 % of
the copy's rate in the same run; `rms_norm` 0.134 ms, 98 %. torch.compile of the reference takes
0.93 ms and 0.148 ms. A pair is two neighbours in one thread's registers, so that the rotation moves
nothing between threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.carried import launch, operator
from gen3r_kernels.dispatch import CompileCase, use_triton
from gen3r_kernels.rms_norm_rope_backward import rms_norm_rope_backward

INPUTS = (torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 8192  # one row is held in registers


@triton.jit
def norm_rotate(x, weights, cosine, sine, width, eps, HEADS: tl.constexpr, DIM: tl.constexpr):
    """One row [HEADS, DIM] float32, normalised and rotated; cosine None: normalised only."""
    x = x * tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / width + eps) * weights
    if cosine is not None:
        even, odd = tl.split(tl.reshape(x, (HEADS, DIM // 2, 2)))
        x = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
        x = tl.reshape(x, (HEADS, DIM))
    return x


@triton.jit
def _rms_norm_rope_kernel(
    q,  # [B, S, H * D]
    k,  # [B, S, H * D] or None
    q_weight,  # [H * D]
    k_weight,  # [H * D], None where k is
    cos,  # [S, D / 2] or None: no rotation
    sin,  # [S, D / 2]
    q_out,  # [B, S, H, D]
    k_out,  # [B, S, H, D], None where k is
    rows,  # S
    heads,  # H
    dim,  # D
    eps,
    q_batch,  # strides in elements
    q_row,
    k_batch,
    k_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """STEPS rows of q and k of one sample; loads run STAGES rows ahead."""
    batch = tl.program_id(1).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    inside = (head < heads) & (channel < dim)
    columns = head * dim + channel
    width = heads * dim
    q_weights = tl.load(q_weight + columns, inside, 0.0).to(tl.float32)
    if k is not None:
        k_weights = tl.load(k_weight + columns, inside, 0.0).to(tl.float32)
    pair = tl.arange(0, DIM // 2)[None, :]
    first = tl.program_id(0).to(tl.int64) * STEPS
    for step in tl.range(0, min(STEPS, rows - first), num_stages=STAGES):
        row = first + step
        place = (batch * rows + row) * width + columns
        x = tl.load(q + batch * q_batch + row * q_row + columns, inside, 0.0).to(tl.float32)
        cosine, sine = None, None
        if cos is not None:
            cosine = tl.load(cos + row * (dim // 2) + pair, pair < dim // 2, 0.0)
            sine = tl.load(sin + row * (dim // 2) + pair, pair < dim // 2, 0.0)
        if k is not None:
            other = tl.load(k + batch * k_batch + row * k_row + columns, inside, 0.0)
            other = norm_rotate(
                other.to(tl.float32), k_weights, cosine, sine, width, eps, HEADS, DIM
            )
            tl.store(k_out + place, other.to(k_out.dtype.element_ty), inside)
        x = norm_rotate(x, q_weights, cosine, sine, width, eps, HEADS, DIM)
        tl.store(q_out + place, x.to(q_out.dtype.element_ty), inside)


@dataclass(frozen=True)
class RmsNormRopeConfig:
    """Launch of the kernel: padded heads and head size, rows a program, loads ahead, warps."""

    heads: int
    dim: int
    steps: int
    stages: int
    num_warps: int

    @classmethod
    def for_shape(cls, rows: int, heads: int, dim: int, rotate: bool) -> RmsNormRopeConfig:
        """For `rows` = B * S rows of `heads` heads of `dim` channels.

        With the rotation two rows, two weights and two tables meet in a program: loads that run
        ahead of a short loop gain 10 %. Without it one row a program is fastest.
        """
        heads, dim = triton.next_power_of_2(heads), max(triton.next_power_of_2(dim), 16)
        steps = min(4, max(1, rows // 1024)) if rotate else 1
        stages = 3 if rotate and heads * dim <= 4096 else 1  # two rows a stage in shared memory
        return cls(heads, dim, steps, stages, min(max(heads * dim // 512, 1), 16))


def check_rows(op: str, x: Tensor, weight: Tensor, like: Tensor) -> Tensor:
    """x with contiguous rows. ValueError for what the kernel does not take."""
    if x.ndim != 3 or x.dtype not in INPUTS or x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"{op}: takes [B, S, C] of {INPUTS} with C <= {MAX_WIDTH}, got {list(x.shape)} "
            f"{x.dtype}; use operators='reference'"
        )
    if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{op}: q {list(like.shape)} {like.dtype} on {like.device} and k {list(x.shape)} "
            f"{x.dtype} on {x.device} differ; make them alike"
        )
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(
            f"{op}: weight {list(weight.shape)} on {weight.device} does not fit rows "
            f"{list(x.shape)} on {x.device}; expected [{x.shape[-1]}]"
        )
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_rms_norm_rope(
    op: str,
    q: Tensor,  # [B, S, H * D]
    k: Tensor | None,
    q_weight: Tensor,  # [H * D]
    k_weight: Tensor | None,
    tables: tuple[Tensor | None, Tensor | None],  # cos and sin [S, D / 2] float32
    num_heads: int,
    eps: float,
) -> tuple[Tensor, ...]:  # one or two of [B, S, H, D]
    batch, rows, width = q.shape
    dim = width // num_heads
    sources, weights = [check_rows(op, q, q_weight, q)], [q_weight.contiguous()]
    if k is not None and k_weight is not None:
        sources.append(check_rows(op, k, k_weight, q))
        weights.append(k_weight.contiguous())
    outs = tuple(x.new_empty((batch, rows, num_heads, dim)) for x in sources)
    if q.numel() == 0:
        return outs
    config = RmsNormRopeConfig.for_shape(batch * rows, num_heads, dim, tables[0] is not None)
    pad: list[Any] = [None] * (2 - len(sources))
    launch(_rms_norm_rope_kernel)[(triton.cdiv(rows, config.steps), batch)](
        *(*sources, *pad),
        *(*weights, *pad),
        *(None if t is None else t.contiguous() for t in tables),
        *(*outs, *pad),
        rows,
        num_heads,
        dim,
        eps,
        *sources[0].stride()[:2],
        *sources[-1].stride()[:2],
        HEADS=config.heads,
        DIM=config.dim,
        STEPS=config.steps,
        STAGES=config.stages,
        num_warps=config.num_warps,
    )
    return outs


@operator("rms_norm_rope")
def _rms_norm_rope_op(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q, k = launch_rms_norm_rope(
        "rms_norm_rope", q, k, q_weight, k_weight, (cos, sin), num_heads, eps
    )
    return q, k


@_rms_norm_rope_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:2], num_heads, q.shape[2] // num_heads)
    return q.new_empty(shape), k.new_empty(shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.eps = inputs[7]


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 4
    for i, grad, x, weight in ((0, grad_q, q, q_weight), (1, grad_k, k, k_weight)):
        need_x, need_weight = ctx.needs_input_grad[i], ctx.needs_input_grad[i + 2]
        if need_x or need_weight:
            of_x, of_weight = rms_norm_rope_backward(
                grad, x, weight, cos, sin, ctx.eps, need_weight
            )
            grads[i], grads[i + 2] = of_x, of_weight if need_weight else None
    return *grads, None, None, None, None


_rms_norm_rope_op.register_autograd(_backward, setup_context=_setup)


@operator("rms_norm")
def _rms_norm_op(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # x [B, S, C]
    (out,) = launch_rms_norm_rope("rms_norm", x, None, weight, None, (None, None), 1, eps)
    return out.flatten(2)


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


def _norm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_weight = ctx.needs_input_grad[1]
    grad_x, grad_weight = rms_norm_rope_backward(
        grad.unsqueeze(2), x, weight, None, None, ctx.eps, need_weight
    )
    return grad_x, grad_weight if need_weight else None, None


_rms_norm_op.register_autograd(_norm_backward, setup_context=_norm_setup)


def rms_norm_reference(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    eps: float = 1e-6,
) -> Tensor:  # [..., C] float32
    """x / sqrt(mean(x^2) + eps) * weight in float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


def rms_norm_rope_reference(
    x: Tensor,  # [B, S, H * D]
    weight: Tensor,  # [H * D]
    cos: Tensor,  # [S, D / 2] float32
    sin: Tensor,  # [S, D / 2] float32
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:  # [B, S, H, D] float32
    """The definition for one of q and k, in float32."""
    x = rms_norm_reference(x, weight, eps).unflatten(-1, (num_heads, -1))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def rms_norm(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    eps: float = 1e-6,
    *,
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor:  # [..., C], dtype of x
    """RMSNorm over the last axis, statistics in float32.

    Raises
    ------
    ValueError : shapes or dtypes that the kernel does not take.
    """
    if not use_triton("rms_norm", x, x.dtype, backends):
        return rms_norm_reference(x, weight, eps).to(x.dtype)
    if x.ndim == 3:
        return _rms_norm_op(x, weight, eps)
    return _rms_norm_op(x.reshape(1, -1, x.shape[-1]), weight, eps).view(x.shape)


def check_tables(
    op: str,
    q: Tensor,  # [B, S, H * D]
    cos: Tensor,  # [S, D / 2]
    sin: Tensor,  # [S, D / 2]
    num_heads: int,
) -> None:
    """Raise ValueError for tables that do not fit q."""
    expected = (q.shape[1], q.shape[2] // num_heads // 2)
    if cos.shape != expected or sin.shape != expected:
        raise ValueError(
            f"{op}: tables {tuple(cos.shape)}, {tuple(sin.shape)} do not fit "
            f"q {tuple(q.shape)} with {num_heads} heads; expected {expected}"
        )


def rms_norm_rope(
    q: Tensor,  # [B, S, H * D]
    k: Tensor,  # [B, S, H * D]
    q_weight: Tensor,  # [H * D]
    k_weight: Tensor,  # [H * D]
    cos: Tensor,  # [S, D / 2] float32
    sin: Tensor,  # [S, D / 2] float32
    *,
    num_heads: int,
    eps: float = 1e-6,
    backends: Backends = DEFAULT_BACKENDS,
) -> tuple[Tensor, Tensor]:  # q, k as [B, S, H, D], dtype of q
    """Normalise and rotate q and k.

    Raises
    ------
    ValueError : a table that does not fit the sequence length and head size, or shapes and dtypes
        that the kernel does not take.
    """
    check_tables("rms_norm_rope", q, cos, sin, num_heads)
    if use_triton("rms_norm_rope", q, q.dtype, backends):
        return _rms_norm_rope_op(q, k, q_weight, k_weight, cos, sin, num_heads, eps)
    return (
        rms_norm_rope_reference(q, q_weight, cos, sin, num_heads, eps).to(q.dtype),
        rms_norm_rope_reference(k, k_weight, cos, sin, num_heads, eps).to(k.dtype),
    )


def compile_cases() -> list[CompileCase]:
    """The model's q and k (rotated) and cross-attention's (not), in bf16."""
    cases = []
    for name, heads, dim in (("rope", 12, 128), ("norm", 1, 1536)):
        config = RmsNormRopeConfig.for_shape(63_700, heads, dim, name == "rope")
        pointers = dict.fromkeys(("q", "q_weight", "q_out"), "*bf16")
        absent: dict[str, Any] = dict.fromkeys(("k", "k_weight", "k_out", "cos", "sin"))
        if name == "rope":
            pointers |= dict.fromkeys(("k", "k_weight", "k_out"), "*bf16")
            pointers, absent = pointers | {"cos": "*fp32", "sin": "*fp32"}, {}
        strides = ("q_batch", "q_row", "k_batch", "k_row")
        sizes = {"HEADS": config.heads, "DIM": config.dim}
        sizes |= {"STEPS": config.steps, "STAGES": config.stages}
        integers = ("rows", "heads", "dim", *strides)
        cases.append(
            CompileCase(
                name=f"rms-norm-{name}",
                kernel=_rms_norm_rope_kernel,
                signature=pointers | dict.fromkeys(integers, "i32") | {"eps": "fp32"},
                constexprs=absent | sizes,
                options={"num_warps": config.num_warps},
                divisible=(*pointers, "dim", *strides),
            )
        )
    return cases
