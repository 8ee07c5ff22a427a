# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""Attention whose scores come from 8-bit q and k; weights and v stay in bf16. Hopper only.

    s = (q8 k8^T) * q_scale * k_scale / sqrt(D),   o = softmax(s) v

The tensor cores form 8-bit products at twice the rate of bf16: three quarters of the time of bf16
attention (1.5 of 2 units of work), at most 995 TFLOP/s where bf16 reaches 746.

Why int8 and why not the second product. Rounding to e4m3 (3 bits of mantissa) changes a normally
distributed number by 2.45 % (root mean square) whatever the scale; the error of o is the sum of
the squares of four such errors, of q, k (through the scores, whose spread is 1), the weights and
v: 2 x 2.45 % for a kernel wholly in fp8 (5.2 % measured), 3.5 % with q and k alone in fp8. No
choice of scales changes that. int8 with a scale per query row and per 128 keys of a head is a
uniform grid: 0.6 % and 0.9 %, together 1.1 % in o. Weights in int8 need a row maximum per block
and integer sums that must be converted and added up block by block, and cost more than they save
(docs/measured.md).

Before rounding, two transformations that do not change s beyond a constant per row:

* the mean of k over a sample of the tokens is taken off every key (arXiv 2410.02367);
* channel c of q is multiplied and of k divided by (var k_c / mean q_c^2)^(1/4), so that a channel
  that is large in k alone does not take the bits of all the others (arXiv 2211.10438).

Quantisation reads q and k and writes them in 8 bits: 0.6 GB at [2, 31850, 12, 128], 0.21 ms at
2.86 TB/s. `rms_norm_rope_int8` writes such operands in the pass of the norm, for
`attention_quantized`; it takes the mean off and leaves channels as they are, for which a model
scales its norms' gains once (gen3r/precision.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.attention import attention_reference
from gen3r_kernels.attention_hopper import HEAD_DIM, launch_hopper
from gen3r_kernels.backends import ATTENTION_BACKENDS, DEFAULT_BACKENDS, Backends
from gen3r_kernels.dispatch import CompileCase, use_triton

BLOCK = 128  # keys that share a scale
LIMIT = {"int8": 127.0, "fp8": 448.0}
DTYPE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_INT8 = ATTENTION_BACKENDS["triton_int8"]  # says what the kernel takes
SMALLEST = tl.constexpr(1e-30)  # in place of the maximum of zeros


