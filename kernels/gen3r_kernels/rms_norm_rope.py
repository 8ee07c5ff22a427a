"""RMSNorm over the full width of q and k, then 3D rotary embedding, in the attention layout.

n(x) = x / sqrt(mean(x^2) + eps) * weight over all H * D channels (not per head); then channel pairs
(2i, 2i+1) of each head are rotated by the angle table: (a, b) -> (a cos - b sin, a sin + b cos).
Source: Wan2.1 (arXiv 2503.20314); rotary embedding: arXiv 2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_reference(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    eps: float = 1e-6,
) -> Tensor:  # [..., C] float32
    """x / sqrt(mean(x^2) + eps) * weight in float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()


def rms_norm_rope_reference(
    x: Tensor,  # [B, S, H * D]
    weight: Tensor,  # [H * D]
    cos: Tensor,  # [S, D / 2] float32
    sin: Tensor,  # [S, D / 2] float32
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:  # [B, S, H, D] float32
    """The definition for one of q and k, in float32."""
    x = rms_norm_reference(x, weight, eps).unflatten(-1, (num_heads, -1))
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def rms_norm(
    x: Tensor,  # [..., C]
    weight: Tensor,  # [C]
    eps: float = 1e-6,
) -> Tensor:  # [..., C], dtype of x
    """RMSNorm over the last axis, statistics in float32."""
    return rms_norm_reference(x, weight, eps).to(x.dtype)


def rms_norm_rope(
    q: Tensor,  # [B, S, H * D]
    k: Tensor,  # [B, S, H * D]
    q_weight: Tensor,  # [H * D]
    k_weight: Tensor,  # [H * D]
    cos: Tensor,  # [S, D / 2] float32
    sin: Tensor,  # [S, D / 2] float32
    *,
    num_heads: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # q, k as [B, S, H, D], dtype of q
    """Normalise and rotate q and k.

    Raises
    ------
    ValueError : a table that does not fit the sequence length and head size.
    """
    expected = (q.shape[1], q.shape[2] // num_heads // 2)
    if cos.shape != expected or sin.shape != expected:
        raise ValueError(
            f"rms_norm_rope: tables {tuple(cos.shape)}, {tuple(sin.shape)} do not fit "
            f"q {tuple(q.shape)} with {num_heads} heads; expected {expected}"
        )
    return (
        rms_norm_rope_reference(q, q_weight, cos, sin, num_heads, eps).to(q.dtype),
        rms_norm_rope_reference(k, k_weight, cos, sin, num_heads, eps).to(k.dtype),
    )
