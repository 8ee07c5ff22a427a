"""A whole pipeline and clips that are small enough to train on in a test."""

from __future__ import annotations

from typing import Any

import torch

from gen3r.config import (
    AppearanceVAEConfig,
    Gen3RConfig,
    GeometryAdapterConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    TransformerConfig,
    VGGTConfig,
)
from gen3r.nano import random_modules
from gen3r.nano_tokenizer import VOCABULARY, build_tokenizer
from gen3r.pipeline import Gen3RPipeline
from gen3r.schedulers import make_euler_scheduler
from gen3r.stages import VAE_STRIDE
from gen3r_kernels import Backends
from gen3r_training.procedural.clips import Clips
from gen3r_training.resident.vggt import relative_to_first, taken
from tests.training.plane_clips import plane_clips

SIZE, FRAMES = 56, 5
LATENTS = (16, 2, SIZE // VAE_STRIDE, SIZE // VAE_STRIDE)
STATISTICS: dict[str, Any] = {"latents_mean": (0.1,) * 16, "latents_std": (0.5,) * 16}
TINY = Gen3RConfig(
    transformer=TransformerConfig(
        text_len=12,
        dim=32,
        ffn_dim=64,
        freq_dim=16,
        text_dim=16,
        num_heads=2,
        num_layers=2,
        clip_dim=16,
    ),
    wan_vae=AppearanceVAEConfig(dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1, **STATISTICS),
    geo_adapter=GeometryAdapterConfig(
        hidden_dim=8,
        input_dim=160,
        output_dim=160,
        dim_mult=(2, 2, 2, 2),
        num_res_blocks=1,
        **STATISTICS,
    ),
    vggt=VGGTConfig(
        img_size=SIZE,
        embed_dim=16,
        depth=4,
        num_heads=2,
        vit_depth=1,
        vit_num_heads=2,
        trunk_depth=1,
        camera_num_heads=2,
        features=8,
        out_channels=(8, 8, 8, 8),
        intermediate_layer_idx=(0, 1, 2, 3),
    ),
    text_encoder=TextEncoderConfig(
        vocab=VOCABULARY, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=1
    ),
    clip_image_encoder=ImageEncoderConfig(
        image_size=SIZE, vision_dim=16, vision_heads=2, vision_layers=2
    ),
    num_frames=FRAMES,
    size=SIZE,
)


def tiny_pipeline(seed: int = 0) -> Gen3RPipeline:
    """Random weights, but that tokens and latents differ from clip to clip as trained ones do.

    VGGT's residual branches count, and the autoencoders' draws are narrow.
    """
    modules = random_modules(TINY, Backends(), torch.float32, "cpu", seed)
    for name, parameter in modules["vggt"].named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(0.5)
    for name in ("wan_vae", "geo_adapter"):
        last = modules[name].model.conv1
        last.weight[:16] *= 8
        last.weight[16:] *= 0.1
        last.bias[16:] = -8
    return Gen3RPipeline(
        config=TINY, **modules, tokenizer=build_tokenizer(), scheduler=make_euler_scheduler()
    )


def tiny_clips(count: int, seed: int = 0) -> Clips:
    """Textured planes, the world and the unit as in procedural clips."""
    planes: Any = plane_clips(count, FRAMES, SIZE, seed)
    every = torch.arange(FRAMES).expand(count, -1)
    images, depth, c2w, intrinsics = taken(planes, torch.arange(count), every)
    views = relative_to_first(images, depth, c2w, intrinsics)
    moved = torch.linalg.inv(c2w[:, :1]) @ c2w
    unit = depth[:, 0].flatten(1).median(1).values / views.depth[:, 0].flatten(1).median(1).values
    moved[..., :3, 3] /= unit[:, None, None]
    colors = ("red", "blue", "green")
    return Clips(
        rgb=planes.rgb,
        depth=views.depth.half(),
        objects=torch.zeros_like(planes.rgb[..., 0]),
        c2w=moved,
        intrinsics=intrinsics,
        captions=tuple(f"a {colors[i % 3]} room" for i in range(count)),
        parts=((),) * count,
        moves=("random",) * count,
    )


def overfit(objective: Any, steps: int, batch: int, rate: float) -> list[float]:
    """The losses of some steps of Adam on one batch."""
    optimizer = torch.optim.Adam(objective.module.parameters(), lr=rate)
    drawn = objective.draw(torch.Generator().manual_seed(0), batch)
    losses = []
    for _ in range(steps):
        loss, _ = objective.loss(drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
