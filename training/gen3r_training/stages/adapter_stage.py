"""Stage 1 as the loop runs it: the geometry adapter learns the tokens of VGGT.

VGGT and the VAE are frozen. Samples of a micro step are computed one after the other, so that a
sample's loss, its adaptive weight included, does not depend on what it is batched with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from gen3r.appearance_vae import AppearanceVAE
from gen3r.causal_video import Posterior
from gen3r.checkpoint import ComponentReport, load_component
from gen3r.config import GEN3R, AppearanceVAEConfig, GeometryAdapterConfig, VGGTConfig
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.nano import NANO
from gen3r.vggt import VGGT, token_views
from gen3r_training.adapter import (
    AdapterLossConfig,
    AdapterStep,
    adapter_loss,
    vggt_token_maps,
)
from gen3r_training.config import AdapterConfig
from gen3r_training.data import Sample, SceneDataset
from gen3r_training.flops import adapter_flops
from gen3r_training.parallel import Parallel, parameter_dtype, shard
from gen3r_training.stages import StepResult, ValidationResult
from gen3r_training.stages.data import (
    chosen_device,
    frozen_dtype,
    mean_logs,
    open_splits,
    validation_samples,
)
from gen3r_training.stages.draws import normal
from gen3r_training.stages.final import Trained, write_final
from gen3r_training.stages.pictures import depth_picture, depth_range, side_by_side
from gen3r_training.stages.places import (
    component_place,
    find_component,
    find_pipeline,
    is_pipeline,
    stored_dtype,
    token_grid_fits,
)

# Upstream weighs the cosine distance 0.1 where it weighs the reconstruction 0.5.
COSINE_SHARE = 0.2
VALIDATION_SAMPLES = 4


def loss_weights(config: AdapterConfig) -> AdapterLossConfig:
    """The weights of the loss that the two lambdas (or upstream's recipe) stand for."""
    full = config.kl_reduction == "full"
    if config.upstream_loss_weights:
        return AdapterLossConfig(full_kl=full)
    return AdapterLossConfig(
        recon=config.lambda_rec,
        similarity=COSINE_SHARE * config.lambda_rec,
        align_kl=config.lambda_kl,
        normal_kl=0.0,  # lambda_kl 0 means no KL, not another one
        full_kl=full,
    )


@dataclass(frozen=True)
class AdapterPlan:
    """A checked run of stage 1.

    start : the adapter to begin with, None for random weights
    source : the pipeline that `final_pipeline` is made from, or None
    """

    config: AdapterConfig
    dataset: SceneDataset
    validation: SceneDataset | None
    vggt: ComponentReport
    vae: ComponentReport
    adapter: GeometryAdapterConfig
    start: ComponentReport | None
    source: Path | None

    def outline(self) -> torch.nn.Module:
        """The adapter without memory."""
        with torch.device("meta"):
            return GeometryAdapter(self.adapter, self.config.backends)

    def build(self, parallel: Parallel) -> AdapterStage:
        """Load VGGT, the VAE and the adapter on the rank's device."""
        return AdapterStage(self, parallel)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the trained weights in `final_pipeline`: the pipeline's, else as they were trained."""
        if self.start is not None:
            return stored_dtype(self.start)
        half = self.config.mixed_precision == "bf16"
        return torch.bfloat16 if half else torch.float32


def plan_adapter(config: AdapterConfig) -> AdapterPlan:
    """Check a run of stage 1, reading headers only.

    Raises
    ------
    ValueError : whatever is wrong, in one line.
    """
    dataset, validation = open_splits(config)
    vggt = find_component("vggt_path", "vggt", config.vggt_path)
    vae = find_component("wan_vae_path", "wan_vae", config.wan_vae_path)
    source = config.pretrained_path
    if source is None and config.init_from is not None and is_pipeline(config.init_from):
        source = config.init_from
    if source is not None:
        flag = "init_from" if config.pretrained_path is None else "pretrained_path"
        source, _ = find_pipeline(flag, source)
    start: ComponentReport | None = None
    if config.init_from is not None:
        start = find_component("init_from", "geo_adapter", config.init_from)
    elif source is not None:
        start = find_component("pretrained_path", "geo_adapter", source)
    vggt_config = cast(VGGTConfig, vggt.config)
    adapter = _adapter_config(vggt_config, start)
    latents = cast(AppearanceVAEConfig, vae.config).z_dim
    if adapter.latent_channels != latents:
        raise ValueError(
            f"the adapter has {adapter.latent_channels} latent channels, --wan_vae_path "
            f"{config.wan_vae_path} has {latents}; they must agree to be aligned"
        )
    token_grid_fits(adapter.fixed_token_grid, vggt_config.patch_size, config.resolution)
    if dataset.cache is not None:
        dataset.cache.check_weights(
            {
                "vggt": component_place("vggt", config.vggt_path),
                "wan_vae": component_place("wan_vae", config.wan_vae_path),
            },
            dtype=frozen_dtype(config, chosen_device(config)),
            tokens=True,
        )
    return AdapterPlan(config, dataset, validation, vggt, vae, adapter, start, source)


def _adapter_config(vggt: VGGTConfig, start: ComponentReport | None) -> GeometryAdapterConfig:
    """The start's, or that of the published (or the embedded) model whose VGGT has this width."""
    tokens = 10 * vggt.embed_dim
    if start is not None:
        config = cast(GeometryAdapterConfig, start.config)
        if not config.input_dim == config.output_dim == tokens:
            raise ValueError(
                f"the adapter to begin with takes {config.input_dim} channels and gives "
                f"{config.output_dim}, this VGGT has {tokens}; use the two of one model"
            )
        return config
    for known in (GEN3R.geo_adapter, NANO.geo_adapter):
        if known.input_dim == tokens:
            return known
    raise ValueError(
        f"no adapter is known for a VGGT of width {vggt.embed_dim} (known: "
        f"{GEN3R.vggt.embed_dim}, {NANO.vggt.embed_dim}); give one with --init_from"
    )


class AdapterStage:
    """See `gen3r_training.stages.Stage`."""

    name = "adapter"

    def __init__(self, plan: AdapterPlan, parallel: Parallel) -> None:
        config = plan.config
        self.plan, self.config = plan, config
        self.dataset = plan.dataset
        self.device = parallel.device
        self.weights = loss_weights(config)
        frozen = (frozen_dtype(config, self.device), self.device, config.backends)
        self.vggt = cast(VGGT, load_component(plan.vggt, *frozen))
        self.vae = cast(AppearanceVAE, load_component(plan.vae, *frozen))
        self.module = self._adapter(parameter_dtype(config, parallel))
        shard(self.module, parallel, config)
        self.flops = adapter_flops(
            cast(VGGTConfig, plan.vggt.config),
            cast(AppearanceVAEConfig, plan.vae.config),
            plan.adapter,
            config.num_frames,
            config.resolution,
        )

    def _adapter(self, dtype: torch.dtype) -> GeometryAdapter:
        plan, backends = self.plan, self.config.backends
        if plan.start is not None:
            module = load_component(plan.start, dtype, self.device, backends)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                module = GeometryAdapter(plan.adapter, backends).to(self.device, dtype)
        return cast(GeometryAdapter, module.eval().requires_grad_(True))

    def step(self, samples: list[Sample]) -> StepResult:
        """The mean loss of the samples."""
        steps = [self._loss(sample)[0] for sample in samples]
        loss = torch.stack([step.loss for step in steps]).mean()
        return StepResult(loss, dict(mean_logs([step.logs for step in steps])))

    def _loss(self, sample: Sample) -> tuple[AdapterStep, Tensor]:
        """The step of one sample, and the true tokens."""
        tokens, reference = self._encode(sample)
        noise = normal(sample.seed, "adapter posterior", reference.mean.shape).to(self.device)
        step = adapter_loss(
            self.module,
            self.vggt,
            tokens,
            reference,
            noise,
            self.weights,
            recompute=self.config.gradient_checkpointing,
            dtype=torch.bfloat16 if self.config.mixed_precision == "bf16" else torch.float32,
        )
        return step, tokens

    @torch.no_grad()
    def _encode(self, sample: Sample) -> tuple[Tensor, Posterior]:
        """Token maps and the appearance posterior of a clip, batch axis 1."""
        dtype = frozen_dtype(self.config, self.device)
        if sample.cached is not None and sample.cached.tokens is not None:
            cached = sample.cached.to(self.device, dtype)
            return cast(Tensor, cached.tokens), cached.appearance
        frames = sample.frames[None].to(self.device)
        video = (2 * frames - 1).transpose(1, 2).to(self.vae.encoder_dtype)
        return vggt_token_maps(self.vggt, frames), self.vae.encode(video)

    @torch.no_grad()
    def validate(self, folder: Path, step: int) -> ValidationResult:
        """Mean losses, and the depth read from true and decoded tokens of the first sample."""
        if self.plan.validation is None:
            return ValidationResult(text="no data root has a folder 'val'")
        logs: list[Mapping[str, float]] = []
        videos: dict[str, Tensor] = {}
        samples = validation_samples(self.plan.validation, self.config.seed, VALIDATION_SAMPLES)
        for sample in samples:
            result, tokens = self._loss(sample)
            logs.append(result.logs)
            if not videos:
                videos["depth"] = self._depth_video(tokens)
        text = "depth: VGGT's tokens on the left, the adapter's on the right"
        return ValidationResult(mean_logs(logs), videos, text)

    def _depth_video(self, tokens: Tensor) -> Tensor:  # [F, H, 2 W, 3] uint8
        dtype = next(self.module.parameters()).dtype
        decoded = self.module.decode(self.module.encode(tokens.to(dtype)).mode()).to(tokens.dtype)
        true, read = self._depth(tokens), self._depth(decoded)
        scale = depth_range(true)
        return side_by_side([depth_picture(depth, scale) for depth in (true, read)])

    def _depth(self, tokens: Tensor) -> Tensor:  # [F, H, W]
        layers, _ = token_views(tokens.permute(0, 2, 3, 4, 1))
        size = self.config.resolution
        return self.vggt.depth_head(layers, size, size, patch_start_idx=0)[0][0, ..., 0]

    def save_final(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """geo_adapter/ in the published layout, within the whole pipeline where there is one."""
        plan = self.plan
        trained = Trained("geo_adapter", plan.adapter, weights, plan.stored_dtype)
        write_final(folder, trained, plan.source)
