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

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gen3r_kernels.attention_hopper_kernel import attention_kernel
from gen3r_kernels.attention_triton import LOG2_E
from gen3r_kernels.dispatch import CompileCase

HEAD_DIM = 128
ROWS = 128  # query rows of a program


@dataclass(frozen=True)
class HopperConfig:
    """Tile of the kernel: keys of a block, and buffers of k and v in shared memory (227 KB).

    8-bit keys leave room for three buffers, which made whole calls no faster (docs/measured.md).
    """

    block: int = 128
    stages: int = 2


_GLUON = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def tile_layout(rows: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, rows, 1, HEAD_DIM], _GLUON[dtype])


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [1, rows, 1, HEAD_DIM], tile_layout(rows, x.dtype))


def fetchable(x: Tensor) -> Tensor:
    """x itself where TMA can read it (16-byte addresses and strides), else a contiguous copy."""
    bytes_apart = [stride * x.element_size() for stride in x.stride()[:3]]
    aligned = x.data_ptr() % 16 == 0 and all(b % 16 == 0 and b > 0 for b in bytes_apart)
    if aligned and x.stride(3) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


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
    config = HopperConfig()
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
        _descriptor(fetchable(q), ROWS // 2),
        _descriptor(fetchable(k), config.block),
        _descriptor(fetchable(v), config.block),
    )
    scales = (lse, lse) if q_scale is None else (q_scale.contiguous(), k_scale.contiguous())  # type: ignore[union-attr]
    numbers = (*out.stride()[:3], heads, length, keys, LOG2_E.value / math.sqrt(HEAD_DIM))

    def run(online: bool, only_flagged: bool) -> None:
        attention_kernel[(programs,)](
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
        return f"tensordesc<{names[dtype]}[{shape}],{tile_layout(rows, dtype)!r}>"

    cases = []
    for qk_dtype, dtype, online, only_flagged in forms:
        config = HopperConfig()
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
            CompileCase(name, attention_kernel, signature, constexprs, options, gluon=True)
        )
    return cases
