"""LayerNorm with an affine or a per-sample modulation: y = norm(x) * (1 + scale) + shift.

norm(x) = (x - mean) / sqrt(var + eps), statistics over the last axis in float32; an affine norm
applies weight and bias instead. The float32 residual stream comes in, the model's dtype goes out.
Bytes at [2, 31850, 1536]: 391 MB in, 196 MB out (bf16): 0.2 ms at 2.86 TB/s.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def layer_norm_modulate_reference(
    x: Tensor,  # [B, S, C]
    scale: Tensor | None = None,  # [B, 1, C] float32, applied as 1 + scale
    shift: Tensor | None = None,  # [B, 1, C] float32
    weight: Tensor | None = None,  # [C], affine norms only
    bias: Tensor | None = None,  # [C]
    eps: float = 1e-6,
) -> Tensor:  # [B, S, C] float32
    """The definition in float32."""
    y = F.layer_norm(
        x.float(),
        x.shape[-1:],
        None if weight is None else weight.float(),
        None if bias is None else bias.float(),
        eps,
    )
    if scale is not None:
        y = y * (1 + scale.float())
    if shift is not None:
        y = y + shift.float()
    return y


def layer_norm_modulate(
    x: Tensor,  # [B, S, C] float32 residual stream
    scale: Tensor | None = None,  # [B, 1, C] float32
    shift: Tensor | None = None,  # [B, 1, C] float32
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:  # [B, S, C] out_dtype
    """norm(x) * (1 + scale) + shift, or the affine norm(x) * weight + bias."""
    return layer_norm_modulate_reference(x, scale, shift, weight, bias, eps).to(out_dtype)
