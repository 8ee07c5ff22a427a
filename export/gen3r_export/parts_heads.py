"""VGGT's heads over the decoded token map: cameras, depth and point maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from gen3r.vggt.camera_head import POSE_SIZE, CameraHead
from gen3r.vggt.dense_head import CHUNK_GIB, DenseHead, chunk_frames
from gen3r.vggt.tokens import NUM_LISTS, token_views
from gen3r_export.graph import DimRange, Graph
from gen3r_export.parts import Request, whole


class Cameras(nn.Module):
    """Camera tokens to the last iteration's pose encodings."""

    def __init__(self, head: CameraHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, camera_tokens: Tensor) -> tuple[Tensor]:
        return (self.head(camera_tokens[:, :, None])[-1].float(),)


class DenseMaps(nn.Module):
    """Four lists of patch tokens to a value map and its confidence.

    step : frames at a time; None: all at once (their number is dynamic).
    """

    def __init__(self, head: DenseHead, height: int, width: int, step: int | None) -> None:
        super().__init__()
        self.head, self.step = head, step
        patch = head.config.patch_size
        self.grid = (height // patch, width // patch)
        device = next(head.parameters()).device
        # Made here, in float64: a graph shall hold the tables and not how they are computed.
        tables = head.positions(self.grid, width / height, device)
        for index, (across, down) in enumerate(tables):
            self.register_buffer(f"across_{index}", across, persistent=False)
            self.register_buffer(f"down_{index}", down, persistent=False)
        self.levels = len(tables)

    def forward(self, *layers: Tensor) -> tuple[Tensor, Tensor]:
        positions = [
            (self.get_buffer(f"across_{i}"), self.get_buffer(f"down_{i}"))
            for i in range(self.levels)
        ]
        batch, frames = layers[0].shape[:2]
        step = frames if self.step is None else self.step
        starts = [0] if self.step is None else range(0, frames, step)
        values, confidences = [], []
        for start in starts:
            flat = [
                (x if self.step is None else x[:, start : start + step]).flatten(0, 1)
                for x in layers
            ]
            found, confidence = self.head.decode(flat, self.grid, positions)
            values.append(found.unflatten(0, (batch, -1)))
            confidences.append(confidence.unflatten(0, (batch, -1)))
        return torch.cat(values, dim=1), torch.cat(confidences, dim=1)


def _frames(request: Request) -> tuple[int | str, dict[str, DimRange]]:
    """The axis of frames, any number where it is dynamic, and the dynamic axes."""
    least, most = request.frames
    if least == most:
        return most, request.dims
    return "frames", request.dims | {"frames": DimRange(least, most, most)}


def _views(request: Request, batch: int, frames: int) -> tuple[list[Tensor], Tensor]:
    """Example layers and camera tokens: one decoded token map, varied from frame to frame."""
    adapter = request.pipeline.geo_adapter
    with torch.no_grad():
        latents = request.normal((1, adapter.latent_channels, 1, *request.latent_size))
        one = adapter.decode_chunk(latents, adapter.decoder_cache())
    tokens = one * (1 + 0.1 * request.normal((batch, 1, frames, 1, 1)))
    layers, camera = token_views(tokens.permute(0, 2, 3, 4, 1).contiguous())
    return [layer.contiguous() for layer in layers], camera[:, :, 0].contiguous()


def camera_head(request: Request) -> Iterator[Graph]:
    """Camera tokens [B, F, 2 C] to pose encodings [B, F, 9] float32."""
    axis, dims = _frames(request)
    wide = 2 * request.pipeline.config.vggt.embed_dim
    tokens = request.spec("camera_tokens", request.batch, axis, wide)
    pose = request.spec("pose_encoding", request.batch, axis, POSE_SIZE, dtype="float32")

    def example(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
        batch, frames, _ = tokens.sizes(lengths)
        return (_views(request, batch, frames)[1],)

    module = Cameras(request.pipeline.vggt.camera_head)
    yield whole(request, "camera_head", module, [tokens], [pose], example, dims=dims)


def _dense(request: Request, part: str, head: DenseHead, value: str, channels: int) -> Graph:
    axis, dims = _frames(request)
    rows, columns = request.token_size
    wide = 2 * request.pipeline.config.vggt.embed_dim
    layers = [
        request.spec(f"layer_{i}", request.batch, axis, rows * columns, wide)
        for i in range(NUM_LISTS)
    ]
    size = (request.height, request.width)
    outputs = [
        request.spec(value, request.batch, axis, *size, channels, dtype="float32"),
        request.spec("confidence", request.batch, axis, *size, dtype="float32"),
    ]
    step = None
    if isinstance(axis, int):
        itemsize = request.dtype.itemsize * request.config.batch[1]
        step = chunk_frames(axis, *size, head.config.features, itemsize, CHUNK_GIB)

    def example(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
        batch, frames, *_ = layers[0].sizes(lengths)
        return tuple(_views(request, batch, frames)[0])

    module = DenseMaps(head, *size, step)
    return whole(request, part, module, layers, outputs, example, dims=dims)


def depth_head(request: Request) -> Iterator[Graph]:
    """Four layers of patch tokens to depth and confidence, float32."""
    yield _dense(request, "depth_head", request.pipeline.vggt.depth_head, "depth", 1)


def point_head(request: Request) -> Iterator[Graph]:
    """Four layers of patch tokens to point maps and confidence, float32."""
    yield _dense(request, "point_head", request.pipeline.vggt.point_head, "points", 3)