@triton.jit
def _sample_kernel(
    q,  # [B, Sq, H, D]
    k,  # [B, Sk, H, D]
    sums,  # [chunks, 3, B, H, D] float32: k, k^2 and q^2
    q_batch, q_row, q_head, k_batch, k_row, k_head,
    q_count,
    k_count,
    step,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Sums over every step-th token: k, k^2 and q^2 of each channel."""
    pair = tl.program_id(1)
    head = pair % H
    batch = (pair // H).to(tl.int64)
    channel = tl.arange(0, D)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (rows * step)[:, None].to(tl.int64)
    k_at = k + batch * k_batch + token * k_row + head * k_head + channel[None, :]
    x = tl.load(k_at, mask=(rows < k_count)[:, None], other=0.0).to(tl.float32)
    pairs = tl.num_programs(1)
    to = sums + (tl.program_id(0) * 3 * pairs + pair) * D + channel
    tl.store(to, tl.sum(x, 0))
    tl.store(to + pairs * D, tl.sum(x * x, 0))
    q_at = q + batch * q_batch + token * q_row + head * q_head + channel[None, :]
    y = tl.load(q_at, mask=(rows < q_count)[:, None], other=0.0).to(tl.float32)
    tl.store(to + 2 * pairs * D, tl.sum(y * y, 0))


@triton.jit
def _round8(x, FP8: tl.constexpr):
    """To e4m3, or to the nearest integer: beside 1.5 * 2^23 no fraction has room."""
    return x.to(tl.float8e4nv) if FP8 else ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _quantize_kernel(
    x,  # [B, S, H, D]
    sums,  # [3, B, H, D] float32: sums of k, k^2 and q^2 over the sample
    out,  # [B, S, H, D] 8-bit
    scale,  # [B, H, S] (q) or [B, H, blocks] (k) float32
    x_batch, x_row, x_head,
    length,
    pairs,
    q_count,
    k_count,
    LIMIT: tl.constexpr,
    IS_KEY: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    """One block of ROWS tokens of one head."""
    block = tl.program_id(0)
    pair = tl.program_id(1)
    head = pair % H
    batch = (pair // H).to(tl.int64)
    channel = tl.arange(0, D)
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = (rows < length)[:, None]
    token = rows[:, None].to(tl.int64)
    at = x + batch * x_batch + token * x_row + head * x_head + channel[None, :]
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    here = sums + pair * D + channel
    mean = tl.load(here) / k_count
    variance = tl.maximum(tl.load(here + pairs * D) / k_count - mean * mean, 0.0) + 1e-12
    square = tl.load(here + 2 * pairs * D) / q_count + 1e-12
    ratio = tl.clamp(tl.sqrt(tl.sqrt(variance / square)), 0.01, 100.0)[None, :]
    if IS_KEY:
        values = tl.where(inside, (values - mean[None, :]) / ratio, 0.0)
        top = tl.maximum(tl.max(tl.max(tl.abs(values), 1), 0), SMALLEST)
        tl.store(scale + pair * tl.num_programs(0) + block, top / LIMIT)
        result = _round8(values * (LIMIT / top), FP8)
    else:
        values = values * ratio
        top = tl.maximum(tl.max(tl.abs(values), 1), SMALLEST)
        tl.store(scale + pair.to(tl.int64) * length + rows, top / LIMIT, mask=rows < length)
        result = _round8(values * (LIMIT / top)[:, None], FP8)
    to = out + (batch * length + token) * (H * D) + head * D + channel[None, :]
    tl.store(to, result, mask=inside)


@dataclass(frozen=True)
class QuantizeConfig:
    """Rows of a program, its warps, and every how many tokens one enters the sample."""

    rows: int = BLOCK
    warps: int = 8
    step: int = 1

    @classmethod
    def for_length(cls, length: int) -> QuantizeConfig:
        """About 512 tokens of a long sequence, all of a short one."""
        return cls(step=max(1, length // 512))


def quantize_attention_reference(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, H, D]
    fmt: str = "int8",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # as `quantize_attention`, rounded values in float32
    """The definition in float32 PyTorch."""
    length, keys = q.shape[1], k.shape[1]
    step = QuantizeConfig.for_length(min(length, keys)).step
    q, k = q.float(), k.float()
    sample = k[:, ::step]
    mean = sample.mean(1, keepdim=True)
    variance = (sample.square().mean(1, keepdim=True) - mean.square()).clamp(min=0) + 1e-12
    square = q[:, ::step].square().mean(1, keepdim=True) + 1e-12
    ratio = (variance / square).pow(0.25).clamp(0.01, 100.0)
    q, k = q * ratio, (k - mean) / ratio
    blocks = -(-keys // BLOCK)
    padded = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, blocks * BLOCK - keys))
    q_top = q.abs().amax(-1).clamp(min=1e-30)  # [B, Sq, H]
    k_top = padded.unflatten(1, (blocks, BLOCK)).abs().amax((2, 4)).clamp(min=1e-30)
    limit = LIMIT[fmt]
    q8 = q * (limit / q_top)[..., None]
    k8 = k * (limit / k_top).repeat_interleave(BLOCK, 1)[:, :keys, :, None]
    q8, k8 = (x.round() if fmt == "int8" else x.to(DTYPE[fmt]).float() for x in (q8, k8))
    return q8, (q_top / limit).transpose(1, 2), k8, (k_top / limit).transpose(1, 2)


def attention_8bit_reference(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, D]
    fmt: str = "int8",
) -> Tensor:  # [B, Sq, H, D] float32
    """Attention in float32 over the rounded q and k."""
    q8, q_scale, k8, k_scale = quantize_attention_reference(q, k, fmt)
    scale = k_scale.transpose(1, 2).repeat_interleave(BLOCK, 1)[:, : k.shape[1], :, None]
    return attention_reference(q8 * q_scale.transpose(1, 2)[..., None], k8 * scale, v)


def quantize_attention(
    q: Tensor,  # [B, Sq, H, 128]
    k: Tensor,  # [B, Sk, H, 128]
    fmt: str = "int8",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q and k in 8 bits with their scales; see the module for what is done to them first.

    Returns
    -------
    q8 [B, Sq, H, 128], q_scale [B, H, Sq], k8 [B, Sk, H, 128], k_scale [B, H, ceil(Sk / 128)].

    Raises
    ------
    ValueError : an unknown format.
    """
    if fmt not in LIMIT:
        raise ValueError(f"8-bit attention: format '{fmt}' is unknown; known: {', '.join(LIMIT)}")
    batch, length, heads, dim = q.shape
    keys = k.shape[1]
    config = QuantizeConfig.for_length(min(length, keys))
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    counts = (-(-length // config.step), -(-keys // config.step))
    pairs, chunks = batch * heads, -(-max(counts) // 64)
    parts = torch.empty((chunks, 3, pairs, dim), dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3])
    _sample_kernel[(chunks, pairs)](
        q, k, parts, *strides, *counts, config.step, H=heads, D=dim, ROWS=64, num_warps=4
    )
    sums = parts.sum(0)
    results = []
    for x, is_key in ((q, False), (k, True)):
        size = x.shape[1]
        blocks = -(-size // config.rows)
        out = torch.empty(x.shape, dtype=DTYPE[fmt], device=x.device)
        scale = torch.empty((batch, heads, blocks if is_key else size), device=x.device)
        _quantize_kernel[(blocks, pairs)](
            x,
            sums,
            out,
            scale,
            *x.stride()[:3],
            size,
            pairs,
            *counts,
            LIMIT=LIMIT[fmt],
            IS_KEY=is_key,
            H=heads,
            D=dim,
            ROWS=config.rows,
            FP8=fmt == "fp8",
            num_warps=config.warps,
        )
        results += [out, scale]
    return results[0], results[1], results[2], results[3]


def attention_8bit(
    q: Tensor,  # [B, Sq, H, 128] bfloat16
    k: Tensor,  # [B, Sk, H, 128]
    v: Tensor,  # [B, Sk, H, 128]
    fmt: str = "int8",
) -> Tensor:  # [B, Sq, H, 128]
    """Attention with scores from int8 or e4m3 ("fp8") products; forward only.

    Raises
    ------
    ValueError : shapes, dtypes or formats outside what the kernel takes.
    """
    if q.shape[-1] != HEAD_DIM:
        raise ValueError(
            f"8-bit attention: head size {q.shape[-1]} is not {HEAD_DIM}; use the backend 'triton'"
        )
    q8, q_scale, k8, k_scale = quantize_attention(q, k, fmt)
    return launch_hopper(q8, k8, v, q_scale, k_scale)[0]


def attention_quantized_reference(
    q: Tensor,  # [B, Sq, H, D] 8-bit
    q_scale: Tensor,  # [B, H, Sq] float32
    k: Tensor,  # [B, Sk, H, D] 8-bit
    k_scale: Tensor,  # [B, H, ceil(Sk / 128)] float32
    v: Tensor,  # [B, Sk, H, D]
) -> Tensor:  # [B, Sq, H, D] float32
    """The definition in float32: attention over what the quantised operands stand for."""
    per_key = k_scale.transpose(1, 2).repeat_interleave(BLOCK, 1)[:, : k.shape[1], :, None]
    per_query = q_scale.transpose(1, 2)[..., None]
    return attention_reference(q.float() * per_query, k.float() * per_key, v.float())


@torch.library.custom_op("gen3r::attention_quantized", mutates_args=())
def _attention_quantized_op(
    q: Tensor,  # [B, Sq, H, 128] int8 or float8_e4m3fn
    q_scale: Tensor,  # [B, H, Sq] float32
    k: Tensor,  # [B, Sk, H, 128], dtype of q
    k_scale: Tensor,  # [B, H, ceil(Sk / 128)] float32
    v: Tensor,  # [B, Sk, H, 128] bfloat16 or float16
) -> Tensor:  # [B, Sq, H, 128], dtype of v
    """Opaque to torch.compile; nothing in it waits for the GPU, so that CUDA graphs take it."""
    if q.is_cuda:
        return launch_hopper(q, k, v, q_scale, k_scale)[0]
    # Gluon kernels have no interpreter: in it, only the kernels around this one are run.
    return attention_quantized_reference(q, q_scale, k, k_scale, v).to(v.dtype).contiguous()


@_attention_quantized_op.register_fake
def _(q: Tensor, q_scale: Tensor, k: Tensor, k_scale: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(q.shape)


def attention_quantized(
    q: Tensor,  # [B, Sq, H, D] int8 or float8_e4m3fn
    q_scale: Tensor,  # [B, H, Sq] float32
    k: Tensor,  # [B, Sk, H, D], dtype of q
    k_scale: Tensor,  # [B, H, ceil(Sk / 128)] float32
    v: Tensor,  # [B, Sk, H, D], rows may be strided
    *,
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor:  # [B, Sq, H, D], dtype of v
    """Attention over operands that are quantised already (`rms_norm_rope_int8` writes them).

    Raises
    ------
    ValueError : shapes, dtypes or a GPU that the kernel does not take (head size 128, v in
        bfloat16 or float16, compute capability 9.0), or gradients asked of 8-bit operands.
    """
    op = "attention_quantized"
    if torch.is_grad_enabled() and v.requires_grad:
        raise ValueError(f"{op}: 8-bit rounding has no backward; use attention to train")
    if not use_triton(op, v, v.dtype, backends):
        return attention_quantized_reference(q, q_scale, k, k_scale, v).to(v.dtype)
    refusal = _INT8.refusal(v)
    if v.is_cuda and refusal is not None:
        raise ValueError(f"{op}: {refusal}; keep the scores in bfloat16, or operators='reference'")
    return _attention_quantized_op(q, q_scale, k, k_scale, v)


def compile_cases() -> list[CompileCase]:
    """The quantisation kernels at the real head size, for both formats."""
    strides = dict.fromkeys(("q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head"), "i32")
    sample = CompileCase(
        "attention_8bit sample",
        _sample_kernel,
        {
            **dict.fromkeys(("q", "k"), "*bf16"),
            "sums": "*fp32",
            **strides,
            **dict.fromkeys(("q_count", "k_count", "step"), "i32"),
        },
        {"H": 12, "D": HEAD_DIM, "ROWS": 64},
        {"num_warps": 4},
        ("q", "k", *strides),
    )
    cases = [sample]
    config = QuantizeConfig()
    for fmt, name in (("int8", "*i8"), ("fp8", "*fp8e4nv")):
        for is_key in (False, True):
            signature = {
                "x": "*bf16",
                "sums": "*fp32",
                "out": name,
                "scale": "*fp32",
                **dict.fromkeys(("x_batch", "x_row", "x_head"), "i32"),
                **dict.fromkeys(("length", "pairs", "q_count", "k_count"), "i32"),
            }
            constexprs = {
                "LIMIT": LIMIT[fmt],
                "IS_KEY": is_key,
                "H": 12,
                "D": HEAD_DIM,
                "ROWS": config.rows,
                "FP8": fmt == "fp8",
            }
            cases.append(
                CompileCase(
                    f"attention_8bit {fmt} {'k' if is_key else 'q'}",
                    _quantize_kernel,
                    signature,
                    constexprs,
                    {"num_warps": config.warps},
                    ("x", "out", "x_batch", "x_row", "x_head"),
                )
            )
    return cases
