# mypy: allow-untyped-defs, allow-incomplete-defs
# (Gluon kernels take pointers and tiles that no Python type describes.)
"""The Gluon kernel of attention on Hopper; what it computes and why so: `attention_hopper`."""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gen3r_kernels.gluon_names import async_load

# Sums beyond this are computed again with a running maximum. 2^100 leaves float32 27 binary orders
# for the values that multiply it.
LARGEST_SUM = gl.constexpr(2.0**100)


@gluon.jit
def fast_exp2(x):
    # ptxas wraps the exact form of exp2 into a test for denormals and two products
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _fetch(
    desc_q, desc_k, desc_v, q_smem, k_smem, v_smem, bars, batch, head, row, blocks,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """The producer: q once, then blocks of k and v into STAGES buffers each."""
    q_full, k_full, k_free, v_full, v_free = bars
    for group in gl.static_range(GROUPS):
        mbarrier.expect(q_full.index(group), desc_q.block_type.nbytes)
        async_load(
            desc_q, [batch, row + group * 64, head, 0], q_full.index(group), q_smem.index(group)
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
        alpha = fast_exp2(m - m_new)
        m = m_new
        total = total * alpha
    p32 = fast_exp2(_logits(s, c, BIT8) - m[:, None])
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
    ONLINE: gl.constexpr, DTYPE: gl.constexpr, GROUPS: gl.constexpr, GROUP: gl.constexpr,
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
    index = row + GROUP * 64 + gl.arange(0, 64, layout=rows_s)
    q = q_smem.index(GROUP).reshape([64, D])
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
    mbarrier.wait(q_full.index(GROUP), 0)
    mbarrier.wait(k_full.index(0), 0)
    k = k_smem.index(0).reshape([BLOCK, D]).permute([1, 0])
    s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_free.index(0))
    cols = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, s_layout))
    x = gl.where((cols < keys)[None, :], _logits(s, c, BIT8), float("-inf"))
    m = gl.max(x, 1)
    p32 = fast_exp2(x - m[:, None])
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
    row_o = row + GROUP * 64 + gl.arange(0, 64, layout=rows_o)
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    base = o_ptr + batch.to(gl.int64) * o_strides[0] + head * o_strides[2]
    pointers = base + row_o.to(gl.int64)[:, None] * o_strides[1] + channel[None, :]
    gl.store(pointers, o.to(DTYPE), mask=(row_o < length)[:, None])
    lse = (m + gl.log2(total)) * 0.6931471805599453
    gl.store(lse_ptr + pair.to(gl.int64) * length + index, lse, mask=index < length)
    if not ONLINE:
        # written so that NaN counts as bad
        bad = 1 - gl.min(gl.where(index < length, total < LARGEST_SUM, True).to(gl.int32), 0)
        gl.store(flag_ptr + gl.program_id(0) * GROUPS + GROUP, bad)


@gluon.jit
def attention_kernel(
    desc_q, desc_k, desc_v, o_ptr, lse_ptr, flag_ptr, qs_ptr, ks_ptr, o_batch, o_row, o_head,
    num_heads, length, keys, scale,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr,
    BIT8: gl.constexpr, ONLINE: gl.constexpr, ONLY_FLAGGED: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    program = gl.program_id(0)
    if ONLY_FLAGGED:
        flagged = gl.load(flag_ptr + program * GROUPS)
        for i in gl.static_range(1, GROUPS):
            flagged += gl.load(flag_ptr + program * GROUPS + i)
        if flagged == 0:
            return
    tiles = gl.cdiv(length, GROUPS * 64)
    row = (program % tiles) * (GROUPS * 64)
    head = (program // tiles) % num_heads
    batch = program // tiles // num_heads
    blocks = gl.cdiv(keys, BLOCK)
    q_smem = gl.allocate_shared_memory(desc_q.dtype, [GROUPS, 1, 64, 1, D], desc_q.layout)
    k_smem = gl.allocate_shared_memory(desc_k.dtype, [STAGES, 1, BLOCK, 1, D], desc_k.layout)
    v_smem = gl.allocate_shared_memory(desc_v.dtype, [STAGES, 1, BLOCK, 1, D], desc_v.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)
    bars = (q_full, k_full, k_free, v_full, v_free)
    o_strides = (o_batch, o_row, o_head)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_attend, (
                    o_ptr, lse_ptr, flag_ptr, o_strides, qs_ptr, ks_ptr, q_smem, k_smem, v_smem,
                    bars, batch, head, num_heads, row, length, blocks, keys, scale,
                    BLOCK, STAGES, D, BIT8, ONLINE, DTYPE, GROUPS, 0,
                )),
                (_attend, (
                    o_ptr, lse_ptr, flag_ptr, o_strides, qs_ptr, ks_ptr, q_smem, k_smem, v_smem,
                    bars, batch, head, num_heads, row, length, blocks, keys, scale,
                    BLOCK, STAGES, D, BIT8, ONLINE, DTYPE, GROUPS, 1,
                )),
                (_fetch, (
                    desc_q, desc_k, desc_v, q_smem, k_smem, v_smem, bars, batch, head, row,
                    blocks, BLOCK, STAGES, GROUPS,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_attend, (
                    o_ptr, lse_ptr, flag_ptr, o_strides, qs_ptr, ks_ptr, q_smem, k_smem, v_smem,
                    bars, batch, head, num_heads, row, length, blocks, keys, scale,
                    BLOCK, STAGES, D, BIT8, ONLINE, DTYPE, GROUPS, 0,
                )),
                (_attend, (
                    o_ptr, lse_ptr, flag_ptr, o_strides, qs_ptr, ks_ptr, q_smem, k_smem, v_smem,
                    bars, batch, head, num_heads, row, length, blocks, keys, scale,
                    BLOCK, STAGES, D, BIT8, ONLINE, DTYPE, GROUPS, 1,
                )),
                (_attend, (
                    o_ptr, lse_ptr, flag_ptr, o_strides, qs_ptr, ks_ptr, q_smem, k_smem, v_smem,
                    bars, batch, head, num_heads, row, length, blocks, keys, scale,
                    BLOCK, STAGES, D, BIT8, ONLINE, DTYPE, GROUPS, 2,
                )),
                (_fetch, (
                    desc_q, desc_k, desc_v, q_smem, k_smem, v_smem, bars, batch, head, row,
                    blocks, BLOCK, STAGES, GROUPS,
                )),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip
