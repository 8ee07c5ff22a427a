"""Attention without mask: o = softmax(q k^T / sqrt(D)) v, per batch element and head.

Shapes are [B, S, H, D]. One call is 4 B H Sq Sk D operations; at the real size (B 2, S 31,850,
H 12, D 128) 12.5 TFLOP, at least 16.7 ms at the 746 TFLOP/s that bf16 products reach on an H100.
It moves 8 bytes an element, 0.8 GB: 0.3 ms, so that only the products count. Backward: 2.5 times
the operations.

Here are the definition, the operators of our own kernels under torch.compile and autograd, and the
public function. Kernels: `attention_hopper` (compute capability 9.0), `attention_triton` (the
others), `attention_8bit`, `attention_backward`. Backends by name: `backends`.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from gen3r_kernels.attention_backward import attention_backward
from gen3r_kernels.attention_triton import attention_portable
from gen3r_kernels.backends import ATTENTION_BACKENDS, FA3_MODULES, Backends, choose
from gen3r_kernels.carried import carrying, operator

HOPPER = (9, 0)
HALF = (torch.bfloat16, torch.float16)
MOST_SCORES = 2**30  # numbers of a score matrix that the reference writes out at once


def attention_reference(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, D]
) -> Tensor:  # [B, Sq, H, D] float32 (float64 for float64 inputs)
    """The definition, with the score matrix written out; head by head where it would be large.

    Memory: three times B H Sq Sk numbers, or three times Sq Sk where the former exceed 2^30.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    if q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= MOST_SCORES:
        return (torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v).transpose(1, 2)
    heads = [
        torch.softmax(one_q @ one_k.transpose(-1, -2), dim=-1) @ one_v
        for one_q, one_k, one_v in zip(*(x.flatten(0, 1) for x in (q, k, v)), strict=True)
    ]
    return torch.stack(heads).unflatten(0, q.shape[:2]).transpose(1, 2)


def kernel_for(
    shape: tuple[int, int, int, int, int],  # B, Sq, Sk, H, D
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> str:
    """Which forward kernel the backend ``triton`` runs: "hopper" or "portable"."""
    fits = shape[-1] in (64, 128) and dtype in HALF and shape[1] >= 128 and shape[2] >= 128
    return "hopper" if capability == HOPPER and fits else "portable"


@operator("attention_forward")
def attention_forward(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, D]
) -> tuple[Tensor, Tensor]:  # [B, Sq, H, D] and [B, H, Sq] float32
    """Our own forward: the output, and the natural logarithm of the softmax's denominator."""
    if carrying():
        return attention_portable(q, k, v)
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    shape = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3])
    if kernel_for(shape, q.dtype, capability) == "hopper":
        from gen3r_kernels.attention_hopper import attention_hopper

        return attention_hopper(q, k, v)
    return attention_portable(q, k, v)


@torch.library.custom_op("gen3r::attention_forward_fa3", mutates_args=())
def attention_forward_fa3(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, D]
) -> tuple[Tensor, Tensor]:  # [B, Sq, H, D] and [B, H, Sq] float32
    """FlashAttention-3's forward, from the first of FA3_MODULES that is installed."""
    name = next(name for name in FA3_MODULES if importlib.util.find_spec(name) is not None)
    library = importlib.import_module(name)
    out, lse, *_ = library.flash_attn_func(q, k, v, return_attn_probs=True)
    return out, lse


def _fake_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    return q.new_empty(q.shape), lse


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(grad, *ctx.saved_tensors)


for _operator in (attention_forward, attention_forward_fa3):
    _operator.register_fake(_fake_forward)
    _operator.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("gen3r::attention_forward_8bit", mutates_args=())
def attention_forward_8bit(
    q: Tensor,  # [B, Sq, H, 128]
    k: Tensor,  # [B, Sk, H, 128]
    v: Tensor,  # [B, Sk, H, 128]
    fmt: str,
) -> Tensor:  # [B, Sq, H, 128]
    """The forward with products in "int8" or "fp8"; no backward."""
    from gen3r_kernels.attention_8bit import attention_8bit

    return attention_8bit(q, k, v, fmt=fmt)


@attention_forward_8bit.register_fake
def _fake_8bit(q: Tensor, k: Tensor, v: Tensor, fmt: str) -> Tensor:
    return q.new_empty(q.shape)


def attention(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, D]
    backends: Backends,
) -> Tensor:  # [B, Sq, H, D], dtype of q
    """softmax(q k^T / sqrt(D)) v with the backend that `backends.attention` names.

    Raises
    ------
    ValueError : shapes or dtypes that do not fit, or a backend that cannot take these tensors.
    """
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; "
            "expected [B, Sq, H, D] and twice [B, Sk, H, D]"
        )
    if backends.attention == "auto":
        backend = choose(q, k, v).backend
    else:
        backend = ATTENTION_BACKENDS[backends.attention]
    backend.check(q, k, v)
    return backend.run(q, k, v)
