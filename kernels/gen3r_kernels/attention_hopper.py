"""Attention forward for Hopper (compute capability 9.0), written in Gluon.

o = softmax(q k^T / sqrt(D)) v for q [B, Sq, H, D], k, v [B, Sk, H, D], D = 128 or 64; 4 B H Sq Sk D
operations, at the real size (B 2, S 31,850, H 12, D 128) 12.5 TFLOP: 16.7 ms at the 746 TFLOP/s
that bf16 products reach on an H100. Scores may also be formed from 8-bit q and k (see
`attention_8bit`).

A program computes 128 query rows: one warp fetches blocks of 128 keys and values with TMA, two
warpgroups of 240 registers a thread own 64 rows each. A warpgroup keeps two products in flight: the
scores of block i and the output of block i - 1; the softmax of block i runs behind the latter.

At D = 64 (VGGT: [1, 78645, 16, 64], 25.3 TFLOP) the output takes half the registers, and three
warpgroups of 160 share a block: 590 TFLOP/s against 547 with two (FlashAttention-3 538, cuDNN 431).
There the exponentials, of which a multiprocessor computes 16 a cycle, take as long as the products:
both bounds are 27 to 32 ms, 43 are seen. A quarter of the exponentials as polynomials on the
multiply-add units, which relieves the former, costs more instructions than it saves time (530).

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

HEAD_DIM = 128  # the only head size of 8-bit scores
HEAD_DIMS = (64, 128)
GROUP_ROWS = 64  # query rows of a warpgroup
SHORT = 4096  # keys


@dataclass(frozen=True)
class HopperConfig:
    """Tile of the kernel.

    block, stages : keys of a block, and buffers of k and v in shared memory (227 KB). 8-bit keys
        leave room for three buffers, which made whole calls no faster (docs/measured.md).
    groups : warpgroups that multiply, 64 query rows each.
    """

    block: int = 128
    stages: int = 2
    groups: int = 2

    @classmethod
    def for_shape(cls, head_dim: int, keys: int) -> HopperConfig:
        """The fastest on an H100. Short sequences fill blocks of 64 better."""
        if head_dim == 64:
            return cls(64 if keys < SHORT else 128, 4, 3)
        return cls()

    @property
    def rows(self) -> int:
        """Query rows of a program."""
        return GROUP_ROWS * self.groups


_GLUON = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def tile_layout(rows: int, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, rows, 1, head_dim], _GLUON[dtype])


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    head_dim = x.shape[3]
    layout = tile_layout(rows, x.dtype, head_dim)
    return TensorDescriptor.from_tensor(x, [1, rows, 1, head_dim], layout)


def fetchable(x: Tensor) -> Tensor:
    """x itself where TMA can read it (16-byte addresses and strides), else a contiguous copy."""
    bytes_apart = [stride * x.element_size() for stride in x.stride()[:3]]
    aligned = x.data_ptr() % 16 == 0 and all(b % 16 == 0 and b > 0 for b in bytes_apart)
    if aligned and x.stride(3) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and k.shape == v.shape
    if not fits or q.shape[3] not in HEAD_DIMS or 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"attention_hopper: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected [B, Sq, H, D] and twice [B, Sk, H, D] with D 64 or 128; other head sizes run "
            "on attention_triton"
        )
    if q.element_size() == 1 and q.shape[3] != HEAD_DIM:
        raise ValueError(
            f"attention_hopper: 8-bit scores of head size {q.shape[3]}; only {HEAD_DIM} is possible"
        )
    if v.dtype not in (torch.bfloat16, torch.float16) or q.dtype != k.dtype:
        raise ValueError(
            f"attention_hopper: dtypes {q.dtype}, {k.dtype}, {v.dtype}; v must be bfloat16 or "
            "float16 and q and k the same or both 8-bit; use attention_triton for float32"
        )


def launch_hopper(
    q: Tensor,  # [B, Sq, H, D] bfloat16, float16, int8 or float8_e4m3fn; D 128, in 16 bit also 64
    k: Tensor,  # [B, Sk, H, D], dtype of q
    v: Tensor,  # [B, Sk, H, D] bfloat16 or float16
    q_scale: Tensor | None = None,  # [B, H, Sq] float32, 8-bit q only
    k_scale: Tensor | None = None,  # [B, H, ceil(Sk / 128)] float32, 8-bit k only
    config: HopperConfig | None = None,
) -> tuple[Tensor, Tensor]:  # [B, Sq, H, D] dtype of v, [B, H, Sq] float32
    """Run the kernel; with scales the scores are q k^T * q_scale * k_scale / sqrt(D).

    Raises
    ------
    ValueError : shapes or dtypes outside what the kernel takes.
    """
    _check(q, k, v)
    bit8 = q.element_size() == 1
    batch, length, heads, head_dim = q.shape
    keys = k.shape[1]
    config = config or HopperConfig.for_shape(head_dim, keys)
    if bit8 and (q_scale is None or k_scale is None):
        raise ValueError("attention_hopper: 8-bit q and k need q_scale and k_scale")
    if bit8 and k_scale is not None and k_scale.shape[2] != -(-keys // config.block):
        raise ValueError(
            f"attention_hopper: k_scale {tuple(k_scale.shape)} for {keys} keys; expected one scale "
            f"per {config.block} keys"
        )
    out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
    lse = torch.empty((batch, heads, length), dtype=torch.float32, device=q.device)
    programs = -(-length // config.rows) * heads * batch
    flags = torch.empty(config.groups * programs, dtype=torch.int32, device=q.device)
    descriptors = (
        _descriptor(fetchable(q), GROUP_ROWS),
        _descriptor(fetchable(k), config.block),
        _descriptor(fetchable(v), config.block),
    )
    scales = (lse, lse) if q_scale is None else (q_scale.contiguous(), k_scale.contiguous())  # type: ignore[union-attr]
    numbers = (*out.stride()[:3], heads, length, keys, LOG2_E.value / math.sqrt(head_dim))

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
            GROUPS=config.groups,
            D=head_dim,
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
    q: Tensor,  # [B, Sq, H, D] bfloat16 or float16, D 64 or 128
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, D]
) -> tuple[Tensor, Tensor]:  # [B, Sq, H, D], [B, H, Sq] float32
    """Attention and the natural logarithm of the softmax's denominator; see the module.

    Raises
    ------
    ValueError : shapes or dtypes outside what the kernel takes.
    """
    return launch_hopper(q, k, v)


def compile_cases() -> list[CompileCase]:
    """Every form of the kernel that `launch_hopper` runs."""
    forms = [
        (128, torch.bfloat16, torch.bfloat16, False, False),
        (128, torch.bfloat16, torch.bfloat16, True, True),
        (128, torch.float16, torch.float16, True, False),
        (128, torch.int8, torch.bfloat16, False, False),
        (128, torch.int8, torch.bfloat16, True, True),
        (128, torch.float8_e4m3fn, torch.bfloat16, False, False),
        (128, torch.float8_e4m3fn, torch.bfloat16, True, True),
        (64, torch.bfloat16, torch.bfloat16, False, False),
        (64, torch.bfloat16, torch.bfloat16, True, True),
        (64, torch.float16, torch.float16, True, False),
    ]
    lengths = {64: (SHORT, 128), 128: (SHORT,)}
    names = {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.int8: "i8",
        torch.float8_e4m3fn: "fp8e4nv",
    }

    def described(dtype: torch.dtype, rows: int, head_dim: int) -> str:
        shape = f"1, {rows}, 1, {head_dim}"
        return f"tensordesc<{names[dtype]}[{shape}],{tile_layout(rows, dtype, head_dim)!r}>"

    cases = []
    for (head_dim, qk_dtype, dtype, online, only_flagged), keys in [
        (form, keys) for form in forms for keys in lengths[form[0]]
    ]:
        config = HopperConfig.for_shape(head_dim, keys)
        signature = {
            "desc_q": described(qk_dtype, GROUP_ROWS, head_dim),
            "desc_k": described(qk_dtype, config.block, head_dim),
            "desc_v": described(dtype, config.block, head_dim),
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
            "GROUPS": config.groups,
            "D": head_dim,
            "BIT8": qk_dtype.itemsize == 1,
            "ONLINE": online,
            "ONLY_FLAGGED": only_flagged,
            "DTYPE": _GLUON[dtype],
        }
        name = f"{head_dim} {names[qk_dtype]} {config.block}{' online' if online else ''}"
        options = {"num_warps": 4}
        cases.append(
            CompileCase(name, attention_kernel, signature, constexprs, options, gluon=True)
        )
    return cases
