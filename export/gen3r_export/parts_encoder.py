"""The text encoder (UMT5) and the image encoder (CLIP)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, UMT5EncoderModel

from gen3r_export.graph import DimRange, Graph
from gen3r_export.parts import Request, whole

LEAST_TOKENS = 2  # an axis of length 1 cannot be traced as a dynamic one; shorter texts are padded


class TextEncoder(nn.Module):
    """Token ids and mask to features after the final norm, padding positions included."""

    def __init__(self, model: UMT5EncoderModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        # Already as the layers add it to their position bias: made by transformers from two axes it
        # would be gathered by tables of indices.
        dtype = self.model.shared.weight.dtype
        added = (1 - attention_mask[:, None, None, :]).to(dtype) * torch.finfo(dtype).min
        found = self.model(input_ids=input_ids, attention_mask=added)
        return (found.last_hidden_state,)


class ImageEncoder(nn.Module):
    """Normalised pixels to class and patch tokens before the last block."""

    def __init__(self, model: CLIPVisionModel) -> None:
        super().__init__()
        self.embeddings, self.norm = model.embeddings, model.pre_layrnorm
        self.blocks = nn.ModuleList(list(model.encoder.layers)[:-1])

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        x = self.norm(self.embeddings(pixels))
        for block in self.blocks:
            x = block(x, attention_mask=None)
        return (x,)


def text_encoder(request: Request) -> Iterator[Graph]:
    """Token ids [B, n] and mask to features [B, n, C]."""
    own = request.pipeline.config
    longest = own.transformer.text_len
    dims = request.dims | {"tokens": DimRange(LEAST_TOKENS, longest, longest)}
    ids = [
        request.spec(name, request.batch, "tokens", dtype="int64")
        for name in ("input_ids", "attention_mask")
    ]
    features = request.spec("features", request.batch, "tokens", own.text_encoder.dim)

    def example(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
        size = ids[0].sizes(lengths)
        generator = torch.Generator().manual_seed(8)
        tokens = torch.randint(own.text_encoder.vocab, size, generator=generator)
        mask = torch.ones(size, dtype=torch.int64)
        mask[:, max(1, size[1] * 3 // 4) :] = 0
        device = request.pipeline.device
        return tokens.to(device), mask.to(device)

    module = TextEncoder(request.pipeline.text_encoder)
    yield whole(request, "text_encoder", module, ids, [features], example, dims=dims)


def image_encoder(request: Request) -> Iterator[Graph]:
    """Pixels [B, 3, S, S] to features [B, 1 + patches, C]."""
    own = request.pipeline.config.clip_image_encoder
    side, patches = own.image_size, (own.image_size // own.patch_size) ** 2
    pixels = request.spec("pixels", request.batch, 3, side, side)
    features = request.spec("features", request.batch, 1 + patches, own.vision_dim)

    def example(lengths: Mapping[str, int]) -> tuple[Tensor, ...]:
        return (request.normal(pixels.sizes(lengths)),)

    module = ImageEncoder(request.pipeline.clip_image_encoder)
    yield whole(request, "image_encoder", module, [pixels], [features], example, dims=request.dims)
