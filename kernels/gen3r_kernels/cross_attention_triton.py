# mypy: allow-untyped-defs, allow-incomplete-defs
"""Text and image cross-attention in one Triton kernel; formula and cost in `cross_attention`.

A program holds a tile of queries and one accumulator. Image keys come first, with the online
softmax of `attention_triton`; the last of them stand alone (257 = 4 * 64 + 1) and take a block of
16, not of 64. The result is divided by its sum. Text probabilities must then be final before they
multiply the values, or they would need an accumulator of their own, which registers do not have:
up to 16 text keys are one block, whose softmax is exact at once; for more, a first pass over the
keys finds maximum and sum, and a second one rebuilds the scores and adds p v.

Measured on an H100 at [2, 31850, 12, 128]: 0.54 ms with 4 and 77 tokens, 1.15 ms with 512 text
keys, where two calls of PyTorch's attention take 0.84.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.attention_triton import (
    COMPILED,
    LOG2_E,
    POINTER,
    block_of,
    capability_of,
    check_operands,
    compile_case,
    load_rows,
    softmax_step,
    with_dense_rows,
)
from gen3r_kernels.carried import launch
from gen3r_kernels.dispatch import CompileCase

REFERENCE = "operators='reference'"


@triton.jit
def _text_scores(
    q,
    k_ptr,
    columns,
    used,
    bias,
    row,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores of text keys in log 2 units: the last of `used` keys stands for all padding."""
    k = load_rows(k_ptr, columns, used, row, HEAD_DIM, BLOCK_D, True)
    s = tl.dot(q, k.T, input_precision="ieee") * scale
    s += tl.where(columns == used - 1, bias, tl.where(columns < used, 0.0, float("-inf")))[None, :]
    return s


