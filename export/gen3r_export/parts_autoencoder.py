"""The encoders and decoders of the two video autoencoders: whole clips, and chunks with a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from gen3r.causal_layers import ChunkCache
from gen3r.video_autoencoder import VideoAutoencoder
from gen3r_export.graph import DimRange, Graph, TensorSpec
from gen3r_export.parts import Request, whole

Walk = Callable[[VideoAutoencoder, Tensor, ChunkCache], tuple[Tensor, ...]]


def _decode(model: VideoAutoencoder, latents: Tensor, cache: ChunkCache) -> tuple[Tensor, ...]:
    return (model.decode_chunk(latents, cache),)


def _encode(model: VideoAutoencoder, frames: Tensor, cache: ChunkCache) -> tuple[Tensor, ...]:
    posterior = model.encode_chunk(frames, cache)
    return posterior.mean, posterior.logvar


class Chunk(nn.Module):
    """One chunk of a clip: frames or latents and the cache in, results and the cache out.

    fresh : the first chunk, of one frame, without a cache.
    """

    def __init__(self, model: VideoAutoencoder, walk: Walk, *, fresh: bool, slots: int) -> None:
        super().__init__()
        self.model, self.walk, self.fresh, self.slots = model, walk, fresh, slots

    def forward(self, x: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        kept = ChunkCache(self.slots) if self.fresh else ChunkCache.from_tensors(cache)
        return (*self.walk(self.model, x, kept), *kept.flatten())


class Clip(nn.Module):
    """A whole clip: the first frame, then pieces of `step` latent frames, joined.

    factor : frames of x that a latent frame stands for (1 for latents). step : None for one piece,
    whatever the clip's length.
    """

    def __init__(
        self, model: VideoAutoencoder, walk: Walk, *, slots: int, factor: int, step: int | None
    ) -> None:
        super().__init__()
        self.model, self.walk, self.slots = model, walk, slots
        self.factor, self.step = factor, step

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        cache = ChunkCache(self.slots)
        pieces = [self.walk(self.model, x[:, :, :1], cache)]
        rest = x[:, :, 1:]
        chunks: tuple[Tensor, ...] = (rest,)
        if self.step is not None:
            chunks = rest.split(self.step * self.factor, dim=2) if rest.shape[2] else ()
        for index, chunk in enumerate(chunks):
            cache.last = index == len(chunks) - 1
            pieces.append(self.walk(self.model, chunk, cache))
        return tuple(torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))


def _shapes_of(module: nn.Module, size: tuple[int, ...]) -> tuple[Tensor, ...]:
    """What a module gives for an input of this size, without values: nothing is computed."""
    tensors = {name: p.to("meta") for name, p in module.named_parameters()}
    dtype = next(iter(tensors.values())).dtype
    with torch.no_grad():
        blank = torch.empty(size, dtype=dtype, device="meta")
        found = torch.func.functional_call(module, tensors, (blank,))
    return tuple(found)


class _Side:
    """One direction of one autoencoder: its names, shapes, and how its graphs are made.

    Sizes: x is what goes in, y what comes out; a latent frame has `factor` frames of the video.
    """

    def __init__(self, request: Request, part: str) -> None:
        self.request, self.part = request, part
        pipeline = request.pipeline
        appearance = part.startswith("vae")
        self.decoding = part.endswith("decoder")
        self.model = cast(
            VideoAutoencoder, pipeline.wan_vae if appearance else pipeline.geo_adapter
        )
        inside = self.model.model
        self.slots = inside.decoder_slots if self.decoding else inside.encoder_slots
        self.walk: Walk = _decode if self.decoding else _encode
        self.factor = self.model.temporal_factor
        width = 3 if appearance else pipeline.config.geo_adapter.output_dim
        size = (request.height, request.width) if appearance else request.token_size
        self.frames = ("video" if appearance else "tokens", width, *size)
        self.latents = ("latents", self.model.latent_channels, *request.latent_size)

    def specs(
        self, batch: int | str, video: int | str, latent: int | str
    ) -> tuple[TensorSpec, list[TensorSpec]]:
        """Input and results (without caches) of so many video and latent frames."""
        request = self.request
        name, channels, *size = self.latents
        seen, width, *side = self.frames
        clip = request.spec(seen, batch, width, video, *side)
        if self.decoding:
            return request.spec(name, batch, channels, latent, *size), [clip]
        moments = [
            request.spec(what, batch, channels, latent, *size) for what in ("mean", "logvar")
        ]
        return clip, moments

    def draw(self, batch: int, frames: int) -> Tensor:
        """An example of x: unit normal latents, video in [-1, 1], tokens decoded from latents."""
        request, model = self.request, self.model
        _, channels, *size = self.latents
        if self.decoding:
            return request.normal((batch, channels, frames, *size))
        kind, width, *side = self.frames
        if kind == "video":
            return request.normal((batch, width, frames, *side)).clamp(-2, 2) / 2
        with torch.no_grad():
            latents = request.normal((1, channels, 1, *size))
            one = model.decode_chunk(latents, model.decoder_cache())
        return one * (1 + 0.1 * request.normal((batch, 1, frames, 1, 1)))

    # -------------------------------------------------------------------------------------- graphs

    def clip(self) -> Graph:
        """The graph of a whole clip."""
        request, model = self.request, self.model
        dynamic = "k" in request.clip_dims
        latents = request.most_latents
        size = request.latent_size if self.decoding else (self.frames[2], self.frames[3])
        rows, columns = size if self.decoding else model.latent_size(*size)
        step = model.chunk_frames(
            latents,
            request.config.batch[1],
            rows,
            columns,
            request.config.working_gib,
            decoding=self.decoding,
        )
        module = Clip(
            model,
            self.walk,
            slots=self.slots,
            factor=1 if self.decoding else self.factor,
            step=None if dynamic else step,
        )
        x, results = self.specs(request.batch, request.clip_axis(self.factor), request.clip_axis(1))

        def example(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
            sizes = x.sizes(lengths)
            return (self.draw(sizes[0], sizes[2]),)

        return whole(request, self.part, module, [x], results, example, form="clip")

    def chunks(self) -> Iterator[Graph]:
        """The graphs of the first frame and of the following chunks."""
        request = self.request
        first = Chunk(self.model, self.walk, fresh=True, slots=self.slots)
        x, results = self.specs(request.batch, 1, 1)

        def fresh(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
            return (self.draw(x.sizes(lengths)[0], 1),)

        kept = _shapes_of(first, x.sizes({name: 1 for name in request.dims}))[len(results) :]
        caches = [
            request.spec(f"cache_{i}", request.batch, *c.shape[1:]) for i, c in enumerate(kept)
        ]
        out = [request.spec(f"cache_out_{i}", *c.shape) for i, c in enumerate(caches)]
        yield whole(
            request, self.part, first, [x], [*results, *out], fresh, form="first", dims=request.dims
        )
        if request.most_latents > 1:
            yield self._next(first, caches, out)

    def _next(self, first: Chunk, caches: list[TensorSpec], out: list[TensorSpec]) -> Graph:
        request, model = self.request, self.model
        most = model.chunk_frames(
            request.most_latents,
            request.config.batch[1],
            *request.latent_size,
            request.config.working_gib,
            decoding=self.decoding,
        )
        dims = request.dims | ({"frames": DimRange(1, most, most)} if most > 1 else {})
        latent: int | str = "frames" if most > 1 else 1
        video: int | str = f"{self.factor}*frames" if most > 1 else self.factor
        x, results = self.specs(request.batch, video, latent)
        module = Chunk(model, self.walk, fresh=False, slots=self.slots)

        def example(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
            batch, _, frames, *_ = x.sizes(lengths)
            with torch.no_grad():
                kept = first(self.draw(batch, 1))[-self.slots :]
            return (self.draw(batch, frames), *kept)

        return whole(
            request,
            self.part,
            module,
            [x, *caches],
            [*results, *out],
            example,
            form="next",
            dims=dims,
        )

    def graphs(self) -> Iterator[Graph]:
        """What the config asks for."""
        form = self.request.config.form
        if form != "chunk":
            yield self.clip()
        if form != "clip":
            yield from self.chunks()


def vae_encoder(request: Request) -> Iterator[Graph]:
    """Video in [-1, 1] to mean and log variance of the appearance latents."""
    return _Side(request, "vae_encoder").graphs()


def vae_decoder(request: Request) -> Iterator[Graph]:
    """Appearance latents to video in [-1, 1]."""
    return _Side(request, "vae_decoder").graphs()


def adapter_encoder(request: Request) -> Iterator[Graph]:
    """Token maps to mean and log variance of the geometry latents."""
    return _Side(request, "adapter_encoder").graphs()


def adapter_decoder(request: Request) -> Iterator[Graph]:
    """Geometry latents to token maps."""
    return _Side(request, "adapter_decoder").graphs()
