"""Floating-point operations of a training step, for model FLOP utilisation (MFU).

Counted is what the mathematics needs: one forward, and for what is trained or lies between it and
the loss the backward; not what is computed again to save memory (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gen3r import stages
from gen3r.appearance_vae import AppearanceVAE
from gen3r.config import (
    AppearanceVAEConfig,
    GeometryAdapterConfig,
    TransformerConfig,
    VGGTConfig,
)
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.vggt import VGGT, token_views
from gen3r_kernels import Backends
from gen3r_training.adapter import vggt_token_maps

IMAGE_TOKENS = 257
# Dense bf16 products without sparsity, in FLOP/s, from the vendors' data sheets; names as CUDA
# gives them, the more special first.
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("H20", 148e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
)


def peak_flops(device: torch.device) -> float | None:
    """bf16 FLOP/s of a device by its data sheet; None for a CPU and for GPUs not listed here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


def tokens(config: TransformerConfig, frames: int, size: int) -> int:
    """S: tokens of the joint latents of frames x size x size pixels."""
    shape = stages.latent_shape(frames, size, size)
    return math.prod(shape[1:]) // math.prod(config.patch_size)


def transformer_forward_flops(config: TransformerConfig, frames: int, size: int) -> int:
    """One forward of one sample of frames x size x size pixels; 271 TFLOP at 49 x 560 x 560."""
    s = tokens(config, frames, size)
    c, context = config.dim, config.text_len + IMAGE_TOKENS
    linears = 2 * s * c * (6 * c + 2 * config.ffn_dim)  # q, k, v, o, cross q and o, two of the ffn
    keys_values = 2 * context * c * 2 * c
    block = 4 * s * s * c + linears + 4 * s * context * c + keys_values
    ends = 2 * s * c * math.prod(config.patch_size) * (config.in_dim + config.out_dim)
    return config.num_layers * block + ends


def diffusion_flops(config: TransformerConfig, frames: int, size: int) -> float:
    """Forward and backward of the transformer for one sample; the frozen encoders not counted."""
    return 3.0 * transformer_forward_flops(config, frames, size)


@lru_cache(maxsize=4)
def encoding_flops(
    vggt: VGGTConfig,
    vae: AppearanceVAEConfig,
    adapter: GeometryAdapterConfig,
    frames: int,
    size: int,
) -> float:
    """VGGT's aggregator, the geometry adapter's encoder and the appearance VAE's of one clip."""

    def run(parts: _Parts) -> None:
        video = torch.empty(1, frames, 3, size, size, device="meta")
        parts.adapter.encode(vggt_token_maps(parts.vggt, video))
        parts.vae.encode(video.transpose(1, 2))

    return _count(vggt, vae, adapter, run)


@lru_cache(maxsize=4)
def adapter_flops(
    vggt: VGGTConfig,
    vae: AppearanceVAEConfig,
    adapter: GeometryAdapterConfig,
    frames: int,
    size: int,
) -> float:
    """A stage-1 step of one sample: all encoders and heads, and the backward through the heads and
    the adapter.
    """

    def run(parts: _Parts) -> None:
        parts.adapter.requires_grad_(True)
        video = torch.empty(1, frames, 3, size, size, device="meta")
        target = vggt_token_maps(parts.vggt, video)
        with torch.no_grad():
            parts.vae.encode(video.transpose(1, 2))
            parts.read_heads(target, size)
        decoded = parts.adapter.decode(parts.adapter.encode(target).mean)
        torch.stack([values.sum() for values in parts.read_heads(decoded, size)]).sum().backward()

    return _count(vggt, vae, adapter, run)


class _Parts(nn.Module):
    """The modules without memory."""

    def __init__(
        self, vggt: VGGTConfig, vae: AppearanceVAEConfig, adapter: GeometryAdapterConfig
    ) -> None:
        super().__init__()
        backends = Backends(operators="reference", attention="sdpa")
        with torch.device("meta"):
            self.vggt = VGGT(vggt, backends)
            self.vae = AppearanceVAE(vae, backends)
            self.adapter = GeometryAdapter(adapter, backends)
        self.requires_grad_(False)

    def read_heads(
        self,
        tokens: Tensor,  # [1, 10 C, F, h, w]
        size: int,
    ) -> list[Tensor]:
        """What all three heads read from a token map of frames of size x size pixels."""
        layers, camera = token_views(tokens.permute(0, 2, 3, 4, 1))
        depth, _ = self.vggt.depth_head(layers, size, size, patch_start_idx=0)
        points, _ = self.vggt.point_head(layers, size, size, patch_start_idx=0)
        return [*self.vggt.camera_head(camera), depth, points]


def _count(
    vggt: VGGTConfig,
    vae: AppearanceVAEConfig,
    adapter: GeometryAdapterConfig,
    run: Callable[[_Parts], Any],
) -> float:
    parts = _Parts(vggt, vae, adapter)
    with FlopCounterMode(display=False) as counter:
        run(parts)
    return float(counter.get_total_flops())
