"""The parts of the diffusion transformer: attention, block, head and image projection.

Source: Wan2.1 (arXiv 2503.20314). Module names are the checkpoint's parameter names.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from gen3r.config import TransformerConfig
from gen3r_kernels import (
    Backends,
    attention,
    cross_attention,
    gated_residual,
    linear,
    rms_norm,
    rms_norm_rope,
)

Norm = dict[str, Tensor | None]  # tables of layer_norm_modulate, by their argument names


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

    def project(
        self,
        layer: nn.Linear,
        x: Tensor,  # [..., C]
    ) -> Tensor:  # [..., C]
        return linear(x, layer.weight, layer.bias, backends=self.backends)


class SelfAttention(Attention):
    """Attention among the tokens, with rotary positions."""

    def forward(
        self,
        x: Tensor,  # [B, S, C]
        rope: tuple[Tensor, Tensor],  # cos, sin, each [S, D / 2]
    ) -> Tensor:  # [B, S, C]
        heads = self.config.num_heads
        q, k = rms_norm_rope(
            self.project(self.q, x),
            self.project(self.k, x),
            self.norm_q.weight,
            self.norm_k.weight,
            *rope,
            num_heads=heads,
            eps=self.config.eps,
            backends=self.backends,
        )
        v = self.project(self.v, x).unflatten(-1, (heads, -1))
        return self.project(self.o, attention(q, k, v, self.backends).flatten(2))


class KeysValues(NamedTuple):
    """What cross-attention reads; the same at every denoising step. k, v: [B, L, H, D]."""

    k_text: Tensor
    v_text: Tensor
    k_image: Tensor
    v_image: Tensor
    text_lengths: Tensor  # [B] int32


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
        text_lengths: Tensor,  # [B] int32
    ) -> KeysValues:
        """Constant over the denoising steps."""
        heads = (self.config.num_heads, -1)
        return KeysValues(
            self.norm(self.project(self.k, text), self.norm_k).unflatten(-1, heads),
            self.project(self.v, text).unflatten(-1, heads),
            self.norm(self.project(self.k_img, image), self.norm_k_img).unflatten(-1, heads),
            self.project(self.v_img, image).unflatten(-1, heads),
            text_lengths,
        )

    def norm(
        self,
        x: Tensor,  # [B, L, C]
        norm: RMSNorm,
    ) -> Tensor:  # [B, L, C]
        return rms_norm(x, norm.weight, self.config.eps, backends=self.backends)

    def queries(
        self,
        x: Tensor,  # [B, S, C]
    ) -> Tensor:  # [B, S, H, D]
        q = self.norm(self.project(self.q, x), self.norm_q)
        return q.unflatten(-1, (self.config.num_heads, -1))

    def forward(
        self,
        q: Tensor,  # [B, S, H, D] from `queries`
        keys_values: KeysValues,
    ) -> Tensor:  # [B, S, C]
        out = cross_attention(
            q,
            keys_values.k_text,
            keys_values.v_text,
            keys_values.k_image,
            keys_values.v_image,
            self.backends,
            text_lengths=keys_values.text_lengths,
        )
        return self.project(self.o, out.flatten(2))


class FeedForward(nn.Sequential):
    """Two linear layers with a tanh-GELU between, which the first layer's operator applies."""

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.backends = backends

    def forward(self, x: Tensor) -> Tensor:
        first, last = cast(nn.Linear, self[0]), cast(nn.Linear, self[2])
        hidden = linear(x, first.weight, first.bias, activation="gelu_tanh", backends=self.backends)
        return linear(hidden, last.weight, last.bias, backends=self.backends)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind a norm.

    The block is given its first norm's output and returns the next block's, so that every residual
    update runs together with the norm that reads it.
    """

    def __init__(self, config: TransformerConfig, backends: Backends) -> None:
        super().__init__()
        self.config, self.backends = config, backends
        self.self_attn = SelfAttention(config, backends)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config, backends)
        self.ffn = FeedForward(config, backends)
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def forward(
        self,
        stream: Tensor,  # [B, S, C] float32
        normed: Tensor,  # [B, S, C]
        modulation: tuple[Tensor, ...],  # 6 x [1 or B, 1, C] float32: shift, scale, gate, twice
        following: Norm,  # scale and shift of the norm behind this block
        keys_values: KeysValues,  # R rows, a multiple of B
        rope: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:  # stream [R, S, C] and normed [R, S, C] for what follows
        """With R > B the rows are repeated R / B times where the text first tells them apart."""
        _, _, attention_gate, ffn_shift, ffn_scale, ffn_gate = modulation
        affine: Norm = {"weight": self.norm3.weight, "bias": self.norm3.bias}
        modulated: Norm = {"scale": ffn_scale, "shift": ffn_shift}
        attended = self.self_attn(normed, rope)
        stream, normed = self.update(stream, attended, attention_gate, affine)
        q = self.cross_attn.queries(normed)
        repeats = keys_values.k_text.shape[0] // stream.shape[0]
        if repeats > 1:
            stream, q = stream.repeat(repeats, 1, 1), q.repeat(repeats, 1, 1, 1)
        attended = self.cross_attn(q, keys_values)
        stream, normed = self.update(stream, attended, None, modulated)
        return self.update(stream, self.ffn(normed), ffn_gate, following)

    def update(
        self,
        stream: Tensor,  # [B, S, C] float32
        y: Tensor,  # [B, S, C]
        gate: Tensor | None,  # [B, 1, C] float32
        norm: Norm,
    ) -> tuple[Tensor, Tensor]:  # stream and normed, the latter in y's dtype
        """Add y * gate to the stream and apply the norm that follows."""
        stream, normed = gated_residual(
            stream,
            y,
            gate,
            **norm,
            eps=self.config.eps,
            out_dtype=y.dtype,
            backends=self.backends,
        )
        return stream, cast(Tensor, normed)  # y is never 8-bit, so that normed is not either


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
