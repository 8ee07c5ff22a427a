"""Small models and batches for tests of parallel training; alike in every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen3r.config import GeometryAdapterConfig, TransformerConfig
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.transformer import RawConditions, WanTransformer
from gen3r_kernels import Backends
from gen3r_training.config import AdapterConfig, DiffusionConfig

TRANSFORMER = TransformerConfig(
    text_len=8, dim=48, ffn_dim=72, freq_dim=16, text_dim=20, num_heads=4, num_layers=3, clip_dim=12
)
ADAPTER = GeometryAdapterConfig(hidden_dim=4, input_dim=20, output_dim=20, num_res_blocks=1)
GRID = (3, 3, 5)  # 45 tokens: two ranks have 23 and 22
STEPS = 3
LR, MAX_NORM = 3e-3, 0.05
COMMON: dict[str, Any] = {"mixed_precision": "no", "device": "cpu", "data_root": (Path("data"),)}
COMMON |= {"learning_rate": LR, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.03}


def diffusion_config(**changes: Any) -> DiffusionConfig:
    paths = {"output_dir": Path("out"), "pretrained_path": Path("model")}
    return DiffusionConfig(**(COMMON | paths | changes))


def adapter_config(**changes: Any) -> AdapterConfig:
    paths = {"output_dir": Path("out"), "vggt_path": Path("v"), "wan_vae_path": Path("w")}
    return AdapterConfig(**(COMMON | paths | changes))


def transformer(seed: int = 0, config: TransformerConfig = TRANSFORMER) -> WanTransformer:
    """Every parameter random, the modulation too (zeros would hide its gradient)."""
    return _random(WanTransformer(config, Backends()), seed)


def adapter(config: GeometryAdapterConfig = ADAPTER) -> GeometryAdapter:
    return _random(GeometryAdapter(config, Backends()), 0)


def _random(module: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            if parameter.dim() == 1:
                parameter += 0.5
    return module


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CPU = torch.device("cpu")


def diffusion_inputs(
    samples: list[int], device: torch.device = CPU
) -> tuple[Tensor, Tensor, RawConditions, Tensor]:
    """Latents, timesteps, conditions and target of samples, by their numbers."""
    f, h, w = GRID
    noisy = torch.cat([draw(10 * g, 1, 16, f, 2 * h, 2 * w) for g in samples])
    target = torch.cat([draw(10 * g + 1, 1, 16, f, 2 * h, 2 * w) for g in samples])
    control = torch.cat([draw(10 * g + 2, 1, 20, f, 2 * h, 2 * w) for g in samples])
    image = torch.cat([draw(10 * g + 3, 1, 5, TRANSFORMER.clip_dim) for g in samples])
    text = [draw(10 * g + 4, 2 + g % 3, TRANSFORMER.text_dim) for g in samples]
    cameras = torch.cat([draw(10 * g + 5, 1, 24, f, 16 * h, 16 * w) for g in samples])
    timesteps = torch.tensor([100.0 + 37 * g for g in samples])
    conditions = RawConditions(
        [t.to(device) for t in text], image.to(device), control.to(device), cameras.to(device)
    )
    return noisy.to(device), timesteps.to(device), conditions, target.to(device)


def diffusion_loss(model: WanTransformer, samples: list[int], device: torch.device = CPU) -> Tensor:
    noisy, timesteps, conditions, target = diffusion_inputs(samples, device)
    velocity = model(noisy, timesteps, conditions, side_by_side=False)
    return (velocity - target).square().mean()


def adapter_loss(model: GeometryAdapter, samples: list[int], device: torch.device = CPU) -> Tensor:
    """The mean over the samples, each encoded and decoded by itself as stage 1 does."""
    losses = []
    dtype = next(model.parameters()).dtype
    for g in samples:
        tokens = draw(10 * g, 1, model.config.input_dim, 5, 4, 4).to(device, dtype)
        posterior = model.encode(tokens)
        noise = draw(10 * g + 1, *posterior.mean.shape).to(device, dtype)
        decoded = model.decode(posterior.sample(noise))
        kl = (posterior.mean.square() + posterior.logvar.exp() - posterior.logvar).mean()
        losses.append((decoded - tokens).square().mean() + 0.01 * kl)
    return torch.stack(losses).mean()
