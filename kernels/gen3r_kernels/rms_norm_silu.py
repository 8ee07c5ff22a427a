"""Channel RMSNorm of the VAEs, with SiLU: y = silu(x / max(|x|_2, 1e-12) * sqrt(C) * gamma).

The norm runs over channels (axis 1) at every position of a video [B, C, T, H, W] or an image
[B, C, H, W].
Source: Wan2.1 VAE (arXiv 2503.20314).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def rms_norm_silu_reference(
    x: Tensor,  # [B, C, T, H, W] or [B, C, H, W]
    gamma: Tensor,  # [C, 1, 1, 1] or [C, 1, 1]
    silu: bool = True,
) -> Tensor:  # shape of x, float32
    """The definition in float32."""
    x = x.float()
    # A plain sum of squares: on a CPU torch's vector norm over a strided axis is far slower.
    length = (x * x).sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    y = x / length * (x.shape[1] ** 0.5 * gamma.float())
    return F.silu(y) if silu else y


def rms_norm_silu(
    x: Tensor,  # [B, C, T, H, W] or [B, C, H, W]
    gamma: Tensor,  # [C, 1, 1, 1] or [C, 1, 1]
    silu: bool = True,
) -> Tensor:  # shape and dtype of x
    """RMSNorm over channels, followed by SiLU unless `silu` is False (attention's norm)."""
    return rms_norm_silu_reference(x, gamma, silu).to(x.dtype)
