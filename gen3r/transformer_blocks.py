"""The parts of the diffusion transformer: attention, block, head and image projection.

Source: Wan2.1 (arXiv 2503.20314). Module names are the checkpoint's parameter names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gen3r.config import TransformerConfig
from gen3r_kernels import (
    Backends,
    attention,
    cross_attention,
    gated_residual,
    rms_norm,
    rms_norm_rope,
)

Norm = dict[str, Tensor | None]  # keyword arguments of layer_norm_modulate: scale and shift


class RMSNorm(nn.Module):
    """Holds the gain of an RMSNorm; the operators compute it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """The projections and norms that self- and cross-attention share."""

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__()
        dim = config.dim
        self.config, self.backends = config, backends
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)


class SelfAttention(Attention):
    """Attention among the tokens, with rotary positions."""

    def forward(
        self,
        x: Tensor,  # [B, S, C]
        rope: tuple[Tensor, Tensor],  # cos, sin, each [S, D / 2]
    ) -> Tensor:  # [B, S, C]
        heads = self.config.num_heads
        q, k = rms_norm_rope(
            self.q(x),
            self.k(x),
            self.norm_q.weight,
            self.norm_k.weight,
            *rope,
            num_heads=heads,
            eps=self.config.eps,
        )
        v = self.v(x).unflatten(-1, (heads, -1))
        return self.o(attention(q, k, v, self.backends).flatten(2))


class CrossAttention(Attention):
    """Text and image attention with separate keys and values, summed before `o`."""

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__(config, backends)
        dim = config.dim
        self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_k_img = RMSNorm(dim)

    def keys_values(
        self,
        text: Tensor,  # [B, Lt, C]
        image: Tensor,  # [B, Li, C]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # k_text, v_text, k_image, v_image: [B, L, H, D]
        """Constant over the denoising steps."""
        eps = self.config.eps
        parts = (
            rms_norm(self.k(text), self.norm_k.weight, eps),
            self.v(text),
            rms_norm(self.k_img(image), self.norm_k_img.weight, eps),
            self.v_img(image),
        )
        k_text, v_text, k_image, v_image = (
            part.unflatten(-1, (self.config.num_heads, -1)) for part in parts
        )
        return k_text, v_text, k_image, v_image

    def forward(
        self,
        x: Tensor,  # [B, S, C]
        keys_values: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> Tensor:  # [B, S, C]
        q = rms_norm(self.q(x), self.norm_q.weight, self.config.eps)
        q = q.unflatten(-1, (self.config.num_heads, -1))
        return self.o(cross_attention(q, *keys_values, self.backends).flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a norm.

    The block is given its first norm's output and returns the next block's, so that every residual
    update runs together with the norm that reads it.
    """

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__()
        self.config = config
        self.self_attn = SelfAttention(config, backends)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config, backends)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(
        self,
        stream: Tensor,  # [B, S, C] float32
        normed: Tensor,  # [B, S, C]
        modulation: tuple[Tensor, ...],  # 6 x [B, 1, C] float32: shift, scale, gate, twice
        following: Norm,  # scale and shift of the norm behind this block
        keys_values: tuple[Tensor, Tensor, Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:  # stream and normed for what follows
        eps, dtype = self.config.eps, normed.dtype
        _, _, attention_gate, ffn_shift, ffn_scale, ffn_gate = modulation
        stream, normed = gated_residual(
            stream,
            self.self_attn(normed, rope),
            attention_gate,
            weight=self.norm3.weight,
            bias=self.norm3.bias,
            eps=eps,
            out_dtype=dtype,
        )
        stream, normed = gated_residual(
            stream,
            self.cross_attn(normed, keys_values),
            scale=ffn_scale,
            shift=ffn_shift,
            eps=eps,
            out_dtype=dtype,
        )
        return gated_residual(
            stream, self.ffn(normed), ffn_gate, **following, eps=eps, out_dtype=dtype
        )


class Head(nn.Module):
    """The last norm's modulation and the projection to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.head = nn.Linear(config.dim, config.out_dim * patch)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))


class ImageProjection(nn.Module):
    """CLIP tokens to the transformer's width."""

    def __init__(self, clip_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(clip_dim),
            nn.Linear(clip_dim, clip_dim),
            nn.GELU(),
            nn.Linear(clip_dim, dim),
            nn.LayerNorm(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)
