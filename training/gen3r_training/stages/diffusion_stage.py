"""Stage 2 as the loop runs it: the diffusion transformer learns joint latents.

Samples of a micro step are encoded one by one and go through the transformer together. The mask of
a sample's task, its dropped prompt or cameras, its timestep and all noise follow from its seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from gen3r import stages as scene_stages
from gen3r.checkpoint import ComponentReport, load_component, pipeline_values
from gen3r.config import Gen3RConfig
from gen3r.schedulers import TRAIN_STEPS, make_schedule
from gen3r.transformer import RawConditions, WanTransformer
from gen3r_training.activations import checkpoint_blocks
from gen3r_training.config import DiffusionConfig
from gen3r_training.data import Sample, SceneDataset
from gen3r_training.data.fingerprints import CLIP_MODULES, TEXT_MODULES
from gen3r_training.diffusion import DiffusionStep, diffusion_step, flow_sample
from gen3r_training.flops import diffusion_flops
from gen3r_training.parallel import Parallel, check_heads, parameter_dtype, shard
from gen3r_training.stages import StepResult, ValidationResult
from gen3r_training.stages.conditions import Choices, Row, join_rows, loss_weights, make_row
from gen3r_training.stages.data import (
    chosen_device,
    frozen_dtype,
    open_splits,
    validation_samples,
)
from gen3r_training.stages.draws import normal
from gen3r_training.stages.final import Trained, write_final
from gen3r_training.stages.frozen import Frozen
from gen3r_training.stages.pictures import depth_picture, rgb_picture, side_by_side
from gen3r_training.stages.places import (
    component_place,
    find_component,
    find_pipeline,
    stored_dtype,
    token_grid_fits,
)

VALIDATION_SAMPLES = 8
VIDEO_STEPS = 10
GUIDANCE, NEGATIVE_PROMPT = 5.0, "bad detailed"  # what `gen3r-engine run` uses


@dataclass(frozen=True)
class DiffusionPlan:
    """A checked run of stage 2.

    source : the pretrained folder; reports : of its components, `--geo_adapter`'s in its place
    start : the transformer to begin with; values : config, tokenizer, scheduler of the pipeline
    """

    config: DiffusionConfig
    dataset: SceneDataset
    validation: SceneDataset | None
    source: Path
    reports: Mapping[str, ComponentReport]
    start: ComponentReport
    values: Mapping[str, Any]

    @property
    def pipeline(self) -> Gen3RConfig:
        return cast(Gen3RConfig, self.values["config"])

    def outline(self) -> torch.nn.Module:
        """The transformer without memory."""
        with torch.device("meta"):
            return WanTransformer(self.pipeline.transformer, self.config.backends)

    def build(self, parallel: Parallel) -> DiffusionStage:
        """Load the transformer and, where no latent cache stands for them, the encoders."""
        return DiffusionStage(self, parallel)


def plan_diffusion(config: DiffusionConfig) -> DiffusionPlan:
    """Check a run of stage 2, reading headers only (with a latent cache: all frozen weights).

    Raises
    ------
    ValueError : whatever is wrong, in one line.
    """
    dataset, validation = open_splits(config)
    source, found = find_pipeline("pretrained_path", config.pretrained_path)
    values = pipeline_values(source, found)
    reports = {report.name: report for report in found}
    places = {name: source / name for name in (*CLIP_MODULES, *TEXT_MODULES)}
    if config.geo_adapter is not None:
        adapter = find_component("geo_adapter", "geo_adapter", config.geo_adapter)
        reports["geo_adapter"] = adapter
        places["geo_adapter"] = component_place("geo_adapter", config.geo_adapter)
        try:
            values["config"] = replace(values["config"], geo_adapter=adapter.config)
        except ValueError as error:
            raise ValueError(f"--geo_adapter {config.geo_adapter}: {error}") from error
    start = reports["transformer"]
    if config.init_from is not None:
        start = find_component("init_from", "transformer", config.init_from)
        if start.config != reports["transformer"].config:
            raise ValueError(
                f"--init_from {config.init_from} holds a transformer of another size than "
                f"--pretrained_path {config.pretrained_path}"
            )
    model = values["config"]
    token_grid_fits(model.geo_adapter.fixed_token_grid, model.vggt.patch_size, config.resolution)
    check_heads(model.transformer.num_heads, config.context_parallel)
    if config.kept_blocks > model.transformer.num_layers:
        raise ValueError(
            f"--kept_blocks {config.kept_blocks}: the transformer has "
            f"{model.transformer.num_layers} blocks"
        )
    if dataset.cache is not None:
        dataset.cache.check_weights(
            places,
            dtype=frozen_dtype(config, chosen_device(config)),
            control_geometry=config.upstream_control_geometry,
        )
    return DiffusionPlan(config, dataset, validation, source, reports, start, values)


class DiffusionStage:
    """See `gen3r_training.stages.Stage`."""

    name = "diffusion"

    def __init__(self, plan: DiffusionPlan, parallel: Parallel) -> None:
        config = plan.config
        self.plan, self.config, self.dataset = plan, config, plan.dataset
        self.device = parallel.device
        self.scheduler = plan.values["scheduler"]
        self.frozen = Frozen(
            plan.reports,
            plan.values["tokenizer"],
            plan.pipeline.transformer.text_len,
            self.device,
            frozen_dtype(config, self.device),
            config.backends,
            plan.dataset.cache,
        )
        self.frozen.load()
        dtype = parameter_dtype(config, parallel)
        module = load_component(plan.start, dtype, self.device, config.backends)
        self.module = cast(WanTransformer, module.requires_grad_(True))
        checkpoint_blocks(self.module, config.gradient_checkpointing, config.kept_blocks)
        if config.compile:
            for block in self.module.typed_blocks:
                block.alone = torch.compile(block.alone)  # type: ignore[method-assign]
        shard(self.module, parallel, config)
        self.flops = diffusion_flops(
            plan.pipeline.transformer, config.num_frames, config.resolution
        )

    def step(self, samples: list[Sample]) -> StepResult:
        """The mean loss of the samples."""
        choices = [Choices.draw(sample.seed, self.config) for sample in samples]
        result = self._predict(
            [self._row(sample, choice) for sample, choice in zip(samples, choices, strict=True)]
        )
        logs: dict[str, float | Tensor] = {}
        for task in dict.fromkeys(choice.task for choice in choices):
            rows = [i for i, choice in enumerate(choices) if choice.task == task]
            logs[f"loss_{task}"] = result.per_sample[rows].mean()
        return StepResult(result.loss, logs)

    def _row(self, sample: Sample, choices: Choices) -> Row:
        control_geometry = self.config.upstream_control_geometry
        clip = self.frozen.clip(sample, [choices.task], control_geometry)
        text = self.frozen.text("" if choices.drop_text else sample.prompt)
        return make_row(sample, clip, text, choices, self.config)

    def _predict(self, rows: list[Row]) -> DiffusionStep:
        flow = flow_sample(
            self.scheduler,
            torch.cat([row.clean for row in rows]),
            torch.cat([row.noise for row in rows]),
            torch.tensor([row.index for row in rows]),
        )
        weights = loss_weights(flow.sigmas, self.config.weighting)
        return diffusion_step(self.module, flow, join_rows(rows), weights)

    @torch.no_grad()
    def validate(self, folder: Path, step: int) -> ValidationResult:
        """The loss at fixed noise and evenly spaced timesteps, nothing dropped; one video."""
        if self.plan.validation is None:
            return ValidationResult(text="validation is off")
        losses: list[float] = []
        videos: dict[str, Tensor] = {}
        count = VALIDATION_SAMPLES
        for place, sample in enumerate(
            validation_samples(self.plan.validation, self.config.seed, count)
        ):
            drawn = Choices.draw(sample.seed, self.config)
            index = (2 * place + 1) * TRAIN_STEPS // (2 * count)
            choices = replace(drawn, drop_text=False, drop_cameras=False, index=index)
            losses.append(self._predict([self._row(sample, choices)]).per_sample.mean().item())
            if not videos:
                videos["scene"] = self._video(sample)
        self.frozen.release()
        text = f"scene, from its first frame in {VIDEO_STEPS} steps: true, generated, its depth"
        return ValidationResult({"loss": sum(losses) / len(losses)}, videos, text)

    def _video(self, sample: Sample) -> Tensor:  # [F, H, 3 W, 3] uint8
        """True frames, generated frames and generated depth side by side."""
        size = self.config.resolution
        row = self._row(sample, Choices("1view", False, False, 0))
        texts = [self.frozen.text(NEGATIVE_PROMPT), row.text]
        doubled = [torch.cat([x, x]) for x in (row.image, row.control, row.cameras)]
        image, control, cameras = doubled
        joint = scene_stages.denoise(
            self.module,
            RawConditions(texts, image, control, cameras),
            normal(sample.seed, "validation video", row.clean.shape).to(self.device),
            make_schedule("euler", VIDEO_STEPS, euler=self.scheduler),
            GUIDANCE,
        )
        appearance, geometry = scene_stages.split_latents(joint, size, size)
        modules = self.frozen.clips
        rgb = scene_stages.decode_appearance(modules.wan_vae, appearance)[0]
        read = scene_stages.decode_geometry(
            modules.geo_adapter, modules.vggt, geometry, size, size, need=("depth",)
        )
        depth = cast(Tensor, read.depth)[0]
        clips = [rgb_picture(rgb), depth_picture(depth)]
        if len(sample.frames):  # a cached sample has none
            clips.insert(0, rgb_picture(sample.frames.permute(0, 2, 3, 1)))
        return side_by_side(clips)

    def save_final(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The whole pipeline with the trained transformer, in the pretrained one's dtype."""
        plan = self.plan
        stored = stored_dtype(plan.reports["transformer"])
        trained = Trained("transformer", plan.pipeline.transformer, weights, stored)
        replaced = [plan.reports["geo_adapter"]] if plan.config.geo_adapter is not None else []
        write_final(folder, trained, plan.source, replaced)
