# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""`rms_norm_rope` with 8-bit integer outputs, for attention whose first product is in int8.

    q8 = round(q / s),  s = max |q| / 127 over the channels of one token and head
    k8 = round(k' / s), s = max |k'| / 127 over the channels of a block of tokens of one head

k' = k - mean, one vector a sample and head taken off every key. q . k' differs from q . k by the
same amount for every key of a query, which softmax does not see, so that any vector is exact; keys
of real models share a large common part, and without it the rest keeps more of the 8 bits
(arXiv 2410.02367). `rope_key_mean` estimates it from every 16th token.

A key block's scale needs its rows' norms, which need whole rows, and 128 whole rows (393 KB) are
more than a processor can hold: the first kernel quantises q and leaves 1 / rms of every key, the
second reads the keys again by block and head.

Bytes at [2, 31850, 12 * 128]: q and k 391 MB in, k once more 196 MB, tables 16 MB twice, q8 and k8
196 MB out: 815 MB, at least 0.285 ms on an H100 (2.86 TB/s; not timed yet), against 0.28 ms for the
same in bf16 and 0.21 ms more to quantise that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.dispatch import CompileCase, use_triton
from gen3r_kernels.rms_norm_rope import (
    check_rows,
    check_tables,
    launch_rms_norm_rope,
    norm_rotate,
    rms_norm_rope_reference,
)

BLOCK = 128  # tokens that share a key scale
SAMPLE = 16  # every so many tokens count for the mean
SMALLEST = tl.constexpr(1e-30)  # in place of the maximum of zeros, whose values and scale are 0


@triton.jit
def _round(x):
    """To the nearest integer, halves to even: what lies behind the point falls off the mantissa."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23


@triton.jit
def _query_kernel(
    q,  # [B, S, H * D]
    k,  # [B, S, H * D]
    q_weight,  # [H * D]
    cos,  # [S, D / 2]
    sin,  # [S, D / 2]
    q_out,  # [B, S, H, D] int8
    q_scale,  # [B, H, S]
    k_rstd,  # [B, S]
    rows,
    heads,
    dim,
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
    """STEPS rows: q to int8, and 1 / rms of k."""
    batch = tl.program_id(1).to(tl.int64)
    head, channel = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    inside = (head < heads) & (channel < dim)
    columns = head * dim + channel
    width = heads * dim
    weights = tl.load(q_weight + columns, inside, 0.0).to(tl.float32)
    pair = tl.arange(0, DIM // 2)[None, :]
    first = tl.program_id(0).to(tl.int64) * STEPS
    for step in tl.range(0, min(STEPS, rows - first), num_stages=STAGES):
        row = first + step
        x = tl.load(q + batch * q_batch + row * q_row + columns, inside, 0.0).to(tl.float32)
        key = tl.load(k + batch * k_batch + row * k_row + columns, inside, 0.0).to(tl.float32)
        cosine = tl.load(cos + row * (dim // 2) + pair, pair < dim // 2, 0.0)
        sine = tl.load(sin + row * (dim // 2) + pair, pair < dim // 2, 0.0)
        x = norm_rotate(x, weights, cosine, sine, width, eps, HEADS, DIM)
        largest = tl.max(tl.abs(x), 1)
        x = _round(x * (127.0 / tl.maximum(largest, SMALLEST))[:, None]).to(tl.int8)
        tl.store(q_out + (batch * rows + row) * width + columns, x, inside)
        index = tl.arange(0, HEADS)
        tl.store(q_scale + (batch * heads + index) * rows + row, largest / 127.0, index < heads)
        rstd = tl.rsqrt(tl.sum(tl.sum(key * key, 1), 0) / width + eps)
        tl.store(k_rstd + batch * rows + row, rstd)


@triton.jit
def _rotated_keys(
    k, k_rstd, weights, means, cos, sin, token, rows, channel, dim, k_row, TOKENS: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """TOKENS keys of one head [TOKENS, DIM] float32, mean taken off, 0 outside."""
    inside = (token < rows)[:, None] & (channel < dim)[None, :]
    x = tl.load(k + token.to(tl.int64)[:, None] * k_row + channel[None, :], inside, 0.0)
    x = x.to(tl.float32) * tl.load(k_rstd + token, token < rows, 0.0)[:, None] * weights[None, :]
    pair = tl.arange(0, DIM // 2)[None, :]
    half = (token < rows)[:, None] & (pair < dim // 2)
    place = token[:, None] * (dim // 2) + pair
    cosine, sine = tl.load(cos + place, half, 0.0), tl.load(sin + place, half, 0.0)
    even, odd = tl.split(tl.reshape(x, (TOKENS, DIM // 2, 2)))
    x = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    return tl.where(inside, tl.reshape(x, (TOKENS, DIM)) - means[None, :], 0.0)


@triton.jit
def _key_kernel(
    k,  # [B, S, H * D]
    k_weight,  # [H * D]
    k_rstd,  # [B, S]
    k_mean,  # [B, H, D] or None
    cos,  # [S, D / 2]
    sin,  # [S, D / 2]
    k_out,  # [B, S, H, D] int8
    k_scale,  # [B, H, blocks]
    rows,
    heads,
    dim,
    k_batch,  # strides in elements
    k_row,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One block of BLOCK tokens of one head, TOKENS at a time: the scale, then the values."""
    block, head, batch = tl.program_id(1), tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, DIM)
    weights = tl.load(k_weight + head * dim + channel, channel < dim, 0.0).to(tl.float32)
    means = tl.zeros([DIM], tl.float32)
    if k_mean is not None:
        place = (batch * heads + head) * dim + channel
        means = tl.load(k_mean + place, channel < dim, 0.0)
    k += batch * k_batch + head * dim
    k_rstd += batch * rows
    token = block * BLOCK + tl.arange(0, TOKENS)
    x = _rotated_keys(
        k, k_rstd, weights, means, cos, sin, token, rows, channel, dim, k_row, TOKENS, DIM
    )
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    for start in range(TOKENS, BLOCK, TOKENS):
        x = _rotated_keys(
            k, k_rstd, weights, means, cos, sin, token + start, rows, channel, dim, k_row, TOKENS,
            DIM,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(tl.max(tl.abs(x), 1), 0))
    tl.store(k_scale + (batch * heads + head) * tl.num_programs(1) + block, largest / 127.0)
    inverse = 127.0 / tl.maximum(largest, SMALLEST)
    for start in range(0, BLOCK, TOKENS):
        # The block is still in the L1 cache; with TOKENS == BLOCK it is still in registers.
        if TOKENS < BLOCK:
            x = _rotated_keys(
                k, k_rstd, weights, means, cos, sin, token + start, rows, channel, dim, k_row,
                TOKENS, DIM,
            )  # fmt: skip
        at = (batch * rows + token + start)[:, None] * (heads * dim) + head * dim + channel[None, :]
        inside = (token + start < rows)[:, None] & (channel < dim)[None, :]
        tl.store(k_out + at, _round(x * inverse).to(tl.int8), inside)


