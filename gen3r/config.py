"""Typed, frozen configuration of the six components, and the real preset GEN3R.

Field names follow upstream's config.json keys where those exist; sizes that upstream hard-codes are
fields here, with upstream's value as default, so that small models can be described as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

_APPEARANCE_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_APPEARANCE_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
_GEOMETRY_MEAN = (
    *(0.14257538, 0.18577661, 0.14208488, 0.06298031),
    *(0.09738383, -0.06001362, -0.04728968, -0.12326089),
    *(-0.04308648, -0.10522724, 0.08278389, -0.00270301),
    *(-0.09203526, 0.03170688, 0.11458898, 0.10679868),
)
_GEOMETRY_STD = (
    *(0.56929547, 0.61451489, 0.68560797, 0.78598368),
    *(0.51151282, 0.75570852, 0.80284864, 0.63438177),
    *(0.82458758, 0.59266430, 0.75781488, 0.70593017),
    *(0.70382243, 0.57837099, 0.73155540, 0.71971470),
)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


ENCODER_PRECISIONS = ("model", "mixed", "tf32", "float32")  # see `AppearanceVAE`


@dataclass(frozen=True)
class ComponentConfig:
    """What every component's config shares: reading from and writing to a config.json mapping."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a config.json mapping. Unknown keys are ignored (checkpoints carry more)."""
        names = {f.name for f in fields(cls)}
        return cls(**{k: _tuples(v) for k, v in values.items() if k in names and v is not None})

    def to_dict(self) -> dict[str, Any]:
        """A mapping of plain JSON values."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class TransformerConfig(ComponentConfig):
    """The diffusion transformer (Wan2.1-Fun-V1.1-1.3B-Control-Camera, widened to 36 channels).

    clip_dim is the width of the image features (upstream hard-codes 1280).
    """

    model_type: str = "i2v"
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_len: int = 512
    in_dim: int = 36
    dim: int = 1536
    ffn_dim: int = 8960
    freq_dim: int = 256
    text_dim: int = 4096
    out_dim: int = 16
    num_heads: int = 12
    num_layers: int = 30
    eps: float = 1e-6
    in_dim_control_adapter: int = 24
    clip_dim: int = 1280

    def __post_init__(self) -> None:
        _require(
            self.model_type == "i2v",
            f"transformer model_type '{self.model_type}' is not supported; Gen3R uses 'i2v'",
        )
        _require(
            self.dim % self.num_heads == 0 and (self.dim // self.num_heads) % 2 == 0,
            f"transformer dim {self.dim} must be an even multiple of num_heads {self.num_heads}",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class AppearanceVAEConfig(ComponentConfig):
    """The Wan2.1 VAE: 8x in space, 4x in time; latents are (mu - mean) / std."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = _APPEARANCE_MEAN
    latents_std: tuple[float, ...] = _APPEARANCE_STD

    def __post_init__(self) -> None:
        _check_statistics("appearance VAE", self.z_dim, self.latents_mean, self.latents_std)


@dataclass(frozen=True)
class GeometryAdapterConfig(ComponentConfig):
    """The geometry adapter: a causal VAE over VGGT token maps of H/14 x W/14.

    fixed_token_grid: token rows and columns that decoding always returns, whatever the latent size
    (upstream: 40 x 40); None follows the latent size (H/8 latents -> H/14 tokens).
    """

    latent_channels: int = 16
    hidden_dim: int = 128
    input_dim: int = 10240
    output_dim: int = 10240
    resample_scale: int = 10
    dim_mult: tuple[int, ...] = (4, 2, 1, 1)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    fixed_token_grid: tuple[int, int] | None = None
    latents_mean: tuple[float, ...] = _GEOMETRY_MEAN
    latents_std: tuple[float, ...] = _GEOMETRY_STD

    def __post_init__(self) -> None:
        _check_statistics(
            "geometry adapter", self.latent_channels, self.latents_mean, self.latents_std
        )


def _check_statistics(
    name: str, channels: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    _require(
        len(mean) == len(std) == channels,
        f"{name}: {len(mean)} latent means and {len(std)} deviations for {channels} channels",
    )


@dataclass(frozen=True)
class VGGTConfig(ComponentConfig):
    """VGGT-1B (arXiv 2503.11651): DINOv2 ViT-L/14, alternating attention, camera, dense heads."""

    img_size: int = 518
    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    vit_depth: int = 24
    vit_num_heads: int = 16
    trunk_depth: int = 4
    camera_num_heads: int = 16
    features: int = 256
    out_channels: tuple[int, ...] = (256, 512, 1024, 1024)
    intermediate_layer_idx: tuple[int, ...] = (4, 11, 17, 23)
    num_register_tokens: int = 4
    rope_freq: float = 100.0

    def __post_init__(self) -> None:
        _require(
            len(self.intermediate_layer_idx) == len(self.out_channels) == 4,
            "VGGT needs four intermediate_layer_idx and four out_channels",
        )
        _require(
            max(self.intermediate_layer_idx) < self.depth,
            f"VGGT intermediate_layer_idx {self.intermediate_layer_idx} exceed depth {self.depth}",
        )


@dataclass(frozen=True)
class TextEncoderConfig(ComponentConfig):
    """The umt5-xxl encoder (per-layer position bias unless shared_pos)."""

    vocab: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    shared_pos: bool = False

    def __post_init__(self) -> None:
        _require(not self.shared_pos, "text encoder shared_pos=True is not supported by UMT5")


@dataclass(frozen=True)
class ImageEncoderConfig(ComponentConfig):
    """The visual tower of CLIP ViT-H/14 (XLM-RoBERTa variant); its last block is not used."""

    image_size: int = 224
    patch_size: int = 14
    vision_dim: int = 1280
    vision_mlp_ratio: int = 4
    vision_heads: int = 16
    vision_layers: int = 32
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class Gen3RConfig:
    """All six components; `num_frames`, `size` and `guidance_scale` are a request's defaults."""

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    wan_vae: AppearanceVAEConfig = field(default_factory=AppearanceVAEConfig)
    geo_adapter: GeometryAdapterConfig = field(default_factory=GeometryAdapterConfig)
    vggt: VGGTConfig = field(default_factory=VGGTConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    clip_image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    num_frames: int = 49
    size: int = 560
    guidance_scale: float = 5.0

    def __post_init__(self) -> None:
        tokens = 5 * 2 * self.vggt.embed_dim
        _require(
            self.geo_adapter.input_dim == self.geo_adapter.output_dim == tokens,
            f"geometry adapter widths {self.geo_adapter.input_dim}, {self.geo_adapter.output_dim} "
            f"must be 10 * VGGT embed_dim = {tokens}",
        )
        _require(
            self.transformer.text_dim == self.text_encoder.dim,
            f"transformer text_dim {self.transformer.text_dim} is not the text encoder's width "
            f"{self.text_encoder.dim}",
        )
        _require(
            self.transformer.clip_dim == self.clip_image_encoder.vision_dim,
            f"transformer clip_dim {self.transformer.clip_dim} is not the image encoder's width "
            f"{self.clip_image_encoder.vision_dim}",
        )


OWN_VALUES = ("num_frames", "size", "guidance_scale")  # kept beside upstream's keys
GEN3R = Gen3RConfig()
