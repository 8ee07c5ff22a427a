"""What stage 2's transformer is given for one sample, and what is drawn for it.

Every draw has a purpose of its own (`draws`), so the numbers of one do not depend on whether
another was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from torch import Tensor
from torch.nn import functional as F

from gen3r.causal_video import Posterior
from gen3r.conditioning import control_latents, task_mask
from gen3r.schedulers import TRAIN_STEPS
from gen3r.stages import VAE_STRIDE, latent_grid
from gen3r.transformer import RawConditions
from gen3r_training.config import DiffusionConfig
from gen3r_training.data import CachedClip, Sample
from gen3r_training.diffusion import choose_task, encode_camera_batch
from gen3r_training.stages.draws import generator, normal, uniform

# Of logit_normal and mode, diffusers' defaults.
LOGIT_MEAN, LOGIT_STD, MODE_SCALE = 0.0, 1.0, 1.29


@dataclass(frozen=True)
class Choices:
    """What is drawn for a sample beside noise.

    index : into the training table of 1000 timesteps
    """

    task: str
    drop_text: bool
    drop_cameras: bool
    index: int

    @classmethod
    def draw(cls, seed: int, config: DiffusionConfig) -> Self:
        """As the probabilities of `config` say, from a sample's seed."""
        return cls(
            choose_task(uniform(seed, "task"), config.task_probabilities),
            uniform(seed, "drop text") < config.text_dropout_prob,
            uniform(seed, "drop cameras") < config.camera_dropout_prob,
            timestep_index(seed, config.weighting),
        )


def timestep_index(seed: int, weighting: str) -> int:
    """Place in the training table, 0 (pure noise) to 999."""
    density = compute_density_for_timestep_sampling(
        weighting, 1, LOGIT_MEAN, LOGIT_STD, MODE_SCALE, "cpu", generator(seed, "timestep")
    )
    return min(TRAIN_STEPS - 1, max(0, int(density.item() * TRAIN_STEPS)))


def loss_weights(
    sigmas: Tensor,  # [B]
    weighting: str,
) -> Tensor:  # [B]
    """Weights of the samples' losses: 1 but for sigma_sqrt and cosmap."""
    weights: Tensor = compute_loss_weighting_for_sd3(weighting, sigmas)
    return weights


@dataclass(frozen=True)
class Row:
    """One sample as the transformer trains on it; tensors have a batch axis of 1.

    clean, noise : [1, 16, f, h, 2 w] float32; control : [1, 20, f, h, 2 w]
    image : [1, 257, clip_dim]; text : [n, text_dim]; cameras : [1, 24, f, 8 h, 16 w]
    """

    clean: Tensor
    noise: Tensor
    control: Tensor
    image: Tensor
    text: Tensor
    cameras: Tensor
    index: int


def make_row(
    sample: Sample,
    clip: CachedClip,  # on the device where the row is to be
    text: Tensor,  # [n, text_dim], of the empty prompt where the text is dropped
    choices: Choices,
    config: DiffusionConfig,
) -> Row:
    """Draw the sample's latents and arrange its conditions."""
    seed, size, device = sample.seed, config.resolution, clip.appearance.mean.device
    clean = torch.cat(
        [
            _draw(clip.appearance, seed, "appearance posterior", size),
            _draw(clip.geometry, seed, "geometry posterior", size),
        ],
        dim=-1,
    )
    height, width = (VAE_STRIDE * n for n in latent_grid(size, size))
    return Row(
        clean=clean,
        noise=normal(seed, "noise", clean.shape).to(device),
        control=make_control(clip, choices.task, seed, config),
        image=clip.image,
        text=text,
        cameras=encode_camera_batch(
            sample.c2w[None].to(device),
            sample.intrinsics[None].to(device),
            height,
            width,
            dropped=choices.drop_cameras,
        ),
        index=choices.index,
    )


def make_control(
    clip: CachedClip,
    task: str,
    seed: int,
    config: DiffusionConfig,
) -> Tensor:  # [1, 20, f, h, 2 w] float32
    """Control latents and mask. The geometry half is zero, as at inference, or upstream's."""
    size = config.resolution
    appearance, geometry = clip.control(task)
    left = _draw(appearance, seed, "control appearance posterior", size)
    right = None
    if config.upstream_control_geometry:
        if geometry is None:
            raise ValueError(
                "--upstream_control_geometry: the cached clip has no geometry of its control video"
            )
        right = _draw(geometry, seed, "control geometry posterior", size)
    mask = task_mask([task], config.num_frames, *left.shape[-2:])
    return control_latents(left, mask.to(left.device), right)


def join_rows(rows: Sequence[Row]) -> RawConditions:
    """The conditions of a batch."""
    return RawConditions(
        text=[row.text for row in rows],
        image=torch.cat([row.image for row in rows]),
        control=torch.cat([row.control for row in rows]),
        cameras=torch.cat([row.cameras for row in rows]),
    )


def _draw(
    posterior: Posterior,  # of [1, 16, f, size / 8, size / 8]
    seed: int,
    purpose: str,
    size: int,
) -> Tensor:  # [1, 16, f, h, w] float32
    """One draw."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    drawn = Posterior(mean, logvar).sample(normal(seed, purpose, mean.shape).to(mean.device))
    return on_latent_grid(drawn, size)


def on_latent_grid(
    drawn: Tensor,  # [B, 16, f, size / 8, size / 8]
    size: int,
) -> Tensor:  # [B, 16, f, h, w] of `latent_grid`
    """A row or column that `latent_grid` adds repeats the last one."""
    rows, columns = latent_grid(size, size)
    extra = (0, columns - drawn.shape[-1], 0, rows - drawn.shape[-2], 0, 0)
    return F.pad(drawn, extra, mode="replicate") if any(extra) else drawn
