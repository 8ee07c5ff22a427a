# mypy: allow-untyped-defs, allow-incomplete-defs
"""Text and image cross-attention on Hopper, in Gluon: keys and values stay in shared memory.

257 image keys and up to 80 text keys (prompts of 79 tokens) with their values are 176 KB: they fit
the shared memory of a multiprocessor beside two tiles of queries. The grid is one block per
multiprocessor. Each takes a run of query tiles, so that it loads the keys of one head, seldom of
two, and then only moves q and o. One warp fetches queries by TMA; two warp groups each work on a
tile of 64 rows: all scores of the tile at once (at most 352 columns, in registers), both softmaxes
exactly, and one chain of products with the values into one accumulator, for which the text's
probabilities are multiplied by the ratio of both sums. The queries' buffer is free as soon as the
scores are there, so that the next tile comes in meanwhile.

Takes head size 128, bf16 or fp16, 257 to 272 image keys. Longer prompts are left to
`cross_attention_triton`. Measured on an H100 at [2, 31850, 12, 128] with 4 and 77 tokens: 0.338 ms
(0.304 with 4 and 4), where q and o alone need 0.14 and two calls of FlashAttention-3 take 0.76.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gen3r_kernels.attention_hopper import fetchable, tile_layout
from gen3r_kernels.attention_hopper_kernel import fast_exp2
from gen3r_kernels.attention_triton import LOG2_E
from gen3r_kernels.dispatch import CompileCase
from gen3r_kernels.gluon_names import async_load, barrier

ROWS = gl.constexpr(64)  # queries a warp group works on
FEW = gl.constexpr(16)
MOST = gl.constexpr(80)  # text keys that fit in shared memory


@gluon.jit
def _used(length_ptr, batch, text_keys):
    """Text keys to read, and the bias of the last one, in log 2 units."""
    real = gl.minimum(gl.maximum(gl.load(length_ptr + batch), 0), text_keys)
    used = gl.minimum(real + 1, text_keys)
    return used, gl.log2(gl.maximum(text_keys - real, 1).to(gl.float32))


@gluon.jit
def _produce(desc_q, descs, buffers, bars, length_ptr, work, num_heads, text_keys):
    """One warp: keys and values of each head of the run, then its query tiles, group by group."""
    image_k, image_v, tail_k, tail_v, text_k, text_v, few_k, few_v = descs
    q_smem, ik, iv, nk, nv, tk, tv, fk, fv = buffers
    q_full, q_free, kv_full, kv_free = bars
    start, end, first, last, tiles = work
    turn_0 = 0
    turn_1 = 0
    for pair in range(first, last + 1):
        batch = pair // num_heads
        head = pair % num_heads
        used, _ = _used(length_ptr, batch, text_keys)
        mbarrier.wait(kv_free, ((pair - first) & 1) ^ 1)
        if used <= MOST:
            nbytes: gl.constexpr = 2 * (
                2 * image_k.block_type.nbytes
                + tail_k.block_type.nbytes
                + text_k.block_type.nbytes
                + few_k.block_type.nbytes
            )
            mbarrier.expect(kv_full, nbytes)
            few = gl.where(used <= FEW, 0, 64)
            for i in gl.static_range(2):
                async_load(image_k, [batch, i * 128, head, 0], kv_full, ik.index(i))
            async_load(tail_k, [batch, 256, head, 0], kv_full, nk)
            async_load(text_k, [batch, 0, head, 0], kv_full, tk)
            async_load(few_k, [batch, few, head, 0], kv_full, fk)
            for i in gl.static_range(2):
                async_load(image_v, [batch, i * 128, head, 0], kv_full, iv.index(i))
            async_load(tail_v, [batch, 256, head, 0], kv_full, nv)
            async_load(text_v, [batch, 0, head, 0], kv_full, tv)
            async_load(few_v, [batch, few, head, 0], kv_full, fv)
            low = gl.maximum(start, pair * tiles)
            high = gl.minimum(end, (pair + 1) * tiles)
            for tile in range(low, high):
                group = (tile - low) & 1
                turn = gl.where(group == 0, turn_0, turn_1)
                mbarrier.wait(q_free.index(group), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(group), desc_q.block_type.nbytes)
                row = (tile - pair * tiles) * ROWS
                async_load(desc_q, [batch, row, head, 0], q_full.index(group), q_smem.index(group))
                turn_0 += 1 - group
                turn_1 += group
        else:
            mbarrier.arrive(kv_full)


@gluon.jit
def _row_max(s, rows: gl.constexpr):
    return gl.convert_layout(gl.max(s, 1), rows)


@gluon.jit
def _row_sum(p, rows: gl.constexpr):
    return gl.convert_layout(gl.sum(p, 1), rows)


@gluon.jit
def _probabilities(s, top):
    """exp2(s - top), top per row in the layout of rows of the accumulator."""
    layout: gl.constexpr = s.type.layout
    return fast_exp2(s - gl.convert_layout(top, gl.SliceLayout(1, layout))[:, None])


@gluon.jit
def _operand(p, DTYPE: gl.constexpr, layout: gl.constexpr):
    return gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, layout, 2))


@gluon.jit
def _scores(q, k, N: gl.constexpr):
    """Products of 64 queries with N keys, under way."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    zero = gl.zeros([64, N], gl.float32, layout)
    keys = k.reshape([N, 128]).permute([1, 0])
    return warpgroup_mma(q, keys, zero, use_acc=False, is_async=True)


