"""What both autoencoders do around their networks: scaled latents, the walk over the chunks.

Latents are scaled means and log variances are not rescaled (behaviour number 4). The encoder drops
frames beyond 4k+1, and the first latent frame decodes to one frame (behaviour number 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Self, cast

import torch
from torch import Tensor, nn

from gen3r.causal_layers import ChunkCache, use_backends
from gen3r.causal_vae import CausalVAE
from gen3r.causal_video import Posterior
from gen3r_kernels import Backends

LOGVAR_RANGE = (-30.0, 20.0)
WORKING_GIB = 4.5  # of activations, where the caller names no limit
LIVE = 3  # activations of the largest size at a time: a block's input, its norm, its convolution


class VideoAutoencoder(nn.Module):
    """Scaling of latents and the walk over the chunks of a clip.

    The latent statistics are constants of the configuration, not buffers. As upstream does, the
    mean and the reciprocal of the deviation are rounded to the dtype of the tensor that they meet.
    """

    def __init__(
        self,
        model: CausalVAE,
        latents_mean: tuple[float, ...],
        latents_std: tuple[float, ...],
        temporal: tuple[bool, ...],
        backends: Backends,
    ) -> None:
        super().__init__()
        self.model = model
        self.backends = backends
        use_backends(model, backends)
        arrange_weights(self)
        self.register_load_state_dict_post_hook(_arrange_after_loading)
        self.latents_mean = latents_mean
        self.latents_std = latents_std
        self._kept: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None
        self.temporal_factor = 2 ** sum(temporal)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.cuda()`, `.bfloat16()` and the like go through."""
        module = super()._apply(fn, recurse)
        arrange_weights(self)
        return module

    @property
    def latent_channels(self) -> int:
        return len(self.latents_mean)

    def encoder_cache(self) -> ChunkCache:
        """An empty cache for `encode_chunk`: one per clip."""
        return ChunkCache(self.model.encoder_slots)

    def decoder_cache(self) -> ChunkCache:
        """An empty cache for `decode_chunk`: one per clip."""
        return ChunkCache(self.model.decoder_slots)

    def encode_chunk(
        self,
        x: Tensor,  # [B, C, T, H, W]: T = 1 for a fresh cache, else a multiple of factor
        cache: ChunkCache,
    ) -> Posterior:  # of [B, z, 1 or T / factor, h, w]
        """The posterior of the clip's next frames.

        Raises
        ------
        ValueError : a number of frames that cannot follow.
        """
        return self.posterior(self._moments_chunk(x, cache))

    def decode_chunk(
        self,
        latents: Tensor,  # [B, z, t, h, w], scaled: t = 1 for a fresh cache, else any number
        cache: ChunkCache,
    ) -> Tensor:  # [B, C, 1 or t * factor, H, W]
        """The clip's next frames.

        Raises
        ------
        ValueError : more than one latent frame for a fresh cache.
        """
        if not cache.started and latents.shape[2] != 1:
            raise ValueError(
                f"the first chunk to decode has {latents.shape[2]} latent frames; it must have 1"
            )
        latents = arranged(self.unscale(latents), self.backends)
        return self._finish(self.model.decode_chunk(latents, cache))

    def moments(
        self,
        x: Tensor,  # [B, C, T, H, W]
        working_gib: float = WORKING_GIB,
    ) -> Tensor:  # [B, 2 z, 1 + (T - 1) // factor, h, w]: mu (unscaled), then logvar (unclamped)
        """What the encoder computes, before scaling. Frames beyond 1 + factor * k are dropped.

        working_gib : memory for activations; it sets the frames of a chunk (`chunk_frames`).

        Raises
        ------
        ValueError : x is not five-dimensional or has no frames.
        """
        _check_clip("frames", x)
        cache = self.encoder_cache()
        count = 1 + (x.shape[2] - 1) // self.temporal_factor
        height, width = self.latent_size(x.shape[3], x.shape[4])
        step = self.chunk_frames(count, len(x), height, width, working_gib, decoding=False)
        pieces = self._walk(
            count, step, cache, lambda a, b: self._moments_chunk(x[:, :, self._frames(a, b)], cache)
        )
        return _join(pieces, count)

    def encode(
        self,
        x: Tensor,  # [B, C, T, H, W]
        working_gib: float = WORKING_GIB,
    ) -> Posterior:  # of [B, z, 1 + (T - 1) // factor, h, w]
        """The posterior of a clip. Frames beyond 1 + factor * k are dropped.

        Arguments and errors as `moments`.
        """
        return self.posterior(self.moments(x, working_gib))

    def decode(
        self,
        latents: Tensor,  # [B, z, t, h, w], scaled
        working_gib: float = WORKING_GIB,
    ) -> Tensor:  # [B, C, 1 + (t - 1) * factor, H, W]
        """The clip of scaled latents.

        working_gib : memory for activations; it sets the latent frames of a chunk (`chunk_frames`).

        Raises
        ------
        ValueError : latents are not [B, z, t, h, w] with t > 0.
        """
        _check_clip("latents", latents)
        if latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have {latents.shape[1]} channels; this model has {self.latent_channels}"
            )
        cache = self.decoder_cache()
        batch, _, count, height, width = latents.shape
        step = self.chunk_frames(count, batch, height, width, working_gib, decoding=True)
        pieces = self._walk(
            count, step, cache, lambda a, b: self.decode_chunk(latents[:, :, a:b], cache)
        )
        return _join(pieces, 1 + (count - 1) * self.temporal_factor)

    # What the convolutions remember between chunks, in activations of the largest size.
    remembered: float = 1.0

    def largest_activation(self, height: int, width: int, *, decoding: bool) -> int:
        """Values of the largest activation of one latent frame of height x width (its `factor`
        video frames), a sample."""
        raise NotImplementedError

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent rows and columns of frames (or token maps) of this size."""
        raise NotImplementedError

    def chunk_frames(
        self,
        count: int,
        batch: int,
        height: int,
        width: int,
        working_gib: float,
        *,
        decoding: bool,
    ) -> int:
        """Latent frames a chunk for `batch` clips of `count` latent frames [height, width]; >= 1.

        Chunks of equal length, the fewest whose activations stay within `working_gib` GiB with what
        the convolutions remember between chunks. Where one frame takes more, a chunk has one frame.
        """
        part = self.model.decoder if decoding else self.model.encoder
        bytes_each = next(part.parameters()).element_size() * batch
        unit = self.largest_activation(height, width, decoding=decoding) * bytes_each / 2**30
        fitting = int((working_gib / unit - self.remembered) / LIVE)
        rest = max(1, count - 1)
        chunks = -(-rest // max(1, fitting))
        return -(-rest // chunks)

    def _walk(
        self,
        count: int,  # latent frames
        step: int,
        cache: ChunkCache,
        run: Callable[[int, int], Tensor],  # of latent frames [a, b)
    ) -> Iterator[Tensor]:
        """One latent frame, then `step` at a time; nothing is remembered of the last chunk."""
        edges = [0, *range(1, count, step), count]
        for a, b in pairwise(edges):
            cache.last = b == count
            yield run(a, b)

    def _frames(self, a: int, b: int) -> slice:
        """Video frames of latent frames [a, b)."""
        factor = self.temporal_factor
        return slice(max(0, 1 + (a - 1) * factor), 1 + (b - 1) * factor)

    def posterior(
        self,
        moments: Tensor,  # [B, 2 z, t, h, w]
    ) -> Posterior:
        """Scale the means, clamp the log variances."""
        mu, logvar = moments.chunk(2, dim=1)
        return Posterior(self.scale(mu), logvar.clamp(*LOGVAR_RANGE))

    def scale(
        self,
        mu: Tensor,  # [B, z, t, h, w]
    ) -> Tensor:  # [B, z, t, h, w]
        """(mu - mean) / std."""
        mean, reciprocal = self._statistics(mu)
        return (mu - mean) * reciprocal

    def unscale(
        self,
        latents: Tensor,  # [B, z, t, h, w]
    ) -> Tensor:  # [B, z, t, h, w]
        """latents * std + mean."""
        mean, reciprocal = self._statistics(latents)
        return latents / reciprocal + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / std as [z, 1, 1, 1] in the dtype and on the device of `like`.

        Kept for the next call: a CUDA graph cannot hold their copy from the host.
        """
        key = (self.latents_mean, self.latents_std, like.dtype, like.device)
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        mean = torch.tensor(self.latents_mean, dtype=torch.float32)
        reciprocal = 1.0 / torch.tensor(self.latents_std, dtype=torch.float32)
        made = mean.to(like).view(-1, 1, 1, 1), reciprocal.to(like).view(-1, 1, 1, 1)
        if type(like) is Tensor and not torch.compiler.is_compiling():  # no tracer's stand-in
            self._kept = key, made
        return made

    def _moments_chunk(self, x: Tensor, cache: ChunkCache) -> Tensor:
        frames = x.shape[2]
        if not cache.started and frames != 1:
            raise ValueError(f"the first chunk to encode has {frames} frames; it must have 1")
        if cache.started and (frames == 0 or frames % self.temporal_factor):
            raise ValueError(
                f"a chunk to encode has {frames} frames; after the first it must have a "
                f"multiple of {self.temporal_factor}"
            )
        return self.model.encode_chunk(arranged(x, self.backends), cache)

    def _finish(self, frames: Tensor) -> Tensor:
        """What follows the decoder on every frame; nothing by default."""
        return frames


