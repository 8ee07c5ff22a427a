# mypy: allow-untyped-defs, allow-incomplete-defs
"""Gradients of attention from its output o and the logarithm of its denominator, lse.

p = exp(s - lse) with s = q k^T / sqrt(D), delta = sum(do * o, channels), dp = do v^T,
ds = p (dp - delta); dv = p^T do, dk = ds^T q / sqrt(D), dq = ds k / sqrt(D).

Counted operations: 10 B H Sq Sk D (five products). At the real size 31.2 TFLOP, at least 42 ms at
the 746 TFLOP/s of bf16 products on an H100.

Providers, on Hopper fed with our o and lse. ``fa4``: FlashAttention-4's backward for Hopper, where
that package is installed; ``cudnn``: cuDNN's through PyTorch's operator. Both add up dq with
atomics, so that repeated runs differ in the last bits; ``fa4_deterministic`` adds in a fixed order.
``triton``: two kernels, one per block of keys (dk, dv), one per block of queries (dq); they build p
and dp twice (14 instead of 10), need no atomics and repeat to the bit. ``auto`` takes the first of
them that can run, and with ``torch.use_deterministic_algorithms(True)`` the first that repeats.
Measured on an H100 at 12 heads of 128 and 31,850 tokens, TFLOP/s: ``fa4`` 631 to 648, ``cudnn``
544, ``fa4_deterministic`` 536 to 616; at 16,000 ``cudnn`` 544, ``triton`` 387 (64 x 64 tiles and 4
warps; 235 to 375 with 128-row tiles).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.attention_libraries import backward_cudnn, backward_fa4, fa4_is_installed
from gen3r_kernels.attention_triton import (
    COMPILED,
    LOG2_E,
    POINTER,
    block_of,
    capability_of,
    check_operands,
    compile_case,
    load_rows,
    with_dense_rows,
)
from gen3r_kernels.dispatch import CompileCase

PROVIDERS = ("auto", "fa4", "fa4_deterministic", "cudnn", "triton")
SHORTEST_FA4 = 1024  # tokens: below, a kernel made at run time (3 s) does not pay


@triton.jit
def _delta_kernel(
    o_ptr,
    grad_ptr,
    delta_ptr,
    o_batch,
    o_row,
    o_head,
    g_batch,
    g_row,
    g_head,
    num_heads,
    queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    head = program // tiles % num_heads
    batch = (program // tiles // num_heads).to(tl.int64)
    rows = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_ptr += batch * o_batch + head * o_head
    grad_ptr += batch * g_batch + head * g_head
    o = load_rows(o_ptr, rows, queries, o_row, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    grad = load_rows(grad_ptr, rows, queries, g_row, HEAD_DIM, BLOCK_D, True).to(tl.float32)
    delta_ptr += (batch * num_heads + head) * queries
    tl.store(delta_ptr + rows, tl.sum(o * grad, 1), mask=rows < queries)


@triton.jit
def _keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    g_batch,
    g_row,
    g_head,
    num_heads,
    queries,
    keys,
    scale,  # log2(e) / sqrt(D)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(keys, BLOCK_N)
    program = tl.program_id(0)
    head = program // tiles % num_heads
    batch = (program // tiles // num_heads).to(tl.int64)
    columns = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    q_ptr += batch * q_batch + head * q_head
    grad_ptr += batch * g_batch + head * g_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    lse_ptr += (batch * num_heads + head) * queries
    delta_ptr += (batch * num_heads + head) * queries
    k = load_rows(k_ptr, columns, keys, k_row, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, columns, keys, v_row, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, queries, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, rows, queries, q_row, HEAD_DIM, BLOCK_D, True)
        # Infinite for queries that are not there: their p is zero.
        lse = tl.load(lse_ptr + rows, mask=rows < queries, other=float("inf"))
        s = tl.dot(k, q.T, input_precision="ieee")  # transposed: keys by queries
        p = tl.exp2(s * scale - (lse * LOG2_E)[None, :])
        grad = load_rows(grad_ptr, rows, queries, g_row, HEAD_DIM, BLOCK_D, True)
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
        dp = tl.dot(v, grad.T, input_precision="ieee")
        delta = tl.load(delta_ptr + rows, mask=rows < queries, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    channels = tl.arange(0, BLOCK_D)
    base = (batch * keys * num_heads + head) * HEAD_DIM
    offsets = base + columns[:, None] * (num_heads * HEAD_DIM) + channels[None, :]
    keep = (columns < keys)[:, None] & (channels < HEAD_DIM)[None, :]
    dk *= scale / LOG2_E
    tl.store(dk_ptr + offsets, dk.to(dk_ptr.dtype.element_ty), mask=keep)
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    g_batch,
    g_row,
    g_head,
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
    head = program // tiles % num_heads
    batch = (program // tiles // num_heads).to(tl.int64)
    rows = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += batch * q_batch + head * q_head
    grad_ptr += batch * g_batch + head * g_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    line = (batch * num_heads + head) * queries
    q = load_rows(q_ptr, rows, queries, q_row, HEAD_DIM, BLOCK_D, True)
    grad = load_rows(grad_ptr, rows, queries, g_row, HEAD_DIM, BLOCK_D, True)
    lse = tl.load(lse_ptr + line + rows, mask=rows < queries, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + line + rows, mask=rows < queries, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, columns, keys, k_row, HEAD_DIM, BLOCK_D, True)
        s = tl.dot(q, k.T, input_precision="ieee")
        p = tl.exp2(s * scale - lse[:, None])
        # k is zero for keys that are not there, but p may be infinite.
        p = tl.where((columns < keys)[None, :], p, 0.0)
        v = load_rows(v_ptr, columns, keys, v_row, HEAD_DIM, BLOCK_D, True)
        dp = tl.dot(grad, v.T, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    channels = tl.arange(0, BLOCK_D)
    base = (batch * queries * num_heads + head) * HEAD_DIM
    offsets = base + rows[:, None] * (num_heads * HEAD_DIM) + channels[None, :]
    keep = (rows < queries)[:, None] & (channels < HEAD_DIM)[None, :]
    dq *= scale / LOG2_E
    tl.store(dq_ptr + offsets, dq.to(dq_ptr.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """Launch configuration: rows that a program keeps, rows of a step, warps, pipeline stages."""

    kept: int
    step: int
    num_warps: int
    num_stages: int

    @staticmethod
    def for_shape(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
        """A pure function of the head size, the dtype and the compute capability."""
        if dtype == torch.float32 or head_dim > 128:
            return Config(32, 32, 4, 1)
        if capability[1] != 0:  # 99 KB of shared memory
            return Config(64, 32, 4, 2)
        return Config(64, 64, 4, 2)


def provider_for(
    shape: tuple[int, int, int],  # Sq, Sk, D
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    fa4: bool = False,
    deterministic: bool = False,
) -> str:
    """The provider that "auto" stands for; `fa4`: whether that package is installed."""
    queries, keys, head_dim = shape
    half = dtype in (torch.bfloat16, torch.float16)
    if capability != (9, 0) or not half or head_dim > 128 or head_dim % 8:
        return "triton"
    if fa4 and head_dim in (64, 128) and min(queries, keys) >= SHORTEST_FA4:
        return "fa4_deterministic" if deterministic else "fa4"
    return "triton" if deterministic else "cudnn"


@torch.library.custom_op("gen3r::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,  # [B, Sq, H, D]
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, D]
    o: Tensor,  # [B, Sq, H, D]
    lse: Tensor,  # [B, H, Sq] float32, natural logarithm
    provider: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # contiguous, shapes and dtypes of q, k, v
    """Gradients of q, k and v.

    Raises
    ------
    ValueError : an unknown provider, or tensors that it does not take.
    """
    if provider not in PROVIDERS:
        raise ValueError(
            f"attention_backward: provider '{provider}' is unknown; known: {', '.join(PROVIDERS)}"
        )
    check_operands("attention_backward", q, k, v)
    if provider == "auto":
        provider = provider_for(
            (q.shape[1], k.shape[1], q.shape[-1]),
            q.dtype,
            capability_of(q),
            fa4=fa4_is_installed(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    grad = grad.to(q.dtype)
    if provider.startswith("fa4"):
        return backward_fa4(grad, q, k, v, o, lse, deterministic=provider == "fa4_deterministic")
    run = backward_cudnn if provider == "cudnn" else backward_triton
    return run(grad, q, k, v, o, lse)


@attention_backward.register_fake
def _fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    provider: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def backward_triton(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    keys_config: Config | None = None,
    queries_config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Our kernels; arguments as `attention_backward`'s."""
    grad, q, k, v, o = (with_dense_rows(x) for x in (grad, q, k, v, o))
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    default = Config.for_shape(head_dim, q.dtype, capability_of(q))
    keys_config, queries_config = keys_config or default, queries_config or default
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": block_of(head_dim)}
    delta = torch.empty_like(lse)
    _delta_kernel[(triton.cdiv(queries, 64) * heads * batch,)](
        o, grad, delta, *o.stride()[:3], *grad.stride()[:3], heads, queries, **sizes, BLOCK_M=64
    )
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    common = (
        *(stride for x in (q, k, v, grad) for stride in x.stride()[:3]),
        heads,
        queries,
        keys,
        head_dim**-0.5 * LOG2_E.value,
    )
    _keys_kernel[(triton.cdiv(keys, keys_config.kept) * heads * batch,)](
        q,
        k,
        v,
        grad,
        lse,
        delta,
        dk,
        dv,
        *common,
        **sizes,
        BLOCK_M=keys_config.step,
        BLOCK_N=keys_config.kept,
        num_warps=keys_config.num_warps,
        num_stages=keys_config.num_stages,
    )
    _queries_kernel[(triton.cdiv(queries, queries_config.kept) * heads * batch,)](
        q,
        k,
        v,
        grad,
        lse,
        delta,
        dq,
        *common,
        **sizes,
        BLOCK_M=queries_config.kept,
        BLOCK_N=queries_config.step,
        num_warps=queries_config.num_warps,
        num_stages=queries_config.num_stages,
    )
    return dq, dk, dv


def compile_cases() -> list[CompileCase]:
    """The kernels with every configuration they can have on compute capability 9.0."""
    cases = []
    for dtype, head_dim in COMPILED:
        config = Config.for_shape(head_dim, dtype, (9, 0))
        sizes = {"HEAD_DIM": head_dim, "BLOCK_D": block_of(head_dim)}
        keys = {**sizes, "BLOCK_M": config.step, "BLOCK_N": config.kept}
        queries = {**sizes, "BLOCK_M": config.kept, "BLOCK_N": config.step}
        launch = (config.num_warps, config.num_stages)
        name = f"{POINTER[dtype][1:]} {head_dim}"
        cases += [
            compile_case(f"delta {name}", _delta_kernel, dtype, {**sizes, "BLOCK_M": 64}, 4, 1),
            compile_case(f"keys {name}", _keys_kernel, dtype, keys, *launch),
            compile_case(f"queries {name}", _queries_kernel, dtype, queries, *launch),
        ]
    return cases