@gluon.jit
def _masked(s, scale, used, bias, offset, N: gl.constexpr):
    """Scaled scores of N keys from `offset` on; the last of `used` has the bias, others none."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    column = offset + gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    shift = gl.where(column == used - 1, bias, gl.where(column < used, 0.0, float("-inf")))
    return s * scale + shift[None, :]


@gluon.jit
def _tile(
    base,
    o_row,
    row,
    queries,
    buffers,
    bars,
    turn,
    used,
    bias,
    image_keys,
    scale,
    LONG: gl.constexpr,
    GROUP: gl.constexpr,
):
    """64 queries against up to 16 or (LONG) 80 text keys and the image's."""
    q_smem, ik, iv, nk, nv, tk, tv, fk, fv = buffers
    q_full, q_free, _, _ = bars
    DTYPE: gl.constexpr = q_smem.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    q = q_smem.index(GROUP).reshape([64, 128])
    mbarrier.wait(q_full.index(GROUP), turn & 1)
    few = _scores(q, fk, 16)
    tail = _scores(q, nk, 16)
    s_0 = _scores(q, ik.index(0), 128)
    s_1 = _scores(q, ik.index(1), 128)
    if LONG:
        text = _scores(q, tk, 64)
        few, tail, s_0, s_1, text = warpgroup_mma_wait(0, deps=[few, tail, s_0, s_1, text])
    else:
        few, tail, s_0, s_1 = warpgroup_mma_wait(0, deps=[few, tail, s_0, s_1])
    barrier()
    mbarrier.arrive(q_free.index(GROUP))

    tail = _masked(tail, scale, image_keys - 256, 0.0, 0, 16)
    s_0 = s_0 * scale
    s_1 = s_1 * scale
    top = gl.maximum(gl.max(s_0, 1), gl.max(s_1, 1))
    top = gl.maximum(top, _row_max(tail, rows))
    p_0 = _probabilities(s_0, top)
    p_1 = _probabilities(s_1, top)
    p_tail = _probabilities(tail, top)
    total = gl.sum(p_0, 1) + gl.sum(p_1, 1) + _row_sum(p_tail, rows)

    # The text's share is multiplied by the image's sum, by which everything is divided in the end.
    if LONG:
        few = _masked(few, scale, used, bias, 64, 16)
        text = _masked(text, scale, used, bias, 0, 64)
        top = gl.maximum(_row_max(few, rows), _row_max(text, rows))
        p_few = _probabilities(few, top)
        p_text = _probabilities(text, top)
        ratio = total / (_row_sum(p_few, rows) + _row_sum(p_text, rows))
        text_layout: gl.constexpr = p_text.type.layout
        p_text = p_text * gl.convert_layout(ratio, gl.SliceLayout(1, text_layout))[:, None]
    else:
        few = _masked(few, scale, used, bias, 0, 16)
        p_few = _probabilities(few, _row_max(few, rows))
        ratio = total / _row_sum(p_few, rows)
    few_layout: gl.constexpr = p_few.type.layout
    p_few = p_few * gl.convert_layout(ratio, gl.SliceLayout(1, few_layout))[:, None]

    o = gl.zeros([64, 128], gl.float32, layout)
    v_0 = iv.index(0).reshape([128, 128])
    v_1 = iv.index(1).reshape([128, 128])
    p_0 = _operand(p_0, DTYPE, layout)
    o = warpgroup_mma(p_0, v_0, o, use_acc=False, is_async=True)
    o = warpgroup_mma(_operand(p_1, DTYPE, layout), v_1, o, is_async=True)
    o = warpgroup_mma(_operand(p_tail, DTYPE, layout), nv.reshape([16, 128]), o, is_async=True)
    o = warpgroup_mma(_operand(p_few, DTYPE, layout), fv.reshape([16, 128]), o, is_async=True)
    if LONG:
        o = warpgroup_mma(_operand(p_text, DTYPE, layout), tv.reshape([64, 128]), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=[o])
    o = o * (1.0 / total)[:, None]

    # Eight channels a thread: stores of 16 bytes, where the products' own layout gives 4.
    store: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
    o = gl.convert_layout(o.to(DTYPE), store)
    index = row + gl.arange(0, 64, layout=gl.SliceLayout(1, store))
    channel = gl.arange(0, 128, layout=gl.SliceLayout(0, store))
    gl.store(base + index[:, None] * o_row + channel[None, :], o, mask=(index < queries)[:, None])


