"""The text encoder (UMT5) and the image encoder (CLIP ViT), both from transformers.

Upstream's Wan T5 and CLIP towers are these architectures under other parameter names
(`gen3r.encoder_keys`). A module that was built on the meta device and filled tensor by tensor is
completed by `finish`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from gen3r.config import ImageEncoderConfig, TextEncoderConfig
from gen3r.encoder_keys import IMAGE_KEY_MAP, TEXT_KEY_MAP

MAX_DISTANCE = 128  # tokens; farther ones share the last position bucket
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def build_text_encoder(config: TextEncoderConfig) -> UMT5EncoderModel:
    """UMT5 encoder (gated tanh-GELU, position bias per layer), on the default device or meta.

    Raises
    ------
    ValueError : an attention width that is not a multiple of the heads.
    """
    if config.dim_attn % config.num_heads:
        raise ValueError(
            f"text encoder dim_attn {config.dim_attn} is not a multiple of its "
            f"{config.num_heads} heads"
        )
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab,
            d_model=config.dim,
            d_kv=config.dim_attn // config.num_heads,
            d_ff=config.dim_ffn,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=MAX_DISTANCE,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            layer_norm_epsilon=1e-6,
            attn_implementation="sdpa",
        )
    ).eval()


def build_image_encoder(config: ImageEncoderConfig) -> CLIPVisionModel:
    """CLIP vision tower (exact GELU), on the default device or meta.

    The last block and the final norm are there, so that a checkpoint can be saved again, but
    `encode_image` does not run them.
    """
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.vision_dim,
            intermediate_size=config.vision_mlp_ratio * config.vision_dim,
            num_hidden_layers=config.vision_layers,
            num_attention_heads=config.vision_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="gelu",
            layer_norm_eps=config.norm_eps,
            attention_dropout=0.0,
            attn_implementation="sdpa",
        )
    ).eval()


def finish(model: UMT5EncoderModel | CLIPVisionModel) -> None:
    """Complete a model that was built on meta and then filled: tie shared weights, compute buffers.

    Buffers go to the device of the weights. Calling it on a complete model changes nothing.
    """
    if isinstance(model, UMT5EncoderModel):
        model.encoder.embed_tokens.weight = model.shared.weight
    else:
        embeddings = model.embeddings
        embeddings.position_ids = torch.arange(
            embeddings.num_positions, device=embeddings.position_embedding.weight.device
        )[None]


def expected_text_tensors(config: TextEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Upstream names and shapes of the text encoder's checkpoint."""
    with torch.device("meta"):
        return TEXT_KEY_MAP.expected(build_text_encoder(config))


def expected_image_tensors(config: ImageEncoderConfig) -> dict[str, tuple[int, ...]]:
    """Upstream names and shapes of the image encoder's checkpoint, without its unused tensors."""
    with torch.device("meta"):
        return IMAGE_KEY_MAP.expected(build_image_encoder(config))


def text_encoder_from_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's state dict under transformers' names. ValueError for an unexpected name."""
    return TEXT_KEY_MAP.state_from_upstream(state)


def text_encoder_to_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`UMT5EncoderModel.state_dict()` under upstream's names."""
    return TEXT_KEY_MAP.state_to_upstream(state)


def image_encoder_from_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's state dict under transformers' names; text tower and projection are dropped."""
    return IMAGE_KEY_MAP.state_from_upstream(state)


def image_encoder_to_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`CLIPVisionModel.state_dict()` under upstream's names (visual tower, without projection)."""
    return IMAGE_KEY_MAP.state_to_upstream(state)


@torch.no_grad()
def encode_text(
    model: UMT5EncoderModel,
    input_ids: Tensor,  # [B, L] int64
    attention_mask: Tensor,  # [B, L] 1 for tokens, 0 for padding
) -> Tensor:  # [B, L, C] in the dtype of the weights
    """Token features after the final norm, padding positions included."""
    return model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def tokenize_and_encode(
    tokenizer: Any,
    model: UMT5EncoderModel,
    prompts: Sequence[str],
    max_length: int,
) -> list[Tensor]:  # one [n_i, C] per prompt, n_i = tokens with the end token, at most max_length
    """Text features of every prompt, unpadded (behaviour 3: zeros are added after the encoder).

    Columns that are padding in every prompt are not computed: padding keys get a weight of exactly
    zero and the position bias is relative, so the tokens' features do not depend on them.
    """
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=max_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask: Tensor = tokens["attention_mask"]
    used = max(1, int(mask.any(0).nonzero().max()) + 1) if bool(mask.any()) else 1
    device = model.shared.weight.device
    features = encode_text(
        model, tokens["input_ids"][:, :used].to(device), mask[:, :used].to(device)
    )
    return [row[:n] for row, n in zip(features, mask.sum(1).tolist(), strict=True)]


def to_uint8(
    images: Tensor,  # [..., 3, H, W] float in [0, 1]
) -> Tensor:  # same shape, uint8
    """Truncate to bytes, as upstream does on the way into CLIP (behaviour 12)."""
    return (images.float() * 255).clamp(0, 255).to(torch.uint8)


def preprocess_clip(
    image_u8: Tensor,  # [B, 3, H, W] uint8
    image_size: int = 224,
) -> Tensor:  # [B, 3, image_size, image_size] float32
    """Bicubic resize without antialiasing to a square, then CLIP's normalisation (behaviour 12).

    Raises
    ------
    ValueError : not uint8 [B, 3, H, W].
    """
    if image_u8.dtype != torch.uint8 or image_u8.ndim != 4 or image_u8.shape[1] != 3:
        raise ValueError(
            f"preprocess_clip takes uint8 [B, 3, H, W], got {image_u8.dtype} "
            f"{list(image_u8.shape)}; convert with to_uint8"
        )
    pixels = F.interpolate(image_u8.float() / 255, (image_size, image_size), mode="bicubic")
    mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


@torch.no_grad()
def encode_image(
    model: CLIPVisionModel,
    pixels: Tensor,  # [B, 3, S, S] from `preprocess_clip`
) -> Tensor:  # [B, 1 + patches, C] in the dtype of the weights
    """Class and patch tokens before the last block; that block and the final norm are not run."""
    x = model.pre_layrnorm(model.embeddings(pixels))
    blocks: Sequence[nn.Module] = list(model.encoder.layers)[:-1]
    for block in blocks:
        x = block(x, attention_mask=None)
    return x
