"""Layers of the causal autoencoders: convolutions that remember, norms, and what they remember.

Every temporal convolution looks only backwards, and what it must remember of earlier chunks lies in
a `ChunkCache` that the caller passes along: modules hold no state, so encodes and decodes may
interleave.

Sizes in the comments: B batch, C channels, T frames, H and W pixels or token rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r_kernels import Backends, causal_conv3d, rms_norm_silu, upsample_conv2d


class ChunkCache:
    """What the temporal convolutions of one encoder or decoder remember between chunks.

    One slot per convolution, numbered in the order of definition. A slot holds the last one or two
    input frames, [B, C, 1 or 2, H, W]. The list is replaced entry by entry and no tensor is written
    in place, so `list(cache.tensors)` is a snapshot.
    """

    def __init__(self, slots: int) -> None:
        self.tensors: list[Tensor | None] = [None] * slots
        self.started = False
        self.last = False  # the chunk under way is the clip's last: nothing is remembered of it

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor]) -> ChunkCache:
        """The cache of a clip under way, from what `flatten` returned."""
        cache = cls(0)
        cache.tensors = list(tensors)
        cache.started = True
        return cache

    def flatten(self) -> list[Tensor]:
        """The slots as a list of tensors ("cache out" of an exported chunk step).

        Raises
        ------
        ValueError : nothing has been processed yet.
        """
        filled = [t for t in self.tensors if t is not None]
        if not self.started or len(filled) != len(self.tensors):
            raise ValueError("the chunk cache is empty; process the first frame before flattening")
        return filled

    def exchange(
        self,
        slot: int,
        x: Tensor,  # [B, C, T, H, W]
        frames: int,
    ) -> Tensor | None:  # [B, C, frames, H, W]
        """The frames remembered before x, None at first; x's last frames take their place."""
        past = self.tensors[slot]
        if self.last:
            self.tensors[slot] = None
        elif isinstance(x.shape[2], torch.SymInt) and not _known_longer(x, frames):
            # A graph for chunks of any length, of one frame too: the convolution joins the same.
            before = _zero_frames(x, frames) if past is None else past
            self.tensors[slot] = torch.cat([before, x], dim=2)[:, :, -frames:].clone()
        elif x.shape[2] < frames:
            before = _zero_frames(x, frames) if past is None else past
            self.tensors[slot] = torch.cat([before[:, :, x.shape[2] :], x], dim=2)
        else:
            self.remember(slot, x, frames)
        return past

    def remember(
        self,
        slot: int,
        x: Tensor,  # [B, C, T, H, W]
        frames: int,
    ) -> None:
        """Keep the last frames of x. A copy: a view would hold the whole chunk in memory."""
        if not self.last:
            self.tensors[slot] = x[:, :, -frames:].clone()

    def forget(
        self,
        slot: int,
        x: Tensor,  # [B, C, T, H, W]
        frames: int,
    ) -> None:
        """Remember zeros of x's size."""
        if not self.last:
            self.tensors[slot] = _zero_frames(x, frames)


def _known_longer(x: Tensor, frames: int) -> bool:
    """Whether a traced x has more frames than this whatever its length."""
    # Imported here: with sympy it takes half a second, and only a trace comes by.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(x.shape[2] > frames)


def _zero_frames(x: Tensor, frames: int) -> Tensor:
    return x.new_zeros(*x.shape[:2], frames, *x.shape[3:])


class CachedConv3d(nn.Conv3d):
    """A convolution with memory. `slot` is its place in the chunk cache, see `number_slots`."""

    slot: int = -1
    frames: int = 2  # how many it remembers
    backends = Backends()

    pairs: bool = False  # the output channels of a frame become two frames

    def forward(  # type: ignore[override]  # the cache is an argument here
        self,
        x: Tensor,  # [B, Cin, T, H, W]
        cache: ChunkCache,
    ) -> Tensor:  # [B, Cout, T', H, W], or [B, Cout / 2, 2 T', H, W] for pairs
        return self.convolve(x, cache.exchange(self.slot, x, self.frames))

    def convolve(
        self,
        x: Tensor,  # [B, Cin, T, H, W]
        past: Tensor | None = None,  # [B, Cin, frames, H, W]
        *,
        joined: bool = False,
        residual: Tensor | None = None,  # [B, Cout, T', H, W]
    ) -> Tensor:  # [B, Cout, T', H, W], or [B, Cout / 2, 2 T', H, W] for pairs
        """The convolution itself: after `past`, or of x that begins with it (`joined`)."""
        return causal_conv3d(
            x,
            self.weight,
            self.bias,
            past,
            stride=self.stride,
            padding=_zero_padding(self),
            joined=joined,
            residual=residual,
            pairs=self.pairs,
            backends=self.backends,
        )

    def normed(
        self,
        x: Tensor,  # [B, Cin, T, H, W]
        norm: ChannelRMSNorm,
        cache: ChunkCache,
    ) -> tuple[Tensor, bool]:  # [B, Cin, T or frames + T, H, W], whether it begins with its past
        """The norm and SiLU of x, written behind what is remembered, and remembered in its turn."""
        past = cache.tensors[self.slot]
        y = norm(x, lead=past)
        cache.exchange(self.slot, y, self.frames)
        return y, past is not None