@gluon.jit
def _consume(o_ptr, length_ptr, buffers, bars, work, sizes, scale, GROUP: gl.constexpr):
    """A warp group: every second tile of the run."""
    num_heads, queries, text_keys, image_keys = sizes
    _, _, kv_full, kv_free = bars
    start, end, first, last, tiles = work
    o_row = num_heads * 128
    turn = 0
    for pair in range(first, last + 1):
        batch = pair // num_heads
        head = pair % num_heads
        used, bias = _used(length_ptr, batch, text_keys)
        base = o_ptr + batch.to(gl.int64) * queries * o_row + head * 128
        low = gl.maximum(start, pair * tiles)
        high = gl.minimum(end, (pair + 1) * tiles)
        mbarrier.wait(kv_full, (pair - first) & 1)
        if used <= FEW:
            for tile in range(low + GROUP, high, 2):
                row = (tile - pair * tiles) * ROWS
                _tile(
                    base,
                    o_row,
                    row,
                    queries,
                    buffers,
                    bars,
                    turn,
                    used,
                    bias,
                    image_keys,
                    scale,
                    False,
                    GROUP,
                )
                turn += 1
        elif used <= MOST:
            for tile in range(low + GROUP, high, 2):
                row = (tile - pair * tiles) * ROWS
                _tile(
                    base,
                    o_row,
                    row,
                    queries,
                    buffers,
                    bars,
                    turn,
                    used,
                    bias,
                    image_keys,
                    scale,
                    True,
                    GROUP,
                )
                turn += 1
        barrier()
        mbarrier.arrive(kv_free)


