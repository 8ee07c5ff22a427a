"""One step of stage 2: the diffusion transformer learns joint latents [appearance | geometry].

Everything but the transformer is frozen. The clean latents are one draw from each autoencoder's
posterior. The control is a draw from the appearance posterior of the video whose frames outside the
task are black; its geometry half is zero, as at inference. Upstream puts a draw of the geometry
posterior there (`training_control`), which for allview is the target's own geometry. Flow matching
(arXiv 2210.02747): x_t = (1 - s) x0 + s n, the model predicts n - x0.
Source: Gen3R (arXiv 2601.04090, section 3.3) and the reference notes on stage 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from gen3r.appearance_vae import AppearanceVAE
from gen3r.cameras import plucker_map
from gen3r.causal_video import Posterior
from gen3r.conditioning import camera_latents, control_latents, given_frames, task_mask
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.transformer import Conditions, RawConditions, WanTransformer
from gen3r.vggt import VGGT
from gen3r_training.adapter import vggt_token_maps
from gen3r_training.losses import truncated_square


@dataclass(frozen=True)
class DrawNoise:
    """Standard normal noise of one sample's four posterior draws, in upstream's order of drawing.

    Each [1, 16, f, h, w].
    """

    target_geometry: Tensor
    target_appearance: Tensor
    control_geometry: Tensor
    control_appearance: Tensor


@dataclass(frozen=True)
class JointPosterior:
    """What the frozen autoencoders make of a video.

    tokens : [B, 10 C, F, h14, w14] VGGT's token maps
    appearance, geometry : posteriors of [B, 16, f, h, w]
    """

    tokens: Tensor
    appearance: Posterior
    geometry: Posterior

    def sample(
        self,
        noise_appearance: Tensor,  # [B, 16, f, h, w]
        noise_geometry: Tensor,  # [B, 16, f, h, w]
    ) -> tuple[Tensor, Tensor]:  # appearance and geometry latents, [B, 16, f, h, w] each
        """One draw from each."""
        return self.appearance.sample(noise_appearance), self.geometry.sample(noise_geometry)


@dataclass(frozen=True)
class EncodedSample:
    """Target and control of a sample.

    latents : [1, 16, f, h, 2 w] clean joint latents; control : [1, 20, f, h, 2 w]
    target_posterior, control_posterior : what they were drawn from; one object for allview
    """

    latents: Tensor
    control: Tensor
    target_posterior: JointPosterior
    control_posterior: JointPosterior


@dataclass(frozen=True)
class FlowSample:
    """Noisy latents and what the model should predict.

    timesteps, sigmas : [B] float32
    noisy, target : [B, 16, f, h, 2 w] float32
    """

    timesteps: Tensor
    sigmas: Tensor
    noisy: Tensor
    target: Tensor


@dataclass(frozen=True)
class DiffusionStep:
    """loss : scalar with gradient; per_sample : [B], without; prediction : [B, 16, f, h, 2 w]."""

    loss: Tensor
    per_sample: Tensor
    prediction: Tensor


def choose_task(draw: float, probabilities: Sequence[float] = (1 / 3, 1 / 3, 1 / 3)) -> str:
    """Task of a sample from a uniform draw in [0, 1).

    probabilities : of 1view, 2view and allview; the draws from 0 up are 1view, then allview, the
        last ones 2view, as upstream lays out its thirds.
    """
    first, second, every = probabilities
    if draw < first:
        return "1view"
    return "2view" if every == 0 or draw > 1 - second else "allview"


def keep_given_frames(
    frames: Tensor,  # [B, F, 3, H, W] in [0, 1]
    tasks: Sequence[str],
) -> Tensor:  # [B, F, 3, H, W], black where the task gives no view
    """The control videos.

    Raises
    ------
    ValueError : an unknown task, or not one task per sample.
    """
    if len(tasks) != len(frames):
        raise ValueError(f"{len(tasks)} tasks for {len(frames)} samples; give one each")
    control = torch.zeros_like(frames)
    for row, source, task in zip(control, frames, tasks, strict=True):
        given = given_frames(task, frames.shape[1])
        row[given] = source[given]
    return control


@torch.no_grad()
def encode_joint(
    vae: AppearanceVAE,
    adapter: GeometryAdapter,
    vggt: VGGT,
    frames: Tensor,  # [B, F, 3, H, W] in [0, 1]
) -> JointPosterior:
    """Both posteriors of a video."""
    tokens = vggt_token_maps(vggt, frames)
    video = (2 * frames - 1).transpose(1, 2).to(next(vae.parameters()).dtype)
    return JointPosterior(tokens, vae.encode(video), adapter.encode(tokens))


def training_control(
    posterior: JointPosterior,  # of the masked video
    tasks: Sequence[str],
    num_frames: int,
    noise_appearance: Tensor,  # [B, 16, f, h, w]
    noise_geometry: Tensor,  # [B, 16, f, h, w]
) -> Tensor:  # [B, 20, f, h, 2 w]
    """Control latents as stage 2 makes them: the geometry half encodes the masked video's tokens.

    Raises
    ------
    ValueError : an unknown task.
    """
    appearance, geometry = posterior.sample(noise_appearance, noise_geometry)
    mask = task_mask(tasks, num_frames, *appearance.shape[-2:]).to(appearance.device)
    return control_latents(appearance, mask, geometry)


def encode_sample(
    vae: AppearanceVAE,
    adapter: GeometryAdapter,
    vggt: VGGT,
    frames: Tensor,  # [1, F, 3, H, W] in [0, 1]
    task: str,
    noise: DrawNoise,
) -> EncodedSample:
    """Target and control latents of one sample. Encodes two videos, one for allview.

    Raises
    ------
    ValueError : an unknown task.
    """
    target = encode_joint(vae, adapter, vggt, frames)
    if task == "allview":
        given = target
    else:
        given = encode_joint(vae, adapter, vggt, keep_given_frames(frames, [task]))
    pair = target.sample(noise.target_appearance, noise.target_geometry)
    control = training_control(
        given, [task], frames.shape[1], noise.control_appearance, noise.control_geometry
    )
    return EncodedSample(torch.cat(pair, dim=-1), control, target, given)


def encode_camera_batch(
    c2w: Tensor,  # [B, F, 4, 4] relative to the first frame
    intrinsics: Tensor,  # [B, F, 3, 3] pixels
    height: int,
    width: int,
    *,
    dropped: bool = False,
) -> Tensor:  # [B, 24, f, H, 2 W]
    """Packed Pluecker maps; zeros when the batch's cameras are dropped."""
    maps = plucker_map(c2w, intrinsics, height, width)
    return camera_latents(torch.zeros_like(maps) if dropped else maps)


