"""The causal encoder and decoder that the appearance VAE and the geometry adapter specialise.

Encoder: convolution, stages of residual blocks with resampling between them, a middle with
attention, head. Decoder: the mirror image with one residual block more per stage. Both are stacks
of the blocks in `gen3r.causal_video`; module names are the parameter names of the published
weights.

Source: Wan2.1 VAE (arXiv 2503.20314), Gen3R (arXiv 2601.04090).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from gen3r.causal_layers import (
    CausalConv3d,
    ChannelRMSNorm,
    ChunkCache,
    DoublingConv2d,
    Pointwise,
    TemporalDoubling,
    TemporalHalving,
    number_slots,
)
from gen3r.causal_video import (
    FrameAttention,
    ResidualBlock,
    norm_and_conv,
    norm_silu_conv,
    per_frame,
)


class Shrink(nn.Module):
    """Encoder resampling: a 3x3 convolution a frame (stride 2 if `halve`), then the frame rate."""

    def __init__(self, channels: int, *, halve: bool, temporal: bool) -> None:
        super().__init__()
        self.halve = halve
        stride, padding = (2, 0) if halve else (1, 1)
        conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)
        self.resample = nn.ModuleDict({"1" if halve else "0": conv})
        self.time_conv = TemporalHalving(channels) if temporal else None

    def forward(
        self,
        x: Tensor,  # [B, C, T, H, W]
        cache: ChunkCache,
    ) -> Tensor:  # [B, C, T', H / 2 or H, W / 2 or W]
        x = per_frame(self._resample, x)
        return x if self.time_conv is None else self.time_conv(x, cache)

    def _resample(self, x: Tensor) -> Tensor:
        (conv,) = cast(Iterable[nn.Conv2d], self.resample.values())
        narrow = x.to(conv.weight.dtype)
        if not self.halve:
            return conv(narrow).to(x.dtype)
        if narrow.is_cuda and not narrow.is_contiguous():
            # A kernel of 4 x 4 whose first row and column are zero pads alike on all sides, which
            # the library does by itself; padding x below and on the right would copy it.
            weight = F.pad(conv.weight, (1, 0, 1, 0))
            return F.conv2d(narrow, weight, conv.bias, stride=2, padding=1).to(x.dtype)
        return conv(F.pad(narrow, (0, 1, 0, 1))).to(x.dtype)


class Grow(nn.Module):
    """Decoder resampling: the frame rate, then each frame (nearest x2 if `double`).

    A 3x3 convolution at the end halves the channels.
    """

    def __init__(self, channels: int, *, double: bool, temporal: bool) -> None:
        super().__init__()
        half = channels // 2
        conv = DoublingConv2d(channels, half) if double else nn.Conv2d(channels, half, 3, padding=1)
        self.resample = nn.ModuleDict({"1" if double else "0": conv})
        self.time_conv = TemporalDoubling(channels) if temporal else None

    def forward(
        self,
        x: Tensor,  # [B, C, T, H, W]
        cache: ChunkCache,
    ) -> Tensor:  # [B, C / 2, T', 2 H or H, 2 W or W]
        if self.time_conv is not None:
            x = self.time_conv(x, cache)
        (conv,) = self.resample.values()
        return per_frame(conv, x)


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [
            ResidualBlock(channels, channels),
            FrameAttention(channels),
            ResidualBlock(channels, channels),
        ]
    )


def _head(in_channels: int, out_channels: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"0": ChannelRMSNorm(in_channels), "2": CausalConv3d(in_channels, out_channels)}
    )


class CausalEncoder(nn.Module):
    """Frames to the moments of their latents.

    Parameters
    ----------
    widths : channels after the first convolution, then after each stage.
    temporal : for each gap between stages, whether the frame rate halves there.
    spatial : whether height and width halve in each gap.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...],
        out_channels: int,
        num_res_blocks: int,
        temporal: tuple[bool, ...],
        *,
        spatial: bool,
    ) -> None:
        super().__init__()
        self.float32_stream = False  # between the blocks, whatever the dtype of the weights
        self.conv1 = CausalConv3d(in_channels, widths[0])
        layers: list[nn.Module] = []
        for stage, (before, after) in enumerate(pairwise(widths)):
            if stage > 0:
                layers.append(Shrink(before, halve=spatial, temporal=temporal[stage - 1]))
            layers.append(ResidualBlock(before, after))
            layers += [ResidualBlock(after, after) for _ in range(num_res_blocks - 1)]
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], out_channels)

    def forward(
        self,
        x: Tensor,  # [B, Cin, T, H, W]: one frame first, then multiples of the temporal factor
        cache: ChunkCache,
    ) -> Tensor:  # [B, Cout, t, h, w]
        x = self.conv1(x, cache)
        if self.float32_stream:
            x = x.float()
        for layer in (*self.downsamples, *self.middle):
            x = layer(x, cache)
        return norm_silu_conv(x, *norm_and_conv(self.head, "0", "2"), cache)


class CausalDecoder(nn.Module):
    """Latents to frames. Every resampling between stages halves the channels.

    Parameters as in `CausalEncoder`, in decoding order.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...],
        out_channels: int,
        num_res_blocks: int,
        temporal: tuple[bool, ...],
        *,
        spatial: bool,
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(in_channels, widths[0])
        self.middle = _middle(widths[0])
        layers: list[nn.Module] = []
        for stage, (before, after) in enumerate(pairwise(widths)):
            if stage > 0:
                layers.append(Grow(before, double=spatial, temporal=temporal[stage - 1]))
            layers.append(ResidualBlock(before if stage == 0 else before // 2, after))
            layers += [ResidualBlock(after, after) for _ in range(num_res_blocks)]
        self.upsamples = nn.ModuleList(layers)
        self.head = _head(widths[-1], out_channels)

    def forward(
        self,
        x: Tensor,  # [B, Cin, t, h, w]: one latent frame first, then any number
        cache: ChunkCache,
    ) -> Tensor:  # [B, Cout, T, H, W]
        x = self.conv1(x, cache)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, cache)
        return norm_silu_conv(x, *norm_and_conv(self.head, "0", "2"), cache)


class CausalVAE(nn.Module):
    """Encoder and decoder with the 1x1x1 convolutions between them: one chunk at a time."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent_channels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.conv1 = Pointwise(2 * latent_channels, 2 * latent_channels)
        self.conv2 = Pointwise(latent_channels, latent_channels)
        self.decoder = decoder
        self.encoder_slots = number_slots(encoder)
        self.decoder_slots = number_slots(decoder)

    def encode_chunk(
        self,
        x: Tensor,  # [B, Cin, 1 or 4n, H, W]
        cache: ChunkCache,
    ) -> Tensor:  # [B, 2 z, 1 or n, h, w]: mu (unscaled), then logvar (unclamped)
        moments = self.conv1(self.encoder(x, cache))
        cache.started = True
        return moments

    def decode_chunk(
        self,
        z: Tensor,  # [B, z, 1 or n, h, w], unscaled
        cache: ChunkCache,
    ) -> Tensor:  # [B, Cout, 1 or 4n, H, W]
        frames = self.decoder(self.conv2(z), cache)
        cache.started = True
        return frames