def memory_format(
    x: Tensor, backends: Backends, device: torch.device | None = None
) -> torch.memory_format | None:
    """The memory format in which an autoencoder holds x (4 or 5 axes); None: as it is.

    Where the kernels run (``operators``: see `Backends`) activations and weights are channels-last,
    as the kernels read them. device : where x is used; None: where it is.
    """
    cuda = (x.device if device is None else device).type == "cuda"
    half = cuda and x.dtype in (torch.bfloat16, torch.float16)
    if backends.operators == "reference" or (backends.operators == "auto" and not half):
        return None
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())


def arranged(x: Tensor, backends: Backends, device: torch.device | None = None) -> Tensor:
    """x in its `memory_format`; every layer keeps it."""
    wanted = memory_format(x, backends, device)
    return x if wanted is None else x.contiguous(memory_format=wanted)


def arrange_weights(model: VideoAutoencoder, device: torch.device | None = None) -> None:
    """Put the weights into the memory format in which they are used on `device`, once.

    device : None stands for where they are.
    """
    for parameter in model.parameters():
        if memory_format(parameter, model.backends, device) is not None:
            parameter.data = arranged(parameter.data, model.backends, device)


def _arrange_after_loading(module: nn.Module, incompatible: object) -> None:
    arrange_weights(cast(VideoAutoencoder, module))


def _check_clip(what: str, x: Tensor) -> None:
    if x.dim() != 5 or x.shape[2] == 0:
        raise ValueError(
            f"{what} of shape {tuple(x.shape)}; expected [batch, channels, frames, height, width] "
            "with at least one frame"
        )


def _format_of(x: Tensor) -> torch.memory_format:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if last else torch.contiguous_format


def _join(pieces: Iterable[Tensor], frames: int) -> Tensor:
    """Concatenate along time.

    Without autograd each piece is written straight into the result, so that the pieces and the
    result are never held together: the tokens of 49 frames at 560x560 are 1.6 GB in bf16.
    """
    if torch.is_grad_enabled():
        return torch.cat(list(pieces), dim=2)
    result: Tensor | None = None
    start = 0
    for piece in pieces:
        if result is None:
            result = torch.empty(
                (*piece.shape[:2], frames, *piece.shape[3:]),
                dtype=piece.dtype,
                device=piece.device,
                memory_format=_format_of(piece),
            )
        result[:, :, start : start + piece.shape[2]] = piece
        start += piece.shape[2]
    if result is None:
        raise ValueError("there are no frames to join")
    return result
