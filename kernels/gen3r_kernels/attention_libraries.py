"""Attention's backward from other libraries, fed with our o and lse: FlashAttention-4 and cuDNN."""

from __future__ import annotations

import importlib
import warnings
from functools import cache

import torch
from torch import Tensor

from gen3r_kernels.backends import is_installed


@cache
def fa4_is_installed() -> bool:
    """Whether FlashAttention-4 is there; it shares its top package with FlashAttention-2."""
    return is_installed("flash_attn.cute")


def backward_fa4(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-4's backward; arguments as `attention_backward`'s.

    Raises
    ------
    ValueError : the package is not installed.
    """
    if not fa4_is_installed():
        raise ValueError(
            "attention_backward: provider 'fa4' needs the package flash-attn-4 "
            "(pip install 'gen3r-engine[fa4]'); or use 'cudnn'"
        )
    interface = importlib.import_module("flash_attn.cute.interface")
    operands = (x.contiguous() for x in (q, k, v, o, grad))
    with warnings.catch_warnings():
        # It tells of an argument that its compiler could not convert, at every new shape.
        warnings.filterwarnings("ignore", message="Argument aux_data", category=UserWarning)
        dq, dk, dv = interface._flash_attn_bwd(*operands, lse, deterministic=deterministic)[:3]
    return dq, dk, dv


def backward_cudnn(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """cuDNN's backward; arguments as `attention_backward`'s."""
    operands = (x.contiguous().transpose(1, 2) for x in (grad, q, k, v, o))
    # Without dropout seed and offset are not read; no bias, no packed sequences.
    unread = torch.empty((), dtype=torch.int64, device=q.device)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *operands,
        lse.unsqueeze(-1),
        unread,
        unread,
        None,
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        False,
    )
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in gradients)
    return dq, dk, dv
