# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""LayerNorm of every query and key head, then a rotary embedding over the image plane (VGGT).

    n = (x - mean) / sqrt(var + eps) * weight + bias      over the D channels of a head
    y = n cos + turned(n) sin

The channels of a head are two halves, turned by the token's row and by its column; in each half
channels i and i + D / 4 form a pair, and turned(n) is (-second, first) of every pair. The tables
hold the P tokens of one view; a sequence of several views repeats them.

VGGT has this 48 times at [49, 1605, 16, 64]. Bytes: q and k read and written once, 0.64 GB in bf16:
0.23 ms at the 2.86 TB/s that a copy reaches on an H100. As PyTorch operators (two norms on strided
rows, float32 copies, stack, products) about twelve passes. Statistics and sums are float32; the
result is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.carried import launch, operator
from gen3r_kernels.dispatch import CompileCase, use_triton

PlaneTables = tuple[Tensor, Tensor]  # cos and sin, both [P, D] float32, equal within a pair
INPUTS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _norm_rope_kernel(
    q,  # [B, N, H, D], heads D apart
    k,
    q_weight,  # [D]
    q_bias,
    k_weight,
    k_bias,
    cos,  # [P, D] float32
    sin,
    q_out,  # [B, N, H, D] contiguous
    k_out,
    rows,  # N * H
    period,  # P
    eps,
    q_batch,  # strides in elements
    q_row,
    k_batch,
    k_row,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """ROWS heads of the queries or (third axis of the grid) of the keys of one sample."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // H
    if tl.program_id(2) == 0:
        source = q + batch * q_batch
        stride = q_row
        weight = q_weight
        bias = q_bias
        target = q_out
    else:
        source = k + batch * k_batch
        stride = k_row
        weight = k_weight
        bias = k_bias
        target = k_out
    QUARTER: tl.constexpr = D // 4
    pair = tl.arange(0, PAIRS)
    channel = pair // QUARTER * (D // 2) + pair % QUARTER  # of the pair's first member
    inside = (row < rows)[:, None] & (pair < D // 2)[None, :]
    source += token.to(tl.int64)[:, None] * stride + (row % H)[:, None] * D + channel[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + QUARTER, mask=inside, other=0.0).to(tl.float32)

    mean = ((tl.sum(first, 1) + tl.sum(second, 1)) / D)[:, None]
    first = tl.where(inside, first - mean, 0.0)
    second = tl.where(inside, second - mean, 0.0)
    variance = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D
    scale = tl.rsqrt(variance + eps)[:, None]
    known = pair < D // 2
    first = first * scale * tl.load(weight + channel, known, 0.0).to(tl.float32)[None, :]
    first += tl.load(bias + channel, known, 0.0).to(tl.float32)[None, :]
    second = second * scale * tl.load(weight + channel + QUARTER, known, 0.0).to(tl.float32)
    second += tl.load(bias + channel + QUARTER, known, 0.0).to(tl.float32)[None, :]

    angle = (token % period)[:, None] * D + channel[None, :]
    cosine = tl.load(cos + angle, mask=inside, other=0.0)
    sine = tl.load(sin + angle, mask=inside, other=0.0)
    target += (batch * rows + row)[:, None] * D + channel[None, :]
    kind = target.dtype.element_ty
    tl.store(target, (first * cosine - second * sine).to(kind), mask=inside)
    tl.store(target + QUARTER, (second * cosine + first * sine).to(kind), mask=inside)


@dataclass(frozen=True)
class Config:
    """Heads and padded pairs of channels of one program, and its warps."""

    rows: int
    pairs: int
    warps: int

    @classmethod
    def for_shape(cls, head_dim: int) -> Config:
        """4,096 numbers a program, 32 a thread."""
        pairs = max(8, triton.next_power_of_2(head_dim // 2))
        return cls(max(1, 2048 // pairs), pairs, 4)


def _dense_heads(x: Tensor) -> Tensor:
    """x [B, N, H, D] itself if its heads lie side by side, else a contiguous copy."""
    return x if x.stride()[2:] == (x.shape[3], 1) else x.contiguous()


@operator("layer_norm_rope")
def _layer_norm_rope(
    q: Tensor,  # [B, N, H, D]
    k: Tensor,  # [B, N, H, D]
    q_weight: Tensor,  # [D]
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,  # [P, D] float32 contiguous
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if q.dtype not in INPUTS or k.dtype != q.dtype:
        raise ValueError(
            f"layer_norm_rope: dtypes {q.dtype} and {k.dtype}; the kernel takes two alike of "
            f"{INPUTS}; use operators='reference'"
        )
    batch, length, heads, head_dim = q.shape
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if q.numel() == 0:
        return q_out, k_out
    q, k = _dense_heads(q), _dense_heads(k)
    config = Config.for_shape(head_dim)
    launch(_norm_rope_kernel)[(triton.cdiv(length * heads, config.rows), batch, 2)](
        q,
        k,
        *(t.contiguous() for t in (q_weight, q_bias, k_weight, k_bias)),
        cos,
        sin,
        q_out,
        k_out,
        length * heads,
        len(cos),
        eps,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        H=heads,
        D=head_dim,
        ROWS=config.rows,
        PAIRS=config.pairs,
        num_warps=config.warps,
    )
    return q_out, k_out


@_layer_norm_rope.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rotate(x: Tensor, tables: PlaneTables) -> Tensor:
    """The heads of a sequence, turned; computed in float32."""
    views = x.float().unflatten(1, (-1, len(tables[0])))  # [B, views, P, H, D]
    cos, sin = (t[:, None, :] for t in tables)
    first, second = views.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    return (views * cos + turned * sin).flatten(1, 2)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm_rope_reference(
    q: Tensor,  # [B, N, H, D]
    k: Tensor,  # [B, N, H, D]
    q_norm: tuple[Tensor, Tensor],
    k_norm: tuple[Tensor, Tensor],
    tables: PlaneTables,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # both [B, N, H, D] float32
    """The definition in float32."""
    q = _norm(q.float(), q_norm[0].float(), q_norm[1].float(), eps)
    k = _norm(k.float(), k_norm[0].float(), k_norm[1].float(), eps)
    return _rotate(q, tables), _rotate(k, tables)


def layer_norm_rope(
    q: Tensor,  # [B, N, H, D]
    k: Tensor,  # [B, N, H, D]
    q_norm: tuple[Tensor, Tensor],  # weight and bias [D] of the queries' norm
    k_norm: tuple[Tensor, Tensor],  # of the keys'
    tables: PlaneTables,  # of P tokens; N is a multiple of P
    *,
    eps: float = 1e-5,
    backends: Backends = DEFAULT_BACKENDS,
) -> tuple[Tensor, Tensor]:  # both [B, N, H, D], dtype of q
    """Normalise and turn queries and keys.

    ``auto`` takes the kernel on a GPU in half precision. It has no derivative: where autograd
    records, PyTorch's operators run, with the norm in the dtype of q.

    Raises
    ------
    ValueError : shapes that do not fit; on the Triton path by name (`operators="triton"`) inputs
        that require gradients.
    """
    shape, period = tuple(q.shape), len(tables[0])
    fits = q.dim() == 4 and k.shape == q.shape and q.shape[-1] % 4 == 0
    if not fits or any(tuple(t.shape) != (period, shape[3]) for t in tables):
        raise ValueError(
            f"layer_norm_rope: q {list(shape)}, k {list(k.shape)}, tables "
            f"{[list(t.shape) for t in tables]}; expected twice [B, N, H, D] with D a multiple of "
            "4, and twice [P, D]"
        )
    if shape[1] % period:
        raise ValueError(
            f"layer_norm_rope: {shape[1]} tokens are no multiple of the tables' {period}"
        )
    norms = (*q_norm, *k_norm)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, *norms))
    if backends.operators == "triton" and differentiable:
        raise ValueError(
            "layer_norm_rope: operators='triton' has no derivative; use operators='auto'"
        )
    if use_triton("layer_norm_rope", q, q.dtype, backends) and not differentiable:
        cos, sin = (t.float().contiguous() for t in tables)
        return torch.ops.gen3r.layer_norm_rope(q, k, *norms, cos, sin, eps)
    q, k = _norm(q, *q_norm, eps), _norm(k, *k_norm, eps)
    return _rotate(q, tables).to(q.dtype), _rotate(k, tables).to(k.dtype)


def compile_cases() -> list[CompileCase]:
    """VGGT's heads."""
    config = Config.for_shape(64)
    pointers = dict.fromkeys(
        ("q", "k", "q_weight", "q_bias", "k_weight", "k_bias", "q_out", "k_out"), "*bf16"
    )
    pointers |= {"cos": "*fp32", "sin": "*fp32"}
    strides = ("q_batch", "q_row", "k_batch", "k_row")
    return [
        CompileCase(
            "16 heads of 64",
            _norm_rope_kernel,
            pointers | dict.fromkeys(("rows", "period", *strides), "i32") | {"eps": "fp32"},
            {"H": 16, "D": 64, "ROWS": config.rows, "PAIRS": config.pairs},
            {"num_warps": config.warps},
            (*pointers, *strides),
        )
    ]
