"""Causal video autoencoding shared by the appearance VAE and the geometry adapter.

A clip of 4k+1 frames becomes k+1 latent frames. It is processed in chunks: first one frame alone,
then four video frames (or one latent frame) at a time. Every temporal convolution looks only
backwards, and what it must remember of earlier chunks lies in a `ChunkCache` that the caller passes
along: modules hold no state, so encodes and decodes may interleave. Chunks of 4n video frames or n
latent frames give the same values as n single chunks; only the first chunk (one frame) is special,
because the temporal resampling leaves it alone.

Source: Wan2.1 VAE (arXiv 2503.20314) and behaviour numbers 4 and 5 of the reference notes:
latents are scaled means, log variances are not rescaled, downsampling pads right and bottom only.

Sizes in the comments: B batch, C channels, T frames, H and W pixels or token rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from gen3r.causal_layers import CausalConv3d, ChannelRMSNorm, ChunkCache, Pointwise
from gen3r_kernels import Backends, attention


@dataclass(frozen=True)
class Posterior:
    """A diagonal normal distribution over scaled latents.

    mean is (mu - latents_mean) / latents_std; logvar is clamped to [-30, 20] and not rescaled.
    """

    mean: Tensor  # [B, z, t, h, w]
    logvar: Tensor  # [B, z, t, h, w]

    def sample(
        self,
        noise: Tensor,  # [B, z, t, h, w] standard normal
    ) -> Tensor:  # [B, z, t, h, w]
        """mean + exp(logvar / 2) * noise."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self) -> Tensor:  # [B, z, t, h, w]
        """The mean."""
        return self.mean


def norm_silu_conv(
    x: Tensor,  # [B, Cin, T, H, W]
    norm: ChannelRMSNorm,
    conv: CausalConv3d,
    cache: ChunkCache,
) -> Tensor:  # [B, Cout, T, H, W]
    """Norm, SiLU and causal convolution."""
    y, joined = conv.normed(x, norm, cache)
    return conv.convolve(y, joined=joined)


def norm_and_conv(
    layers: nn.ModuleDict, norm: str, conv: str
) -> tuple[ChannelRMSNorm, CausalConv3d]:
    """Two entries of a ModuleDict, which forgets the classes of its items."""
    return cast(ChannelRMSNorm, layers[norm]), cast(CausalConv3d, layers[conv])


def per_frame(
    function: Callable[[Tensor], Tensor],  # [B * T, C, H, W] -> [B * T, C', H', W']
    x: Tensor,  # [B, C, T, H, W]
) -> Tensor:  # [B, C', T, H', W']
    """Apply an image function to every frame."""
    batch = x.shape[0]
    return function(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 convolution of x where widths differ.

    The keys 0, 2, 3, 6 are the parameter names of the published weights.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelRMSNorm(in_channels),
                "2": CausalConv3d(in_channels, out_channels),
                "3": ChannelRMSNorm(out_channels),
                "6": CausalConv3d(out_channels, out_channels),
            }
        )
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else Pointwise(in_channels, out_channels)

    def forward(
        self,
        x: Tensor,  # [B, Cin, T, H, W]
        cache: ChunkCache,
    ) -> Tensor:  # [B, Cout, T, H, W]
        # One name for every step, so that each tensor is freed as soon as the next one is there.
        norm, conv = norm_and_conv(self.residual, "0", "2")
        y, joined = conv.normed(x, norm, cache)
        y = conv.convolve(y, joined=joined)
        norm, conv = norm_and_conv(self.residual, "3", "6")
        y, joined = conv.normed(y, norm, cache)
        return conv.convolve(y, joined=joined, residual=self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if isinstance(self.shortcut, nn.Identity):
            return x
        return self.shortcut(x.to(self.shortcut.weight.dtype)).to(x.dtype)


class FrameAttention(nn.Module):
    """x + proj(attention(norm(x))): one head as wide as the channels, within each frame."""

    # The single head is 384 wide at the real size. The half-precision kernels (cudnn, fa2, fa3) end
    # at 128 or 256, so the backend that a user picks for the transformer must not reach this block:
    # it always takes the default, sdpa. It is below 1 % of the arithmetic.
    _backends = Backends()

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(channels, video=False)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(
        self,
        x: Tensor,  # [B, C, T, H, W]
        cache: ChunkCache,
    ) -> Tensor:  # [B, C, T, H, W]
        return x + per_frame(self._attend, x)

    def _attend(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:  # [N, C, H, W]
        qkv = self.to_qkv(self.norm(x, silu=False))
        # Channels last: sdpa's fused kernels ask for it and would fall back to a full score matrix.
        rows = qkv.flatten(2).transpose(1, 2).contiguous().unsqueeze(2)
        q, k, v = rows.chunk(3, dim=-1)  # [N, HW, 1, C]
        out = attention(q, k, v, self._backends)
        return self.proj(out.squeeze(2).transpose(1, 2).unflatten(2, x.shape[2:]))