@dataclass(frozen=True)
class RmsNormRopeInt8Config:
    """Launches of the two kernels: padded sizes, rows a program, loads ahead, warps."""

    heads: int
    dim: int
    steps: int
    stages: int
    num_warps: int
    key_tokens: int
    key_warps: int

    @classmethod
    def for_shape(cls, rows: int, heads: int, dim: int, block: int) -> RmsNormRopeInt8Config:
        """For `rows` = B * S rows of `heads` heads of `dim` channels, key scales per `block`."""
        heads, dim = triton.next_power_of_2(heads), max(triton.next_power_of_2(dim), 16)
        steps, warps = min(4, max(1, rows // 1024)), min(max(heads * dim // 512, 1), 16)
        stages = 3 if heads * dim <= 4096 else 1  # two rows a stage in shared memory
        return cls(heads, dim, steps, stages, warps, min(block, 32), 4)


class Int8QueriesKeys(NamedTuple):
    """q is approximately q.float() * q_scale, k - mean is k.float() * k_scale of its block."""

    q: Tensor  # [B, S, H, D] int8
    q_scale: Tensor  # [B, H, S] float32
    k: Tensor  # [B, S, H, D] int8
    k_scale: Tensor  # [B, H, ceil(S / block)] float32


def _allocate(q: Tensor, num_heads: int, block: int) -> Int8QueriesKeys:
    batch, rows, width = q.shape
    shape = (batch, rows, num_heads, width // num_heads)
    scales = ((batch, num_heads, n) for n in (rows, (rows + block - 1) // block))
    q_scale, k_scale = (q.new_empty(s, dtype=torch.float32) for s in scales)
    return Int8QueriesKeys(
        q.new_empty(shape, dtype=torch.int8), q_scale, q.new_empty(shape, dtype=torch.int8), k_scale
    )


@torch.library.custom_op("gen3r::rms_norm_rope_int8", mutates_args=())
def _int8_op(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
    k_mean: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "rms_norm_rope_int8"
    q, k = check_rows(op, q, q_weight, q), check_rows(op, k, k_weight, q)
    batch, rows, width = q.shape
    dim = width // num_heads
    cos, sin = cos.contiguous(), sin.contiguous()
    result = _allocate(q, num_heads, block)
    if q.numel() == 0:
        return result.q, result.q_scale, result.k, result.k_scale
    k_rstd = q.new_empty((batch, rows), dtype=torch.float32)
    config = RmsNormRopeInt8Config.for_shape(batch * rows, num_heads, dim, block)
    _query_kernel[(triton.cdiv(rows, config.steps), batch)](
        q,
        k,
        q_weight.contiguous(),
        cos,
        sin,
        result.q,
        result.q_scale,
        k_rstd,
        rows,
        num_heads,
        dim,
        eps,
        *q.stride()[:2],
        *k.stride()[:2],
        HEADS=config.heads,
        DIM=config.dim,
        STEPS=config.steps,
        STAGES=config.stages,
        num_warps=config.num_warps,
    )
    _key_kernel[(num_heads, result.k_scale.shape[2], batch)](
        k,
        k_weight.contiguous(),
        k_rstd,
        None if k_mean is None else k_mean.contiguous(),
        cos,
        sin,
        result.k,
        result.k_scale,
        rows,
        num_heads,
        dim,
        *k.stride()[:2],
        DIM=config.dim,
        BLOCK=block,
        TOKENS=config.key_tokens,
        num_warps=config.key_warps,
    )
    return result.q, result.q_scale, result.k, result.k_scale


@_int8_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
    k_mean: Any,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    result = _allocate(q, num_heads, block)
    return result.q, result.q_scale, result.k, result.k_scale


@torch.library.custom_op("gen3r::rope_key_mean", mutates_args=())
def _mean_op(
    k: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, eps: float
) -> Tensor:
    tables = (cos[::SAMPLE], sin[::SAMPLE])
    (keys,) = launch_rms_norm_rope(
        "rope_key_mean", k[:, ::SAMPLE], None, k_weight, None, tables, num_heads, eps
    )
    return keys.mean(1, dtype=torch.float32)


@_mean_op.register_fake
def _(k: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, num_heads: int, eps: float) -> Tensor:
    shape = (k.shape[0], num_heads, k.shape[2] // num_heads)
    return k.new_empty(shape, dtype=torch.float32)


def rope_key_mean(
    k: Tensor,  # [B, S, H * D]
    k_weight: Tensor,  # [H * D]
    cos: Tensor,  # [S, D / 2] float32
    sin: Tensor,  # [S, D / 2] float32
    *,
    num_heads: int,
    eps: float = 1e-6,
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor:  # [B, H, D] float32
    """Mean of the normalised and rotated keys over every 16th token, for `rms_norm_rope_int8`.

    Raises
    ------
    ValueError : tables that do not fit, or shapes and dtypes that the kernel does not take.
    """
    check_tables("rope_key_mean", k, cos, sin, num_heads)
    if use_triton("rope_key_mean", k, k.dtype, backends):
        return _mean_op(k, k_weight, cos, sin, num_heads, eps)
    tables = (cos[::SAMPLE], sin[::SAMPLE])
    return rms_norm_rope_reference(k[:, ::SAMPLE], k_weight, *tables, num_heads, eps).mean(1)


def rms_norm_rope_int8_reference(
    q: Tensor,  # [B, S, H * D]
    k: Tensor,  # [B, S, H * D]
    q_weight: Tensor,  # [H * D]
    k_weight: Tensor,  # [H * D]
    cos: Tensor,  # [S, D / 2] float32
    sin: Tensor,  # [S, D / 2] float32
    *,
    num_heads: int,
    eps: float = 1e-6,
    k_mean: Tensor | None = None,  # [B, H, D] float32
    block: int = BLOCK,
) -> Int8QueriesKeys:
    """The definition in float32."""
    q = rms_norm_rope_reference(q, q_weight, cos, sin, num_heads, eps).transpose(1, 2)
    k = rms_norm_rope_reference(k, k_weight, cos, sin, num_heads, eps).transpose(1, 2)
    if k_mean is not None:
        k = k - k_mean[:, :, None]

    def divide(x: Tensor, scale: Tensor) -> Tensor:
        values = torch.where(scale > 0, x / scale, 0.0).round()
        return values.to(torch.int8).transpose(1, 2).contiguous()

    q_scale = q.abs().amax(-1) / 127
    padded = torch.nn.functional.pad(k.abs().amax(-1), (0, -k.shape[2] % block))
    k_scale = padded.unflatten(-1, (-1, block)).amax(-1) / 127
    per_token = k_scale.repeat_interleave(block, dim=-1)[..., : k.shape[2]]
    return Int8QueriesKeys(
        divide(q, q_scale[..., None]), q_scale, divide(k, per_token[..., None]), k_scale
    )


def rms_norm_rope_int8(
    q: Tensor,  # [B, S, H * D]
    k: Tensor,  # [B, S, H * D]
    q_weight: Tensor,  # [H * D]
    k_weight: Tensor,  # [H * D]
    cos: Tensor,  # [S, D / 2] float32
    sin: Tensor,  # [S, D / 2] float32
    *,
    num_heads: int,
    eps: float = 1e-6,
    k_mean: Tensor | None = None,  # [B, H, D] float32, see rope_key_mean
    block: int = BLOCK,
    backends: Backends = DEFAULT_BACKENDS,
) -> Int8QueriesKeys:
    """Normalise and rotate q and k and leave them in 8 bits; no backward.

    Raises
    ------
    ValueError : tables, a mean or a block that do not fit, shapes and dtypes that the kernel does
        not take, or gradients asked of 8-bit values.
    """
    op = "rms_norm_rope_int8"
    check_tables(op, q, cos, sin, num_heads)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, q_weight, k_weight)):
        raise ValueError(f"{op}: 8-bit rounding has no backward; use rms_norm_rope to train")
    if block not in (32, 64, 128, 256):
        raise ValueError(f"{op}: block {block} is not one of 32, 64, 128, 256")
    expected = (q.shape[0], num_heads, q.shape[2] // num_heads)
    if k_mean is not None and (k_mean.shape != expected or k_mean.dtype != torch.float32):
        raise ValueError(
            f"{op}: k_mean {list(k_mean.shape)} {k_mean.dtype} does not fit; expected "
            f"{list(expected)} float32"
        )
    if use_triton(op, q, torch.int8, backends):
        given = (q, k, q_weight, k_weight, cos, sin, num_heads, eps, k_mean, block)
        return Int8QueriesKeys(*_int8_op(*given))
    return rms_norm_rope_int8_reference(
        q, k, q_weight, k_weight, cos, sin, num_heads=num_heads, eps=eps, k_mean=k_mean, block=block
    )


def compile_cases() -> list[CompileCase]:
    """Both kernels at the model's shape, keys with and without a mean."""
    config = RmsNormRopeInt8Config.for_shape(63_700, 12, 128, BLOCK)
    inputs = dict.fromkeys(("q", "k", "q_weight"), "*bf16") | {"cos": "*fp32", "sin": "*fp32"}
    outputs = {"q_out": "*i8", "q_scale": "*fp32", "k_rstd": "*fp32"}
    strides = ("q_batch", "q_row", "k_batch", "k_row")
    integers = dict.fromkeys(("rows", "heads", "dim", *strides), "i32")
    cases = [
        CompileCase(
            name="int8-queries",
            kernel=_query_kernel,
            signature=inputs | outputs | integers | {"eps": "fp32"},
            constexprs={
                "HEADS": config.heads,
                "DIM": config.dim,
                "STEPS": config.steps,
                "STAGES": config.stages,
            },
            options={"num_warps": config.num_warps},
            divisible=(*inputs, *outputs, "dim", *strides),
        )
    ]
    pointers = dict.fromkeys(("k", "k_weight"), "*bf16")
    pointers |= dict.fromkeys(("k_rstd", "k_mean", "cos", "sin", "k_scale"), "*fp32")
    pointers |= {"k_out": "*i8"}
    key_strides = ("k_batch", "k_row")
    for name in ("mean", "plain"):
        absent: dict[str, Any] = {} if name == "mean" else {"k_mean": None}
        cases.append(
            CompileCase(
                name=f"int8-keys-{name}",
                kernel=_key_kernel,
                signature=pointers | dict.fromkeys(("rows", "heads", "dim", *key_strides), "i32"),
                constexprs=absent
                | {"DIM": config.dim, "BLOCK": BLOCK, "TOKENS": config.key_tokens},
                options={"num_warps": config.key_warps},
                divisible=(*(p for p in pointers if p not in absent), "dim", *key_strides),
            )
        )
    return cases
