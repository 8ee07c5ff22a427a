# mypy: allow-untyped-defs, allow-incomplete-defs
"""Flash attention's forward in portable Triton: any GPU since compute capability 8.0, any length,
head sizes up to 256, and the CPU under Triton's interpreter.

For each block of keys: s = q k^T / sqrt(D), top' = max(top, max s), p = exp(s - top'),
total' = total exp(top - top') + sum p, o' = o exp(top - top') + p v; at the end o / total. Scores
are kept in units of log 2, for exp2 is what the hardware has. The second output is the natural
logarithm of the denominator, top + log total, from which the backward rebuilds p.

Operations 4 B H Sq Sk D, products in the inputs' dtype, statistics and sums in float32. float32
inputs run without tensor cores and are there for checks. Measured on an H100 at 31,850 tokens:
498 TFLOP/s at [1, S, 12, 128] and 440 at [1, S, 24, 64] (PyTorch 423, FlashAttention-3 542).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.carried import launch
from gen3r_kernels.dispatch import CompileCase

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MAX_HEAD_DIM = 256


@triton.jit
def load_rows(
    base,  # first element of one batch element and head
    rows,
    length,
    stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASK: tl.constexpr,
):
    """[len(rows), BLOCK_D] values; zeros past HEAD_DIM and, with MASK, past `length` rows."""
    channels = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * stride + channels[None, :]
    if MASK:
        keep = (rows < length)[:, None]
        if HEAD_DIM != BLOCK_D:
            keep = keep & (channels < HEAD_DIM)[None, :]
        return tl.load(pointers, mask=keep, other=0.0)
    if HEAD_DIM != BLOCK_D:
        return tl.load(pointers, mask=(channels < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def softmax_step(o, top, total, s, v):
    """One block of keys with scores s (log 2 units) and values v, into output, maximum and sum."""
    top_next = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - top_next[:, None])
    decay = tl.exp2(top - top_next)
    total = total * decay + tl.sum(p, 1)
    o = tl.dot(p.to(v.dtype), v, o * decay[:, None], input_precision="ieee")
    return o, top_next, total


@triton.jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    num_heads,
    queries,
    keys,
    scale,  # log2(e) / sqrt(D)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    # All tiles of one head run side by side, so that its keys and values are read from L2.
    row = program % tiles * BLOCK_M
    head = program // tiles % num_heads
    batch = (program // tiles // num_heads).to(tl.int64)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    rows = row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    q = load_rows(q_ptr, rows, queries, q_row, HEAD_DIM, BLOCK_D, True)
    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        k = load_rows(k_ptr, start + columns, keys, k_row, HEAD_DIM, BLOCK_D, False)
        s = tl.dot(q, k.T, input_precision="ieee") * scale
        v = load_rows(v_ptr, start + columns, keys, v_row, HEAD_DIM, BLOCK_D, False)
        o, top, total = softmax_step(o, top, total, s, v)
    if whole < keys:
        k = load_rows(k_ptr, whole + columns, keys, k_row, HEAD_DIM, BLOCK_D, True)
        s = tl.dot(q, k.T, input_precision="ieee") * scale
        s = tl.where((whole + columns < keys)[None, :], s, float("-inf"))
        v = load_rows(v_ptr, whole + columns, keys, v_row, HEAD_DIM, BLOCK_D, True)
        o, top, total = softmax_step(o, top, total, s, v)
    o = o * (1.0 / total)[:, None]
    line = (batch * num_heads + head) * queries
    tl.store(lse_ptr + line + rows, (top + tl.log2(total)) * LN_2, mask=rows < queries)
    channels = tl.arange(0, BLOCK_D)
    o_ptr += (batch * queries * num_heads + head) * HEAD_DIM
    pointers = o_ptr + rows[:, None] * (num_heads * HEAD_DIM) + channels[None, :]
    keep = (rows < queries)[:, None] & (channels < HEAD_DIM)[None, :]
    tl.store(pointers, o.to(o_ptr.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """Launch configuration of the forward kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @staticmethod
    def for_shape(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
        """A pure function of the head size, the dtype and the compute capability."""
        wide = block_of(head_dim) > 64
        if dtype == torch.float32:
            return Config(32, 32, 4, 1)
        if head_dim > 128:
            return Config(64, 32, 4, 2)
        if capability == (9, 0):
            # Of five each on an H100: 498 TFLOP/s at head size 128, 440 at 64.
            return Config(128, 128, 8 if wide else 4, 3)
        if capability[1] != 0:  # consumer chips: 99 KB of shared memory
            return Config(128, 32, 4, 2)
        return Config(128, 64, 4, 3)


def block_of(head_dim: int) -> int:
    """Head size rounded up to what a product takes: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def check_operands(
    op: str, q: Tensor, k: Tensor, v: Tensor, instead: str = "attention backend 'sdpa'"
) -> None:
    """Raise ValueError unless q [B, Sq, H, D], k and v [B, Sk, H, D] suit the kernels."""
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; "
            "expected [B, Sq, H, D] and twice [B, Sk, H, D]"
        )
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(
            f"{op}: q, k, v differ in dtype or device: {q.dtype} {k.dtype} {v.dtype}, "
            f"{q.device} {k.device} {v.device}; give all three alike"
        )
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{op}: dtype {q.dtype} is not float32, float16 or bfloat16; use {instead}"
        )
    if q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(f"{op}: head size {q.shape[-1]} is above {MAX_HEAD_DIM}; use {instead}")
    if 0 in q.shape or k.shape[1] == 0:
        raise ValueError(f"{op}: q {tuple(q.shape)} or k {tuple(k.shape)} is empty; use {instead}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        # Offsets within a batch element are 32-bit.
        if x.shape[1] * max(x.stride(1), x.shape[2] * x.shape[3]) >= 2**31:
            raise ValueError(
                f"{op}: {name} has {x.shape[1]} rows {x.stride(1)} elements apart, which passes "
                f"2**31 elements; use {instead}"
            )


def with_dense_rows(x: Tensor) -> Tensor:
    """x itself if its last axis is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def capability_of(x: Tensor) -> tuple[int, int]:
    """Compute capability of the GPU that holds x; (0, 0) on the CPU."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def attention_portable(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, D]
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # [B, Sq, H, D] and [B, H, Sq] float32
    """Output and natural logarithm of the softmax's denominator.

    Raises
    ------
    ValueError : shapes, dtypes or devices that the kernel does not take.
    """
    check_operands("attention", q, k, v)
    q, k, v = with_dense_rows(q), with_dense_rows(k), with_dense_rows(v)
    batch, queries, heads, head_dim = q.shape
    config = config or Config.for_shape(head_dim, q.dtype, capability_of(q))
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(queries, config.block_m) * heads * batch,)
    launch(_forward_kernel)[grid](
        q,
        k,
        v,
        o,
        lse,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        heads,
        queries,
        k.shape[1],
        head_dim**-0.5 * LOG2_E.value,
        HEAD_DIM=head_dim,
        BLOCK_D=block_of(head_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return o, lse


POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


# What the compile test covers: every head size class in the model's dtype, each other dtype once.
COMPILED = (
    *((torch.bfloat16, head_dim) for head_dim in (40, 64, 128, 256)),
    (torch.float16, 128),
    (torch.float32, 64),
)


def compile_case(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> CompileCase:
    """A kernel of the attention files: pointers, strides and counts told apart by their names."""
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument in ("lse_ptr", "delta_ptr"):
            signature[argument] = "*fp32"
        elif argument == "length_ptr":
            signature[argument] = "*i32"
        elif argument.endswith("_ptr"):
            signature[argument] = POINTER[dtype]
        elif argument not in constexprs:
            signature[argument] = "fp32" if argument == "scale" else "i32"
    # Lengths and head counts are arbitrary; pointers and strides are multiples of 16.
    aligned = tuple(n for n in signature if n.endswith(("_ptr", "_batch", "_row", "_head")))
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return CompileCase(name, kernel, signature, constexprs, options, aligned)


def compile_cases() -> list[CompileCase]:
    """The kernel with every configuration it can have on compute capability 9.0."""
    cases = []
    for dtype, head_dim in COMPILED:
        config = Config.for_shape(head_dim, dtype, (9, 0))
        sizes = {
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_of(head_dim),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }
        name = f"forward {POINTER[dtype][1:]} {head_dim}"
        cases.append(
            compile_case(name, _forward_kernel, dtype, sizes, config.num_warps, config.num_stages)
        )
    return cases