def flow_sample(
    scheduler: FlowMatchEulerDiscreteScheduler,
    clean: Tensor,  # [B, 16, f, h, 2 w]
    noise: Tensor,  # [B, 16, f, h, 2 w]
    indices: Tensor,  # [B] int64 into the training table
) -> FlowSample:
    """Noise each sample at its own place in the scheduler's training table (shift 2, 1000 steps).

    Raises
    ------
    ValueError : an index outside the table.
    """
    table = scheduler.config["num_train_timesteps"]
    if int(indices.min()) < 0 or int(indices.max()) >= table:
        raise ValueError(f"timestep indices {indices.tolist()} must lie in 0..{table - 1}")
    timesteps = scheduler.timesteps[indices.cpu()].to(clean.device)
    sigmas = scheduler.sigmas[indices.cpu()].to(clean.device)
    return flow_at(timesteps, sigmas, clean, noise)


def flow_at(
    timesteps: Tensor,  # [B] float32
    sigmas: Tensor,  # [B] float32
    clean: Tensor,  # [B, 16, f, h, 2 w]
    noise: Tensor,  # [B, 16, f, h, 2 w]
) -> FlowSample:
    """Noise each sample at its own level."""
    s = sigmas.view(-1, *(1,) * (clean.ndim - 1))
    return FlowSample(timesteps, sigmas, (1 - s) * clean + s * noise, noise - clean)


def diffusion_step(
    transformer: WanTransformer,
    sample: FlowSample,
    conditions: Conditions | RawConditions,
    weights: Tensor | None = None,  # [B] of the samples' losses; None: 1 each
) -> DiffusionStep:
    """Prediction and loss of one batch; call ``.loss.backward()`` for the transformer's gradients.

    The loss is the mean over all samples of the (weighted) squared error, entries with |error| > 50
    counting 0.

    Raises
    ------
    ValueError : latents that the transformer does not take.
    """
    prediction = transformer(sample.noisy, sample.timesteps, conditions, side_by_side=True)
    per_sample = truncated_square(prediction, sample.target).flatten(1).mean(1)
    weighted = per_sample if weights is None else weights.to(per_sample) * per_sample
    return DiffusionStep(weighted.mean(), per_sample.detach(), prediction)
