"""Stage 2 at small size: the diffusion transformer on latents that are encoded once.

At construction every clip and caption goes through the frozen encoders (`latents`); a batch is
gathered from what they gave. The mathematics is that of `gen3r_training.diffusion`: flow matching
(arXiv 2210.02747), a mask and a control video by task, dropped cameras and text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gen3r.cameras import plucker_coordinates, rays_through
from gen3r.conditioning import camera_latents, control_latents, task_mask
from gen3r.pipeline import Gen3RPipeline
from gen3r.scene import TASKS
from gen3r.schedulers import TRAIN_STEPS
from gen3r.stages import VAE_STRIDE, latent_grid
from gen3r.transformer import Conditions, WanTransformer
from gen3r_training.diffusion import flow_at
from gen3r_training.losses import truncated_square
from gen3r_training.resident.generation import generation_figures
from gen3r_training.resident.latents import (
    EncodedClips,
    encode_clips,
    encode_texts,
)
from gen3r_training.stages.conditions import on_latent_grid

if TYPE_CHECKING:
    from gen3r_training.procedural import Clips
    from gen3r_training.resident.config import ResidentConfig

TASK_SHARES = (0.4, 0.3, 0.3)  # of `TASKS`
CAMERAS_DROPPED, TEXT_DROPPED = 0.15, 0.15  # allview never has cameras, as at inference
# Dropped text becomes the one or the other in halves: guidance contrasts with the second.
DROPPED_TEXTS = ("", "bad detailed")
GENERATED = 16  # most held-out clips to generate from
VALIDATION_SEED = 7


@dataclass(frozen=True)
class DiffusionBatch:
    """B clips as the transformer trains on them.

    clean, noise : [B, 16, f, h, 2 w] float32
    timesteps, sigmas : [B] float32
    control : [B, 20, f, h, 2 w]; image : [B, 1 + patches, clip_dim]
    text : [B, text_len, text_dim], zeros behind the tokens; text_lengths : [B] int32
    c2w : [B, F, 4, 4]; inverse : [B, 3, 3] inverse intrinsics
    cameras_kept : [B] bool; tasks : [B] int64, places in `TASKS`
    """

    clean: Tensor
    noise: Tensor
    timesteps: Tensor
    sigmas: Tensor
    control: Tensor
    image: Tensor
    text: Tensor
    text_lengths: Tensor
    c2w: Tensor
    inverse: Tensor
    cameras_kept: Tensor
    tasks: Tensor


@dataclass(frozen=True)
class _Picks:
    """What is chosen of the encoded clips: rows, tasks, texts, places in the training table."""

    numbers: Tensor  # [B] int64
    tasks: Tensor  # [B] int64
    texts: Tensor  # [B] int64
    cameras_kept: Tensor  # [B] bool
    indices: Tensor  # [B] int64


@dataclass(frozen=True)
class _Source:
    """Encoded clips and the number of each one's caption."""

    clips: EncodedClips
    captions: Tensor  # [N] int64


