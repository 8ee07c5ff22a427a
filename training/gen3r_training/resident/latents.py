"""All clips as what the frozen encoders make of them, and the statistics of latents.

Encoding happens once, in batches; a training step then gathers rows. Latents are kept in float16:
they are near 1 in size, and eleven bits are below the noise of any draw. A clip of 17 frames of
112 pixels takes 260 KB, so that 12,000 of them take 3 GB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r.causal_video import Posterior
from gen3r.conditioning import given_frames
from gen3r.encoders import encode_text
from gen3r.pipeline import Gen3RPipeline
from gen3r.scene import TASKS
from gen3r.stages import embed_views
from gen3r.video_autoencoder import VideoAutoencoder
from gen3r_training.adapter import vggt_token_maps
from gen3r_training.resident.captions import tokenize
from gen3r_training.resident.vggt import mirrored, taken

if TYPE_CHECKING:
    from gen3r_training.procedural import Clips

WORKING_GIB = 48.0  # of activations: a whole clip is one chunk
KEPT = torch.float16
CLIPS_A_BATCH, PROMPTS_A_BATCH = 64, 512
STATISTICS_CLIPS = 2048


@dataclass(frozen=True)
class EncodedClips:
    """N clips (a mirror image counts as a clip) on the device.

    appearance_mean, appearance_logvar : [3, N, 16, f, h, w] float16, posteriors of the control
        video of each of `gen3r.scene.TASKS`, in their order; that of allview is the clip itself
    geometry_mean, geometry_logvar : [N, 16, f, h, w] float16
    image : [N, 1 + patches, clip_dim] features of the first frame
    c2w : [N, F, 4, 4] float32, in the unit and the world of the first frame
    inverse : [N, 3, 3] float32, inverse intrinsics
    """

    appearance_mean: Tensor
    appearance_logvar: Tensor
    geometry_mean: Tensor
    geometry_logvar: Tensor
    image: Tensor
    c2w: Tensor
    inverse: Tensor

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class EncodedTexts:
    """M prompts.

    features : [M, text_len, text_dim], zeros behind the tokens; lengths : [M] int32
    """

    features: Tensor
    lengths: Tensor


@torch.no_grad()
def encode_clips(pipeline: Gen3RPipeline, clips: Clips, mirror: bool = False) -> EncodedClips:
    """Posteriors, image features and cameras of all clips.

    mirror : the mirror images too; that of clip i is row len(clips) + i.

    Raises
    ------
    ValueError : no clips.
    """
    if len(clips) == 0:
        raise ValueError("there are no clips to encode; render some with `prepare procedural`")
    device, total = clips.rgb.device, (1 + mirror) * len(clips)
    every = torch.arange(clips.rgb.shape[1], device=device)
    found: dict[str, Tensor] = {}
    start = 0
    for turned in (False, True)[: 1 + mirror]:
        for numbers in torch.arange(len(clips), device=device).split(CLIPS_A_BATCH):
            flags = torch.full_like(numbers, turned, dtype=torch.bool)
            frames = every.expand(len(numbers), -1)
            images, _, c2w, intrinsics = mirrored(flags, *taken(clips, numbers, frames))
            rows = _encode_rows(pipeline, images, c2w, intrinsics)
            for name, value in rows.items():
                axis = int(name.startswith("appearance"))
                if name not in found:
                    shape = (*value.shape[:axis], total, *value.shape[axis + 1 :])
                    found[name] = value.new_empty(shape)
                found[name].narrow(axis, start, len(numbers)).copy_(value)
            start += len(numbers)
    return EncodedClips(**found)


def _encode_rows(
    pipeline: Gen3RPipeline,
    images: Tensor,  # [B, F, 3, H, W] in [0, 1]
    c2w: Tensor,  # [B, F, 4, 4]
    intrinsics: Tensor,  # [B, 3, 3]
) -> dict[str, Tensor]:
    """The fields of `EncodedClips` of one batch."""
    adapter = pipeline.geo_adapter
    tokens = vggt_token_maps(pipeline.vggt, images)
    geometry = adapter.encode(tokens.to(next(adapter.parameters()).dtype), WORKING_GIB)
    appearance = [appearance_posterior(pipeline, given_alone(images, task)) for task in TASKS]
    return {
        "appearance_mean": torch.stack([p.mean for p in appearance]).to(KEPT),
        "appearance_logvar": torch.stack([p.logvar for p in appearance]).to(KEPT),
        "geometry_mean": geometry.mean.to(KEPT),
        "geometry_logvar": geometry.logvar.to(KEPT),
        "image": embed_views(pipeline.clip_image_encoder, images[:, 0]),
        "c2w": c2w.float(),
        "inverse": torch.linalg.inv(intrinsics.float()),
    }


def given_alone(
    images: Tensor,  # [B, F, 3, H, W]
    task: str,
) -> Tensor:  # [B, F, 3, H, W]
    """The control videos of one task: frames that it does not give are black."""
    given = given_frames(task, images.shape[1])
    control = torch.zeros_like(images)
    control[:, given] = images[:, given]
    return control


def video_of(
    images: Tensor,  # [B, F, 3, H, W] in [0, 1]
) -> Tensor:  # [B, 3, F, H, W] in [-1, 1]
    """What the appearance VAE encodes."""
    return (2 * images - 1).transpose(1, 2)


def appearance_posterior(pipeline: Gen3RPipeline, images: Tensor) -> Posterior:
    """The frozen appearance VAE's posterior of images [B, F, 3, H, W] in [0, 1]."""
    vae = pipeline.wan_vae
    with vae.encoder_products():
        return vae.encode(video_of(images).to(vae.encoder_dtype), WORKING_GIB)


