# mypy: allow-untyped-defs, allow-incomplete-defs
# (Gluon kernels take pointers and tiles that no Python type describes.)
"""Attention forward for Hopper (compute capability 9.0), written in Gluon.

o = softmax(q k^T / sqrt(D)) v for q [B, Sq, H, D], k, v [B, Sk, H, D], D = 128; 4 B H Sq Sk D
operations, at the real size (B 2, S 31,850, H 12) 12.5 TFLOP: 16.7 ms at the 746 TFLOP/s that bf16
products reach on an H100. Scores may also be formed from 8-bit q and k (see `attention_8bit`).

A program computes 128 query rows: one warp fetches blocks of 128 keys and values with TMA, two
warpgroups of 240 registers a thread own 64 rows each. A warpgroup keeps two products in flight: the
scores of block i and the output of block i - 1; the softmax of block i runs behind the latter.

What makes it fast is what is not in the loop. Softmax does not depend on the number that is taken
off the scores, it only must keep exp2 within float32's range. So the row maximum of the first block
serves for all blocks: no maximum, no reduction among threads and no rescaling of the output. bf16
has float32's exponents, therefore nothing is lost while no score exceeds the first block's maximum
by more than 100 binary orders of magnitude. Rows for which that fails are flagged by their sum, and
a second launch computes the flagged tiles with the usual running maximum (arXiv 2205.14135); the
others return at once. float16 has too few exponents and always takes the running maximum.

Sources: the split into producer and consumers and the overlap of softmax and products follow
FlashAttention-3 (arXiv 2407.08608).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gen3r_kernels.dispatch import CompileCase
from gen3r_kernels.gluon_names import async_load

HEAD_DIM = 128
ROWS = 128  # query rows of a program
LOG2_E = 1.4426950408889634
# Sums beyond this are computed again with a running maximum. 2^100 leaves float32 27 binary orders
# for the values that multiply it.
LARGEST_SUM = gl.constexpr(2.0**100)


@gluon.jit
def _exp2(x):
    # ptxas wraps the exact form of exp2 into a test for denormals and two products
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _fetch(
    desc_q, desc_k, desc_v, q_smem, k_smem, v_smem, bars, batch, head, row, blocks,
    BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: q once, then blocks of k and v into STAGES buffers each."""
    q_full, k_full, k_free, v_full, v_free = bars
    for half in gl.static_range(2):
        mbarrier.expect(q_full.index(half), desc_q.block_type.nbytes)
        async_load(
            desc_q, [batch, row + half * 64, head, 0], q_full.index(half), q_smem.index(half)
        )
    for i in range(blocks):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), desc_k.block_type.nbytes)
        async_load(desc_k, [batch, i * BLOCK, head, 0], k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), desc_v.block_type.nbytes)
        async_load(desc_v, [batch, i * BLOCK, head, 0], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def _logits(s, c, BIT8: gl.constexpr):
    """Raw scores [64, BLOCK] times c (a row vector for 8-bit scores): exponents of 2."""
    return s.to(gl.float32) * (c[:, None] if BIT8 else c)


@gluon.jit
def _step(
    i, p, o, m, total, c, ks_next, q, k_smem, v_smem, bars, qs, ks_ptr, cols, keys, blocks,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, BIT8: gl.constexpr,
    ONLINE: gl.constexpr, DTYPE: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """Scores of block i and output of block i - 1 in flight together; softmax behind the second."""
    _, k_full, k_free, v_full, v_free = bars
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BLOCK, 32 if BIT8 else 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    zero = gl.zeros([64, BLOCK], q_accumulator(q.dtype), s_layout)
    stage = i % STAGES
    before = (i - 1) % STAGES
    if BIT8:
        c = qs * ks_next
        ks_next = gl.load(ks_ptr + gl.minimum(i + 1, blocks - 1))
    mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
    k = k_smem.index(stage).reshape([BLOCK, D]).permute([1, 0])
    s_token = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    v = v_smem.index(before).reshape([BLOCK, D])
    o_token = warpgroup_mma(p, v, o, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s_token])
    mbarrier.arrive(k_free.index(stage))
    if LAST:
        s = gl.where((cols < keys - i * BLOCK)[None, :], s.to(gl.float32), float("-inf"))
    if ONLINE:
        m_new = gl.maximum(m, gl.max(_logits(s, c, BIT8), 1))
        alpha = _exp2(m - m_new)
        m = m_new
        total = total * alpha
    p32 = _exp2(_logits(s, c, BIT8) - m[:, None])
    total = total + gl.sum(p32, 1)
    p_next = gl.convert_layout(p32.to(DTYPE), p_layout)
    # A wait is a branch: it keeps ptxas from moving the softmax behind the wait for the output.
    mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
    o, p_next = warpgroup_mma_wait(0, deps=[o_token, p_next])
    mbarrier.arrive(v_free.index(before))
    if ONLINE:
        o = o * gl.convert_layout(alpha, rows_o)[:, None]
    return p_next, o, m, total, ks_next


@gluon.constexpr_function
def q_accumulator(dtype: Any) -> Any:
    """The type in which the tensor cores sum products of `dtype`."""
    return gl.int32 if dtype == gl.int8 else gl.float32


@gluon.jit
def _attend(
    o_ptr, lse_ptr, flag_ptr, o_strides, qs_ptr, ks_ptr, q_smem, k_smem, v_smem, bars,
    batch, head, num_heads, row, length, blocks, keys, scale,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, BIT8: gl.constexpr,
    ONLINE: gl.constexpr, DTYPE: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 query rows against all keys."""
    q_full, k_full, k_free, v_full, _ = bars
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, BLOCK, 32 if BIT8 else 16]
    )
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows_o: gl.constexpr = gl.SliceLayout(1, o_layout)
    pair = batch * num_heads + head
    index = row + HALF * 64 + gl.arange(0, 64, layout=rows_s)
    q = q_smem.index(HALF).reshape([64, D])
    if BIT8:
        ks_ptr = ks_ptr + pair * blocks
        qs = gl.load(qs_ptr + pair * length + index, mask=index < length, other=1.0) * scale
        c = qs * gl.load(ks_ptr)
        ks_next = gl.load(ks_ptr + gl.minimum(1, blocks - 1))
    else:
        qs = scale
        c = scale
        ks_next = scale
    zero = gl.zeros([64, BLOCK], q_accumulator(q.dtype), s_layout)
    mbarrier.wait(q_full.index(HALF), 0)
    mbarrier.wait(k_full.index(0), 0)
    k = k_smem.index(0).reshape([BLOCK, D]).permute([1, 0])
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0))
    cols = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, s_layout))
    x = gl.where((cols < keys)[None, :], _logits(s, c, BIT8), float("-inf"))
    m = gl.max(x, 1)
    p32 = _exp2(x - m[:, None])
    total = gl.sum(p32, 1)
    p = gl.convert_layout(p32.to(DTYPE), p_layout)
    o = gl.zeros([64, D], gl.float32, o_layout)
    mbarrier.wait(v_full.index(0), 0)
    for i in range(1, blocks - 1):
        p, o, m, total, ks_next = _step(
            i, p, o, m, total, c, ks_next, q, k_smem, v_smem, bars, qs, ks_ptr, cols, keys, blocks,
            BLOCK, STAGES, D, BIT8, ONLINE, DTYPE, False,
        )  # fmt: skip
    if blocks > 1:
        p, o, m, total, ks_next = _step(
            blocks - 1, p, o, m, total, c, ks_next, q, k_smem, v_smem, bars, qs, ks_ptr, cols, keys,
            blocks, BLOCK, STAGES, D, BIT8, ONLINE, DTYPE, True,
        )  # fmt: skip
    v = v_smem.index((blocks - 1) % STAGES).reshape([BLOCK, D])
    o = warpgroup_mma(p, v, o, is_async=True)
    o = warpgroup_mma_wait(0, deps=[o])
    o = o * gl.convert_layout(1.0 / total, rows_o)[:, None]
    row_o = row + HALF * 64 + gl.arange(0, 64, layout=rows_o)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    base = o_ptr + batch.to(gl.int64) * o_strides[0] + head * o_strides[2]
    pointers = base + row_o.to(gl.int64)[:, None] * o_strides[1] + channel[None, :]
    gl.store(pointers, o.to(DTYPE), mask=(row_o < length)[:, None])
    lse = (m + gl.log2(total)) * 0.6931471805599453
    gl.store(lse_ptr + pair.to(gl.int64) * length + index, lse, mask=index < length)
    if not ONLINE:
        # written so that NaN counts as bad
        bad = 1 - gl.min(gl.where(index < length, total < LARGEST_SUM, True).to(gl.int32), 0)
        gl.store(flag_ptr + gl.program_id(0) * 2 + HALF, bad)


@gluon.jit
def _attention_kernel(
    desc_q, desc_k, desc_v, o_ptr, lse_ptr, flag_ptr, qs_ptr, ks_ptr, o_batch, o_row, o_head,
    num_heads, length, keys, scale,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, BIT8: gl.constexpr,
    ONLINE: gl.constexpr, ONLY_FLAGGED: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    program = gl.program_id(0)
    if ONLY_FLAGGED:
        flagged = gl.load(flag_ptr + program * 2) + gl.load(flag_ptr + program * 2 + 1)
        if flagged == 0:
            return
    tiles = gl.cdiv(length, 128)
    row = (program % tiles) * 128
    head = (program // tiles) % num_heads
    batch = program // tiles // num_heads
    blocks = gl.cdiv(keys, BLOCK)
    q_smem = gl.allocate_shared_memory(desc_q.dtype, [2, 1, 64, 1, D], desc_q.layout)
    k_smem = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, BLOCK, 1, D], desc_k.layout)
    v_smem = gl.allocate_shared_memory(desc_v.dtype, [STAGES, 1, BLOCK, 1, D], desc_v.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    bars = (q_full, k_full, k_free, v_full, v_free)
    o_strides = (o_batch, o_row, o_head)
    gl.warp_specialize(
        [
            (_attend, (
                o_ptr, lse_ptr, flag_ptr, o_strides, qs_ptr, ks_ptr, q_smem, k_smem, v_smem, bars,
                batch, head, num_heads, row, length, blocks, keys, scale,
                BLOCK, STAGES, D, BIT8, ONLINE, DTYPE, 0,
            )),
            (_attend, (
                o_ptr, lse_ptr, flag_ptr, o_strides, qs_ptr, ks_ptr, q_smem, k_smem, v_smem, bars,
                batch, head, num_heads, row, length, blocks, keys, scale,
                BLOCK, STAGES, D, BIT8, ONLINE, DTYPE, 1,
            )),
            (_fetch, (
                desc_q, desc_k, desc_v, q_smem, k_smem, v_smem, bars, batch, head, row, blocks,
                BLOCK, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@dataclass(frozen=True)
class HopperConfig:
    """Tile of the kernel: keys of a block, and buffers of k and v in shared memory (227 KB)."""

    block: int = 128
    stages: int = 2

    @classmethod
    def for_dtype(cls, qk_dtype: torch.dtype) -> HopperConfig:
        """Two buffers. 8-bit keys leave room for more, but three are 13 % slower (measured)."""
        return cls()


_GLUON = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def _layout(rows: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, rows, 1, HEAD_DIM], _GLUON[dtype])


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [1, rows, 1, HEAD_DIM], _layout(rows, x.dtype))


def _fetchable(x: Tensor) -> Tensor:
    """x itself where TMA can read it, else a contiguous copy."""
    bytes_apart = [stride * x.element_size() for stride in x.stride()[:3]]
    aligned = x.data_ptr() % 16 == 0 and all(b % 16 == 0 and b > 0 for b in bytes_apart)
    return x if aligned and x.stride(3) == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k.shape == v.shape
    if not fits or q.shape[3] != HEAD_DIM or 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"attention_hopper: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            f"expected [B, Sq, H, {HEAD_DIM}] and twice [B, Sk, H, {HEAD_DIM}]; other head sizes "
            "run on attention_triton"
        )
    if v.dtype not in (torch.bfloat16, torch.float16) or q.dtype != k.dtype:
        raise ValueError(
            f"attention_hopper: dtypes {q.dtype}, {k.dtype}, {v.dtype}; v must be bfloat16 or "
            "float16 and q and k the same or both 8-bit; use attention_triton for float32"
        )


def launch_hopper(
    q: Tensor,  # [B, Sq, H, 128] bfloat16, float16, int8 or float8_e4m3fn
    k: Tensor,  # [B, Sk, H, 128], dtype of q
    v: Tensor,  # [B, Sk, H, 128] bfloat16 or float16
    q_scale: Tensor | None = None,  # [B, H, Sq] float32, 8-bit q only
    k_scale: Tensor | None = None,  # [B, H, ceil(Sk / 128)] float32, 8-bit k only
) -> tuple[Tensor, Tensor]:  # [B, Sq, H, 128] dtype of v, [B, H, Sq] float32
    """Run the kernel; with scales the scores are q k^T * q_scale * k_scale / sqrt(128).

    Raises
    ------
    ValueError : shapes or dtypes outside what the kernel takes.
    """
    _check(q, k, v)
    bit8 = q.element_size() == 1
    config = HopperConfig.for_dtype(q.dtype)
    batch, length, heads, _ = q.shape
    keys = k.shape[1]
    if bit8 and (q_scale is None or k_scale is None):
        raise ValueError("attention_hopper: 8-bit q and k need q_scale and k_scale")
    if bit8 and k_scale is not None and k_scale.shape[2] != -(-keys // config.block):
        raise ValueError(
            f"attention_hopper: k_scale {tuple(k_scale.shape)} for {keys} keys; expected one scale "
            f"per {config.block} keys"
        )
    out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    programs = -(-length // ROWS) * heads * batch
    flags = torch.empty(2 * programs, dtype=torch.int32, device=q.device)
    descriptors = (
        _descriptor(_fetchable(q), ROWS // 2),
        _descriptor(_fetchable(k), config.block),
        _descriptor(_fetchable(v), config.block),
    )
    scales = (lse, lse) if q_scale is None else (q_scale.contiguous(), k_scale.contiguous())  # type: ignore[union-attr]
    numbers = (*out.stride()[:3], heads, length, keys, LOG2_E / math.sqrt(HEAD_DIM))

    def run(online: bool, only_flagged: bool) -> None:
        _attention_kernel[(programs,)](
            *descriptors,
            out,
            lse,
            flags,
            *scales,
            *numbers,
            BLOCK=config.block,
            STAGES=config.stages,
            D=HEAD_DIM,
            BIT8=bit8,
            ONLINE=online,
            ONLY_FLAGGED=only_flagged,
            DTYPE=_GLUON[v.dtype],
            num_warps=4,
        )

    if v.dtype == torch.float16:
        run(online=True, only_flagged=False)
    else:
        run(online=False, only_flagged=False)
        run(online=True, only_flagged=True)
    return out, lse


def attention_hopper(
    q: Tensor,  # [B, Sq, H, 128] bfloat16 or float16
    k: Tensor,  # [B, Sk, H, 128]
    v: Tensor,  # [B, Sk, H, 128]
) -> tuple[Tensor, Tensor]:  # [B, Sq, H, 128], [B, H, Sq] float32
    """Attention and the natural logarithm of the softmax's denominator; see the module.

    Raises
    ------
    ValueError : shapes or dtypes outside what the kernel takes.
    """
    return launch_hopper(q, k, v)


def compile_cases() -> list[CompileCase]:
    """Every form of the kernel that `launch_hopper` runs."""
    forms = [
        (torch.bfloat16, torch.bfloat16, False, False),
        (torch.bfloat16, torch.bfloat16, True, True),
        (torch.float16, torch.float16, True, False),
        (torch.int8, torch.bfloat16, False, False),
        (torch.int8, torch.bfloat16, True, True),
        (torch.float8_e4m3fn, torch.bfloat16, False, False),
        (torch.float8_e4m3fn, torch.bfloat16, True, True),
    ]
    names = {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.int8: "i8",
        torch.float8_e4m3fn: "fp8e4nv",
    }

    def described(dtype: torch.dtype, rows: int) -> str:
        shape = f"1, {rows}, 1, {HEAD_DIM}"
        return f"tensordesc<{names[dtype]}[{shape}],{_layout(rows, dtype)!r}>"

    cases = []
    for qk_dtype, dtype, online, only_flagged in forms:
        config = HopperConfig.for_dtype(qk_dtype)
        signature = {
            "desc_q": described(qk_dtype, ROWS // 2),
            "desc_k": described(qk_dtype, config.block),
            "desc_v": described(dtype, config.block),
            "o_ptr": f"*{names[dtype]}",
            **dict.fromkeys(("lse_ptr",), "*fp32"),
            "flag_ptr": "*i32",
            **dict.fromkeys(("qs_ptr", "ks_ptr"), "*fp32"),
            **dict.fromkeys(("o_batch", "o_row", "o_head", "num_heads", "length", "keys"), "i32"),
            "scale": "fp32",
        }
        constexprs = {
            "BLOCK": config.block,
            "STAGES": config.stages,
            "D": HEAD_DIM,
            "BIT8": qk_dtype.itemsize == 1,
            "ONLINE": online,
            "ONLY_FLAGGED": only_flagged,
            "DTYPE": _GLUON[dtype],
        }
        name = f"attention_hopper {names[qk_dtype]}{' online' if online else ''}"
        options = {"num_warps": 4}
        cases.append(
            CompileCase(name, _attention_kernel, signature, constexprs, options, gluon=True)
        )
    return cases