def _zero_padding(conv: nn.Conv3d) -> tuple[int, ...]:
    """The padding in numbers (its type also allows words)."""
    if isinstance(conv.padding, str):
        raise ValueError(f"padding '{conv.padding}' is not supported; give it in numbers")
    return conv.padding


def number_slots(module: nn.Module) -> int:
    """Give every convolution with memory inside `module` its slot; returns their number."""
    cached = [m for m in module.modules() if isinstance(m, CachedConv3d)]
    for slot, conv in enumerate(cached):
        conv.slot = slot
    return len(cached)


def use_backends(module: nn.Module, backends: Backends) -> None:
    """Let every operator inside `module` follow `backends`."""
    for part in module.modules():
        if isinstance(part, (CachedConv3d, ChannelRMSNorm, DoublingConv2d)):
            part.backends = backends


class CausalConv3d(CachedConv3d):
    """A 3x3x3 convolution over a frame and the two before it; zero padding in space, size kept."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))


class TemporalHalving(CachedConv3d):
    """Two frames become one, after the first frame, which passes unchanged but is remembered."""

    frames = 1

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(  # type: ignore[override]  # as in CachedConv3d
        self,
        x: Tensor,  # [B, C, T, H, W]
        cache: ChunkCache,
    ) -> Tensor:  # [B, C, 1 if first else T / 2, H, W]
        narrow = x.to(self.weight.dtype)
        if not cache.started:
            cache.remember(self.slot, narrow, 1)
            return x
        return super().forward(narrow, cache).to(x.dtype)


class TemporalDoubling(CachedConv3d):
    """One frame becomes two, after the first, which passes unchanged and is not remembered.

    Channels [0, C) of the convolution are the earlier frame of each pair, [C, 2C) the later one.
    """

    pairs = True

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 2 * channels, (3, 1, 1))

    def forward(  # type: ignore[override]  # as in CachedConv3d
        self,
        x: Tensor,  # [B, C, T, H, W]
        cache: ChunkCache,
    ) -> Tensor:  # [B, C, 1 if first else 2 T, H, W]
        if not cache.started:
            cache.forget(self.slot, x, 2)
            return x
        return super().forward(x, cache)


class DoublingConv2d(nn.Conv2d):
    """Twice the height and width (nearest), then a 3x3 convolution, of each image."""

    backends = Backends()

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,  # [N, Cin, H, W]
    ) -> Tensor:  # [N, Cout, 2 H, 2 W]
        return upsample_conv2d(x, self.weight, self.bias, backends=self.backends)


class Pointwise(nn.Conv3d):
    """A 1x1x1 convolution: a matrix product over channels."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(
        self,
        x: Tensor,  # [B, Cin, T, H, W]
    ) -> Tensor:  # [B, Cout, T, H, W]
        if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last_3d):
            return super().forward(x)
        # Channels-last rows go to the matrix library as they are; cuDNN's convolution copied them.
        rows = F.linear(x.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias)
        return rows.permute(0, 4, 1, 2, 3)


class ChannelRMSNorm(nn.Module):
    """RMSNorm over channels at every position, with SiLU unless told otherwise.

    The result has the dtype of the weights: a residual stream may be wider than the convolutions.
    """

    backends = Backends()

    def __init__(self, channels: int, *, video: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * (3 if video else 2)))

    def forward(
        self,
        x: Tensor,  # [B, C, T, H, W], or [B, C, H, W] if not video
        silu: bool = True,
        lead: Tensor | None = None,  # [B, C, P, H, W], put in front of the result
    ) -> Tensor:  # shape of x, with P frames more
        return rms_norm_silu(
            x, self.gamma, silu, out_dtype=self.gamma.dtype, lead=lead, backends=self.backends
        )
