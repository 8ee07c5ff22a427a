"""The six components of a checkpoint: how each is built, named and stored.

Class names, libraries and config keys are upstream's, so that a saved folder has the published
layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gen3r import encoders
from gen3r.appearance_vae import AppearanceVAE
from gen3r.config import (
    AppearanceVAEConfig,
    ComponentConfig,
    GeometryAdapterConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VGGTConfig,
)
from gen3r.encoder_keys import IMAGE_KEY_MAP, TEXT_KEY_MAP, KeyMap
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.transformer import WanTransformer
from gen3r.vggt import VGGT
from gen3r_kernels import Backends


@dataclass(frozen=True)
class Component:
    """How one component is built and stored.

    tolerated : beginnings of tensor names that may be there and are not loaded.
    prefix : put before a file's names when none of them has it (standalone files).
    keys : for modules from transformers, the map from upstream's names.
    upstream_keys : keys that upstream's config.json has; others are written only when they differ
        from upstream's hard-coded values.
    extra_json : further constants of upstream's config.json.
    """

    name: str
    config: type[ComponentConfig]
    build: Callable[[Any, Backends], nn.Module]
    class_name: str
    library: str
    tolerated: tuple[str, ...] = ()
    prefix: str = ""
    keys: KeyMap | None = None
    file_stem: str = "diffusion_pytorch_model"
    upstream_keys: tuple[str, ...] = ()
    extra_json: Mapping[str, Any] = field(default_factory=dict)

    def expected(self, config: ComponentConfig) -> dict[str, tuple[int, ...]]:
        """Upstream names and shapes of every tensor that must be there."""
        with torch.device("meta"):
            module = self.build(config, Backends())
        if self.keys is not None:
            return self.keys.expected(module)
        return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    def is_tolerated(self, name: str) -> bool:
        unused = self.keys is not None and self.keys.is_unused(name)
        return unused or name.startswith(self.tolerated)


def _text(config: TextEncoderConfig, backends: Backends) -> nn.Module:
    return encoders.build_text_encoder(config)


def _image(config: ImageEncoderConfig, backends: Backends) -> nn.Module:
    return encoders.build_image_encoder(config)


_WAN = "gen3r.models.videoxfun_wan"
COMPONENTS: dict[str, Component] = {
    c.name: c
    for c in (
        Component(
            "transformer",
            TransformerConfig,
            WanTransformer,
            "WanTransformer3DModel",
            f"{_WAN}.wan_transformer3d",
            tolerated=("ref_conv.",),
            upstream_keys=(
                *("model_type", "patch_size", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim"),
                *("text_dim", "out_dim", "num_heads", "num_layers", "eps"),
                "in_dim_control_adapter",
            ),
            extra_json={
                **{"qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1]},
                **{"add_control_adapter": True, "add_ref_conv": False, "in_dim_ref_conv": 16},
            },
        ),
        Component(
            "wan_vae",
            AppearanceVAEConfig,
            AppearanceVAE,
            "AutoencoderKLWan",
            f"{_WAN}.wan_vae",
            prefix="model.",
            extra_json={
                **{"latent_channels": 16, "temporal_compression_ratio": 4},
                "spacial_compression_ratio": 8,
            },
        ),
        Component(
            "geo_adapter",
            GeometryAdapterConfig,
            GeometryAdapter,
            "GeometryAdapter",
            "gen3r.models.geometry_adapter.geometry_adapter",
            tolerated=("model.mean", "model.std"),
            prefix="model.",
            upstream_keys=(
                *("latent_channels", "hidden_dim", "input_dim", "output_dim"),
                "resample_scale",
            ),
            extra_json={"temporal_compression_ratio": 4, "spatial_compression_ratio": 8},
        ),
        Component(
            "vggt",
            VGGTConfig,
            VGGT,
            "VGGT",
            "gen3r.models.vggt.models.vggt",
            tolerated=("track_head.", "aggregator._resnet_"),
            file_stem="model",
            upstream_keys=("img_size", "patch_size", "embed_dim"),
        ),
        Component(
            "text_encoder",
            TextEncoderConfig,
            _text,
            "WanT5EncoderModel",
            f"{_WAN}.wan_text_encoder",
            keys=TEXT_KEY_MAP,
            upstream_keys=(
                *("vocab", "dim", "dim_attn", "dim_ffn", "num_heads", "num_layers"),
                *("num_buckets", "shared_pos"),
            ),
            extra_json={"dropout_p": 0.0},
        ),
        Component(
            "clip_image_encoder",
            ImageEncoderConfig,
            _image,
            "CLIPModel",
            f"{_WAN}.wan_image_encoder",
            prefix="model.",
            keys=IMAGE_KEY_MAP,
        ),
    )
}