class DiffusionObjective:
    """Trains the pipeline's transformer on resident clips.

    Raises
    ------
    ValueError : no clips to train or to evaluate on.
    """

    def __init__(
        self,
        pipeline: Gen3RPipeline,
        train: Clips,
        held_out: Clips,
        options: ResidentConfig,
    ) -> None:
        self.pipeline, self.held_out = pipeline, held_out
        self.transformer: WanTransformer = pipeline.transformer
        self.module: nn.Module = self.transformer
        self.components: dict[str, nn.Module] = {"transformer": self.transformer}
        device, frames = train.rgb.device, train.rgb.shape[1]
        self.size = train.rgb.shape[2]
        prompts = [*train.captions, *held_out.captions]
        known = list(dict.fromkeys([*DROPPED_TEXTS, *prompts]))
        place = {prompt: number for number, prompt in enumerate(known)}
        self.texts = encode_texts(pipeline, known, device)
        numbers = torch.tensor([place[prompt] for prompt in prompts], device=device)
        mine, theirs = numbers.split([len(train), len(held_out)])
        self.train = _Source(encode_clips(pipeline, train, mirror=True), mine.repeat(2))
        self.evaluated = _Source(encode_clips(pipeline, held_out), theirs)
        grid = latent_grid(self.size, self.size)
        self.masks = task_mask(TASKS, frames, *grid).to(device)
        scheduler = pipeline.scheduler
        self.timesteps = scheduler.timesteps.to(device, torch.float32)
        self.sigmas = scheduler.sigmas[:TRAIN_STEPS].to(device, torch.float32)
        self.transformer.requires_grad_(True)

    @torch.no_grad()
    def draw(self, generator: torch.Generator, count: int) -> DiffusionBatch:
        """`count` clips with tasks, dropped conditions, noise and timesteps."""
        device = generator.device
        numbers = torch.randint(len(self.train.clips), (count,), generator=generator, device=device)
        task, text, camera = torch.rand(3, count, generator=generator, device=device).unbind(0)
        tasks = (task >= TASK_SHARES[0]).long() + (task >= TASK_SHARES[0] + TASK_SHARES[1]).long()
        dropped = (text >= TEXT_DROPPED / 2).long()  # its place in DROPPED_TEXTS
        picks = _Picks(
            numbers=numbers,
            tasks=tasks,
            texts=torch.where(text < TEXT_DROPPED, dropped, self.train.captions[numbers]),
            cameras_kept=(camera >= CAMERAS_DROPPED) & (tasks != TASKS.index("allview")),
            indices=timestep_indices(generator, count),
        )
        return self._batch(self.train.clips, picks, generator)

    def _batch(
        self, clips: EncodedClips, picks: _Picks, generator: torch.Generator
    ) -> DiffusionBatch:
        """Draw from the posteriors and gather the conditions."""
        numbers, tasks = picks.numbers, picks.tasks
        target = torch.full_like(tasks, TASKS.index("allview"))
        clean = torch.cat(
            [
                self._drawn(*_appearance(clips, target, numbers), generator),
                self._drawn(
                    clips.geometry_mean[numbers], clips.geometry_logvar[numbers], generator
                ),
            ],
            dim=-1,
        )
        control = self._drawn(*_appearance(clips, tasks, numbers), generator)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        return DiffusionBatch(
            clean=clean,
            noise=noise,
            timesteps=self.timesteps[picks.indices],
            sigmas=self.sigmas[picks.indices],
            control=control_latents(control, self.masks[tasks]),
            image=clips.image[numbers],
            text=self.texts.features[picks.texts],
            text_lengths=self.texts.lengths[picks.texts],
            c2w=clips.c2w[numbers],
            inverse=clips.inverse[numbers],
            cameras_kept=picks.cameras_kept,
            tasks=tasks,
        )

    def _drawn(
        self,
        mean: Tensor,  # [B, 16, f, size / 8, size / 8]
        logvar: Tensor,  # same
        generator: torch.Generator,
    ) -> Tensor:  # [B, 16, f, h, w] float32
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        return on_latent_grid(mean.float() + (0.5 * logvar.float()).exp() * noise, self.size)

    def loss(self, batch: DiffusionBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error of the velocity, and its means by task and by half."""
        errors = self._errors(batch)
        detached = errors.detach()
        logs = {"appearance": detached[:, 0].mean(), "geometry": detached[:, 1].mean()}
        return errors.mean(), logs | by_task(detached.mean(1), batch.tasks)

    def _errors(self, batch: DiffusionBatch) -> Tensor:  # [B, 2] appearance, geometry
        sample = flow_at(batch.timesteps, batch.sigmas, batch.clean, batch.noise)
        prediction = self.transformer(
            sample.noisy, sample.timesteps, self.conditions(batch), side_by_side=True
        )
        squares = truncated_square(prediction, sample.target)
        return squares.unflatten(-1, (2, -1)).mean(dim=(1, 2, 3, 5))

    def conditions(self, batch: DiffusionBatch) -> Conditions:
        """The batch's conditions, projected by the transformer."""
        with torch.no_grad():
            cameras = self._cameras(batch)
        return self.transformer.condition_padded(
            batch.text, batch.text_lengths, batch.image, batch.control, cameras
        )

    def _cameras(self, batch: DiffusionBatch) -> Tensor:  # [B, 24, f, 8 h, 16 w]
        height, width = (VAE_STRIDE * n for n in latent_grid(self.size, self.size))
        rays = rays_through(batch.c2w, batch.inverse[:, None], height, width)
        kept = batch.cameras_kept[:, None, None, None, None]
        return camera_latents((plucker_coordinates(*rays) * kept).to(self.transformer.dtype))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Losses of all tasks at evenly spread timesteps, nothing dropped; what is generated.

        loss_1view, loss_2view, loss_allview : on the held-out clips
        the others : see `generation.generation_figures`, on at most `GENERATED` of them
        """
        device, count = self.masks.device, len(self.evaluated.clips)
        generator = torch.Generator(device).manual_seed(VALIDATION_SEED)
        numbers = torch.arange(count, device=device)
        picks = _Picks(
            numbers=numbers,
            tasks=numbers,
            texts=self.evaluated.captions,
            cameras_kept=torch.ones_like(numbers, dtype=torch.bool),
            indices=(2 * numbers + 1) * TRAIN_STEPS // (2 * count),
        )
        result: dict[str, float] = {}
        batches = []
        for place, task in enumerate(TASKS):
            tasks = torch.full_like(numbers, place)
            kept = picks.cameras_kept & (task != "allview")
            chosen = replace(picks, tasks=tasks, cameras_kept=kept)
            batch = self._batch(self.evaluated.clips, chosen, generator)
            result[f"loss_{task}"] = float(self._errors(batch).mean())
            batches.append(batch)
        first = _joined(batches, min(GENERATED, count))
        clips = self.held_out.take(range(min(GENERATED, count)))
        figures = generation_figures(self.pipeline, clips, self.conditions(first), first.noise)
        return result | figures

    def finish(self) -> None:
        """Nothing: the transformer has no statistics to measure."""


def timestep_indices(generator: torch.Generator, count: int) -> Tensor:  # [count] int64
    """Places in the training table, 0 (pure noise) to 999.

    Every second one is logit-normal (arXiv 2403.03206), which puts the work where the velocity is
    hardest to tell; the others are uniform, since most steps of the solver lie at high noise, where
    that density ends. Both are stratified over the batch.
    """
    device = generator.device
    offsets = torch.rand(count, generator=generator, device=device)
    share = ((torch.arange(count, device=device) + offsets) / count).clamp(1e-6, 1 - 1e-6)
    normal = torch.sigmoid(torch.special.ndtri(share))
    odd = torch.arange(count, device=device) % 2 == 1
    return (torch.where(odd, normal, share) * TRAIN_STEPS).long().clamp(max=TRAIN_STEPS - 1)


def by_task(
    values: Tensor,  # [B]
    tasks: Tensor,  # [B] int64
) -> dict[str, Tensor]:  # 0-d each, 0 for a task that the batch does not have
    """Means by task, without waiting for the device."""
    chosen = tasks == torch.arange(len(TASKS), device=tasks.device)[:, None]
    means = (values * chosen).sum(1) / chosen.sum(1).clamp(min=1)
    return {f"loss_{task}": mean for task, mean in zip(TASKS, means.unbind(), strict=True)}


def _appearance(
    clips: EncodedClips,
    tasks: Tensor,  # [B] int64
    numbers: Tensor,  # [B] int64
) -> tuple[Tensor, Tensor]:
    return clips.appearance_mean[tasks, numbers], clips.appearance_logvar[tasks, numbers]


def _joined(batches: list[DiffusionBatch], count: int) -> DiffusionBatch:
    """The first `count` rows of every batch, one batch behind the other."""
    values = {
        name: torch.cat([getattr(batch, name)[:count] for batch in batches])
        for name in DiffusionBatch.__dataclass_fields__
    }
    return DiffusionBatch(**values)
