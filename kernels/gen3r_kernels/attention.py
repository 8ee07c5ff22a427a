"""Attention without mask: o = softmax(q k^T / sqrt(D)) v, per batch element and head.

Shapes are [B, S, H, D]. At the real size (B 2, S 31,850, H 12, D 128) one call is 12.5 TFLOP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen3r_kernels.backends import Backends


def attention_reference(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, D]
) -> Tensor:  # [B, Sq, H, D] float32 (float64 for float64 inputs)
    """The definition, with the score matrix written out; memory B * H * Sq * Sk."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(wide).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2)


def attention(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, D]
    backends: Backends,
) -> Tensor:  # [B, Sq, H, D], dtype of q
    """softmax(q k^T / sqrt(D)) v with the backend that `backends.attention` names.

    Raises
    ------
    ValueError : shapes that do not fit, or a backend that cannot take these tensors.
    """
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; "
            "expected [B, Sq, H, D] and twice [B, Sk, H, D]"
        )
    backend = backends.attention_backend
    backend.check(q)
    return backend.run(q, k, v)