@triton.jit
def _add_few(
    o,
    q,
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    used,
    bias,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """o plus attention over text keys that fit one block."""
    columns = tl.arange(0, BLOCK)
    s = _text_scores(q, k_ptr, columns, used, bias, k_row, scale, HEAD_DIM, BLOCK_D)
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    p = p * (1.0 / tl.sum(p, 1))[:, None]
    v = load_rows(v_ptr, columns, used, v_row, HEAD_DIM, BLOCK_D, True)
    return tl.dot(p.to(v.dtype), v, o, input_precision="ieee")


@triton.jit
def _add_many(
    o,
    q,
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    used,
    bias,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """o plus attention over any number of text keys, in two passes."""
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, used, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _text_scores(q, k_ptr, columns, used, bias, k_row, scale, HEAD_DIM, BLOCK_D)
        top_next = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - top_next) + tl.sum(tl.exp2(s - top_next[:, None]), 1)
        top = top_next
    log_sum = top + tl.log2(total)
    for start in range(0, used, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        s = _text_scores(q, k_ptr, columns, used, bias, k_row, scale, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, columns, used, v_row, HEAD_DIM, BLOCK_D, True)
        p = tl.exp2(s - log_sum[:, None])
        o = tl.dot(p.to(v.dtype), v, o, input_precision="ieee")
    return o


@triton.jit
def _kernel(
    q_ptr,
    kt_ptr,
    vt_ptr,
    ki_ptr,
    vi_ptr,
    o_ptr,
    length_ptr,
    q_batch,
    q_row,
    q_head,
    kt_batch,
    kt_row,
    kt_head,
    vt_batch,
    vt_row,
    vt_head,
    ki_batch,
    ki_row,
    ki_head,
    vi_batch,
    vi_row,
    vi_head,
    num_heads,
    queries,
    text_keys,
    image_keys,
    scale,  # log2(e) / sqrt(D)
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TEXT: tl.constexpr,
    TAIL: tl.constexpr,  # block for the last image keys, 0 without
    HAS_LENGTHS: tl.constexpr,
    LEAVE: tl.constexpr,  # batch elements that read no more text keys are another kernel's
):
    tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    head = program // tiles % num_heads
    batch = (program // tiles // num_heads).to(tl.int64)
    used = text_keys
    bias = 0.0
    if HAS_LENGTHS:
        real = tl.minimum(tl.maximum(tl.load(length_ptr + batch), 0), text_keys)
        used = tl.minimum(real + 1, text_keys)
        bias = tl.log2(tl.maximum(text_keys - real, 1).to(tl.float32))
    if used <= LEAVE:
        return
    q_ptr += batch * q_batch + head * q_head
    kt_ptr += batch * kt_batch + head * kt_head
    vt_ptr += batch * vt_batch + head * vt_head
    ki_ptr += batch * ki_batch + head * ki_head
    vi_ptr += batch * vi_batch + head * vi_head
    rows = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, rows, queries, q_row, HEAD_DIM, BLOCK_D, True)

    o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = image_keys // BLOCK_N * BLOCK_N
    columns = tl.arange(0, BLOCK_N)
    for start in range(0, whole, BLOCK_N):
        k = load_rows(ki_ptr, start + columns, image_keys, ki_row, HEAD_DIM, BLOCK_D, False)
        s = tl.dot(q, k.T, input_precision="ieee") * scale
        v = load_rows(vi_ptr, start + columns, image_keys, vi_row, HEAD_DIM, BLOCK_D, False)
        o, top, total = softmax_step(o, top, total, s, v)
    if TAIL > 0:
        last = whole + tl.arange(0, TAIL)
        k = load_rows(ki_ptr, last, image_keys, ki_row, HEAD_DIM, BLOCK_D, True)
        s = tl.dot(q, k.T, input_precision="ieee") * scale
        s = tl.where((last < image_keys)[None, :], s, float("-inf"))
        v = load_rows(vi_ptr, last, image_keys, vi_row, HEAD_DIM, BLOCK_D, True)
        o, top, total = softmax_step(o, top, total, s, v)
    o = o * (1.0 / total)[:, None]

    if used <= 16:
        o = _add_few(o, q, kt_ptr, vt_ptr, kt_row, vt_row, used, bias, scale, HEAD_DIM, BLOCK_D, 16)
    else:
        o = _add_many(
            o,
            q,
            kt_ptr,
            vt_ptr,
            kt_row,
            vt_row,
            used,
            bias,
            scale,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_M,
            BLOCK_TEXT,
        )

    channels = tl.arange(0, BLOCK_D)
    o_ptr += (batch * queries * num_heads + head) * HEAD_DIM
    pointers = o_ptr + rows[:, None] * (num_heads * HEAD_DIM) + channels[None, :]
    keep = (rows < queries)[:, None] & (channels < HEAD_DIM)[None, :]
    tl.store(pointers, o.to(o_ptr.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """Launch configuration."""

    block_m: int
    block_n: int
    block_text: int
    num_warps: int
    num_stages: int

    @staticmethod
    def for_shape(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Config:
        """A pure function of the head size, the dtype and the compute capability."""
        if dtype == torch.float32 or head_dim > 128:
            return Config(32, 32, 32, 4, 1)
        if capability[0] == 9:
            return Config(128, 64, 64, 4, 2)
        return Config(64, 64, 32, 4, 2)


def check_cross_operands(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    text_lengths: Tensor | None,
) -> None:
    """Raise ValueError unless the tensors suit the kernels."""
    check_operands("cross_attention (text)", q, k_text, v_text, REFERENCE)
    check_operands("cross_attention (image)", q, k_image, v_image, REFERENCE)
    if text_lengths is not None and (
        text_lengths.shape != q.shape[:1]
        or text_lengths.dtype != torch.int32
        or text_lengths.device != q.device
    ):
        raise ValueError(
            f"cross_attention: text_lengths {tuple(text_lengths.shape)} {text_lengths.dtype} on "
            f"{text_lengths.device} does not fit; expected [{q.shape[0]}] int32 on {q.device}"
        )


def cross_attention_portable(
    q: Tensor,  # [B, S, H, D]
    k_text: Tensor,  # [B, Lt, H, D]
    v_text: Tensor,  # [B, Lt, H, D]
    k_image: Tensor,  # [B, Li, H, D]
    v_image: Tensor,  # [B, Li, H, D]
    text_lengths: Tensor | None,  # [B] int32 on q's device
    config: Config | None = None,
    o: Tensor | None = None,  # [B, S, H, D] contiguous
    leave: int = 0,
) -> Tensor:  # [B, S, H, D]
    """Launch the kernel.

    Parameters
    ----------
    o, leave : write into o, and there leave the batch elements that read at most so many text keys.

    Raises
    ------
    ValueError : shapes, dtypes or devices that the kernel does not take.
    """
    check_cross_operands(q, k_text, v_text, k_image, v_image, text_lengths)
    q, *keys = (with_dense_rows(x) for x in (q, k_text, v_text, k_image, v_image))
    batch, queries, heads, head_dim = q.shape
    config = config or Config.for_shape(head_dim, q.dtype, capability_of(q))
    if o is None:
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    launch(_kernel)[(triton.cdiv(queries, config.block_m) * heads * batch,)](
        q,
        *keys,
        o,
        text_lengths,
        *q.stride()[:3],
        *(stride for x in keys for stride in x.stride()[:3]),
        heads,
        queries,
        k_text.shape[1],
        k_image.shape[1],
        head_dim**-0.5 * LOG2_E.value,
        HEAD_DIM=head_dim,
        BLOCK_D=block_of(head_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_TEXT=config.block_text,
        TAIL=_tail(k_image.shape[1], config.block_n),
        HAS_LENGTHS=text_lengths is not None,
        LEAVE=leave,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return o


def _tail(image_keys: int, block_n: int) -> int:
    """Block for the image keys past the last whole block; 0 without."""
    rest = image_keys % block_n
    return block_of(rest) if rest else 0


def compile_cases() -> list[CompileCase]:
    """The kernel with every configuration it can have on compute capability 9.0."""
    cases = []
    for dtype, head_dim in COMPILED:
        for lengths, leave in ((True, 0), (False, 0), (True, 80)):
            config = Config.for_shape(head_dim, dtype, (9, 0))
            sizes = {
                "HEAD_DIM": head_dim,
                "BLOCK_D": block_of(head_dim),
                "BLOCK_M": config.block_m,
                "BLOCK_N": config.block_n,
                "BLOCK_TEXT": config.block_text,
                "TAIL": _tail(257, config.block_n),
                "HAS_LENGTHS": lengths,
                "LEAVE": leave,
            }
            kind = f"lengths above {leave}" if lengths else "all"
            name = f"{POINTER[dtype][1:]} {head_dim} {kind}"
            cases.append(
                compile_case(name, _kernel, dtype, sizes, config.num_warps, config.num_stages)
            )
    return cases