@torch.no_grad()
def encode_texts(
    pipeline: Gen3RPipeline, prompts: Sequence[str], device: torch.device
) -> EncodedTexts:
    """Features of all prompts, in batches."""
    length = pipeline.config.transformer.text_len
    ids = tokenize(pipeline.tokenizer, list(prompts), length, device)
    mask = ids != cast(int, pipeline.tokenizer.pad_token_id)
    parts = [
        encode_text(pipeline.text_encoder, i, m.long()) * m[..., None]
        for i, m in zip(ids.split(PROMPTS_A_BATCH), mask.split(PROMPTS_A_BATCH), strict=True)
    ]
    features = F.pad(torch.cat(parts), (0, 0, 0, length - ids.shape[1]))
    return EncodedTexts(features, mask.sum(1, dtype=torch.int32))


def image_batches(
    clips: Clips, limit: int = STATISTICS_CLIPS, batch: int = CLIPS_A_BATCH
) -> Iterator[Tensor]:  # [B, F, 3, H, W] float32 in [0, 1]
    """The frames of at most `limit` clips, evenly spread over all, in batches."""
    device, frames = clips.rgb.device, clips.rgb.shape[1]
    count = min(limit, len(clips))
    numbers = torch.arange(count, device=device) * len(clips) // count
    every = torch.arange(frames, device=device)
    for part in numbers.split(batch):
        yield taken(clips, part, every.expand(len(part), -1))[0]


@torch.no_grad()
def measure_statistics(
    autoencoder: VideoAutoencoder,
    batches: Iterable[Tensor],  # [B, C, F, H, W] each: what it encodes
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel of the drawn latents, before any scaling.

    Raises
    ------
    ValueError : no batch.
    """
    dtype = next(autoencoder.model.encoder.parameters()).dtype
    sums: list[Tensor] = []
    for x in batches:
        moments = autoencoder.moments(x.to(dtype), WORKING_GIB).double()
        mu, logvar = moments.transpose(0, 1).flatten(1).chunk(2)
        second = mu.square() + logvar.clamp(max=20.0).exp()
        ones = torch.ones_like(mu)
        sums.append(torch.stack([value.sum(1) for value in (mu, second, ones)]))
    if not sums:
        raise ValueError("there is nothing to measure latents on; give at least one clip")
    total, second, count = torch.stack(sums).sum(0)
    mean = total / count
    std = (second / count - mean.square()).clamp(min=1e-8).sqrt()
    return _plain(mean), _plain(std)


def _plain(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values.tolist())


@torch.no_grad()
def set_statistics(
    pipeline: Gen3RPipeline, name: str, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Let the autoencoder ``wan_vae`` or ``geo_adapter`` scale its latents by these, from now on.

    In the module, in its config and in the pipeline's. The pipeline scales means but not log
    variances; so that the draws stay those of the trained posterior, the shift of the log variances
    by -2 log(std) goes into the bias of the encoder's last convolution.

    Raises
    ------
    ValueError : another number of channels than the autoencoder has, or a deviation that is not
        positive.
    """
    if not all(value > 0 for value in std):
        raise ValueError(f"{name}: latent deviations {list(std)} must all be > 0")
    module = cast(VideoAutoencoder, getattr(pipeline, name))
    config = dataclasses.replace(
        getattr(pipeline.config, name), latents_mean=tuple(mean), latents_std=tuple(std)
    )
    bias = cast(Tensor, cast(nn.Conv3d, module.model.conv1).bias)
    change = torch.tensor(module.latents_std) / torch.tensor(config.latents_std)
    bias[module.latent_channels :] += 2 * change.log().to(bias)
    module.latents_mean, module.latents_std = config.latents_mean, config.latents_std
    module.config = config
    pipeline.config = dataclasses.replace(pipeline.config, **{name: config})


def clear_statistics(pipeline: Gen3RPipeline, name: str) -> None:
    """Let an autoencoder's latents be as its encoder makes them: so they are while it learns."""
    channels = getattr(pipeline, name).latent_channels
    set_statistics(pipeline, name, (0.0,) * channels, (1.0,) * channels)