@gluon.jit
def _kernel(
    desc_q,
    image_k,
    image_v,
    tail_k,
    tail_v,
    text_k,
    text_v,
    few_k,
    few_v,
    o_ptr,
    length_ptr,
    pairs,  # batch elements times heads
    num_heads,
    queries,
    text_keys,
    image_keys,
    scale,  # log2(e) / sqrt(D)
):
    dtype: gl.constexpr = desc_q.dtype
    swizzled: gl.constexpr = desc_q.layout
    tiles = gl.cdiv(queries, ROWS)
    count = tiles * pairs
    start = (gl.program_id(0).to(gl.int64) * count // gl.num_programs(0)).to(gl.int32)
    end = ((gl.program_id(0) + 1).to(gl.int64) * count // gl.num_programs(0)).to(gl.int32)
    work = (start, end, start // tiles, (end - 1) // tiles, tiles)
    q_smem = gl.allocate_shared_memory(dtype, [2, 1, 64, 1, 128], swizzled)
    ik = gl.allocate_shared_memory(dtype, [2, 1, 128, 1, 128], swizzled)
    iv = gl.allocate_shared_memory(dtype, [2, 1, 128, 1, 128], swizzled)
    nk = gl.allocate_shared_memory(dtype, [1, 16, 1, 128], swizzled)
    nv = gl.allocate_shared_memory(dtype, [1, 16, 1, 128], swizzled)
    tk = gl.allocate_shared_memory(dtype, [1, 64, 1, 128], swizzled)
    tv = gl.allocate_shared_memory(dtype, [1, 64, 1, 128], swizzled)
    fk = gl.allocate_shared_memory(dtype, [1, 16, 1, 128], swizzled)
    fv = gl.allocate_shared_memory(dtype, [1, 16, 1, 128], swizzled)
    buffers = (q_smem, ik, iv, nk, nv, tk, tv, fk, fv)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    kv_free = gl.allocate_shared_memory(gl.int64, [1], bar)
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_free, count=2)
    fence_async_shared()
    bars = (q_full, q_free, kv_full, kv_free)
    descs = (image_k, image_v, tail_k, tail_v, text_k, text_v, few_k, few_v)
    sizes = (num_heads, queries, text_keys, image_keys)
    gl.warp_specialize(
        [
            (_consume, (o_ptr, length_ptr, buffers, bars, work, sizes, scale, 0)),
            (_consume, (o_ptr, length_ptr, buffers, bars, work, sizes, scale, 1)),
            (_produce, (desc_q, descs, buffers, bars, length_ptr, work, num_heads, text_keys)),
        ],
        [4, 1],
        [240, 24],
    )


GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
# Rows of the descriptors' boxes, in the order of the kernel's arguments.
BOXES = {
    "desc_q": 64,
    "image_k": 128,
    "image_v": 128,
    "tail_k": 16,
    "tail_v": 16,
    "text_k": 64,
    "text_v": 64,
    "few_k": 16,
    "few_v": 16,
}


def cross_attention_hopper(
    q: Tensor,  # [B, S, H, 128]
    k_text: Tensor,  # [B, Lt, H, 128]
    v_text: Tensor,  # [B, Lt, H, 128]
    k_image: Tensor,  # [B, Li, H, 128]
    v_image: Tensor,  # [B, Li, H, 128]
    text_lengths: Tensor,  # [B] int32
    o: Tensor,  # [B, S, H, 128] contiguous
) -> None:
    """Write o for the batch elements that read at most 80 text keys, and leave the others."""
    batch, queries, heads, _ = q.shape
    q, kt, vt, ki, vi = (fetchable(x) for x in (q, k_text, v_text, k_image, v_image))
    boxes = zip((q, ki, vi, ki, vi, kt, vt, kt, vt), BOXES.values(), strict=True)
    descriptors = [
        TensorDescriptor.from_tensor(x, [1, rows, 1, 128], tile_layout(rows, x.dtype))
        for x, rows in boxes
    ]
    blocks = torch.cuda.get_device_properties(q.device).multi_processor_count
    _kernel[(blocks,)](
        *descriptors,
        o,
        text_lengths,
        batch * heads,
        heads,
        queries,
        k_text.shape[1],
        k_image.shape[1],
        128**-0.5 * LOG2_E.value,
        num_warps=4,
    )


def compile_cases() -> list[CompileCase]:
    """The kernel in both dtypes."""
    cases = []
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        counts = ("pairs", "num_heads", "queries", "text_keys", "image_keys")
        signature = {
            **{
                n: f"tensordesc<{name}[1, {rows}, 1, 128],{tile_layout(rows, dtype)!r}>"
                for n, rows in BOXES.items()
            },
            "o_ptr": f"*{name}",
            "length_ptr": "*i32",
            **{n: "i32" for n in counts},
            "scale": "fp32",
        }
        case = CompileCase(name, _kernel, signature, {}, {"num_warps": 4}, ("o_ptr",), gluon=True)
        cases.append(case)
    return cases
