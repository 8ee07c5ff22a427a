"""Text and image cross-attention: two softmaxes over separate keys, outputs summed.

o = softmax(q k_t^T / sqrt(D)) v_t + softmax(q k_i^T / sqrt(D)) v_i

k_t, v_t come from the padded text context (no mask: padding keys take part, as upstream), k_i, v_i
from the 257 image tokens. Source: Wan2.1 image-to-video cross-attention (arXiv 2503.20314).
"""

from __future__ import annotations

from torch import Tensor

from gen3r_kernels.attention import attention, attention_reference
from gen3r_kernels.backends import Backends


def cross_attention_reference(
    q: Tensor,  # [B, S, H, D]
    k_text: Tensor,  # [B, Lt, H, D]
    v_text: Tensor,  # [B, Lt, H, D]
    k_image: Tensor,  # [B, Li, H, D]
    v_image: Tensor,  # [B, Li, H, D]
) -> Tensor:  # [B, S, H, D] float32
    """The definition in float32."""
    return attention_reference(q, k_text, v_text) + attention_reference(q, k_image, v_image)


def cross_attention(
    q: Tensor,  # [B, S, H, D]
    k_text: Tensor,  # [B, Lt, H, D]
    v_text: Tensor,  # [B, Lt, H, D]
    k_image: Tensor,  # [B, Li, H, D]
    v_image: Tensor,  # [B, Li, H, D]
    backends: Backends,
) -> Tensor:  # [B, S, H, D], dtype of q
    """Sum of text and image attention; keys and values are given projected and normalised."""
    return attention(q, k_text, v_text, backends) + attention(q, k_image, v_image, backends)
