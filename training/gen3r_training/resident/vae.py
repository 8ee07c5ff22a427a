"""The appearance VAE at small size: reconstruction and a weak pull of the posterior to N(0, 1).

No adversary and no perceptual network: at 112 pixels squared error decides what is recognised, and
both would need weights from elsewhere. Clips are mirrored, played backwards and tinted; some are
control videos as inference makes them (`gen3r.conditioning`): one or two frames, black between.
Source of the form of the loss: latent diffusion (arXiv 2112.10752), Wan2.1 (arXiv 2503.20314).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r.pipeline import Gen3RPipeline
from gen3r_training.procedural import Clips
from gen3r_training.resident.config import ResidentConfig
from gen3r_training.resident.latents import (
    clear_statistics,
    image_batches,
    measure_statistics,
    set_statistics,
    video_of,
)

FRAMES = (17, 9, 5)  # of a batch, which has as many frames in all in each case
SHARES = (0.4, 0.3, 0.3)
MASKED = 0.15  # share of control videos
TINT = 0.15  # most that a channel's brightness changes
SQUARED, ABSOLUTE = 5.0, 0.3  # weights of both errors, of pixels in [-1, 1]
KL = 3e-4  # of the mean over latent values
# Most noise that latents get before they are decoded, as a share of their deviation: the
# transformer's are not quite an encoder's.
DISTURBANCE = 0.15
EVALUATED = 16  # clips at a time


@dataclass(frozen=True)
class VAEBatch:
    """A batch, in the model's dtype.

    frames : [B, 3, T, H, W] in [-1, 1]
    noise : [B, 16, t, h, w] of the posterior's draw
    disturbance : [B, 16, t, h, w], in deviations of the latents
    """

    frames: Tensor
    noise: Tensor
    disturbance: Tensor


class VAEObjective:
    """See `gen3r_training.resident.objective.Objective`."""

    def __init__(
        self, pipeline: Gen3RPipeline, train: Clips, held_out: Clips, options: ResidentConfig
    ) -> None:
        self.pipeline, self.train, self.held_out = pipeline, train, held_out
        self.module = pipeline.wan_vae
        self.components: dict[str, torch.nn.Module] = {"wan_vae": self.module}
        self.frames = train.rgb.shape[1]
        self._choice = torch.Generator().manual_seed(options.seed)
        clear_statistics(pipeline, "wan_vae")
        self.module.requires_grad_(True)

    def draw(self, generator: torch.Generator, count: int) -> VAEBatch:
        """`count` clips of all frames, or as many more as they are shorter."""
        # On the host: the number of frames is a shape, which the device must not decide.
        place = int(torch.multinomial(torch.tensor(SHARES), 1, generator=self._choice))
        length = min(FRAMES[place], self.frames)
        many = count * max(1, round(self.frames / length))
        rgb, device = self.train.rgb, self.train.rgb.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, device=device, generator=generator)

        clips = (uniform(many) * len(rgb)).long()
        first = (uniform(many) * (self.frames - length + 1)).long()
        steps = torch.arange(length, device=device)
        order = torch.where(uniform(many, 1) < 0.5, steps, length - 1 - steps)
        pixels = rgb[clips[:, None], first[:, None] + order]
        pixels = torch.where(_rows(uniform(many)) < 0.5, pixels, pixels.flip(3))
        tint = 1 + TINT * (2 * uniform(many, 1, 1, 1, 3) - 1)
        values = (pixels.float() / 255 * tint).clamp(max=1)
        values = values * _kept(uniform(many), steps)[:, :, None, None, None]
        video = (2 * values - 1).permute(0, 4, 1, 2, 3)
        shape = many, 16, 1 + (length - 1) // 4, *(side // 8 for side in video.shape[-2:])
        noise, other = torch.randn(2, *shape, device=device, generator=generator)
        other = DISTURBANCE * _rows(uniform(many)) * other
        dtype = self.module.encoder_dtype
        return VAEBatch(video.to(dtype).contiguous(), noise.to(dtype), other.to(dtype))

    def loss(self, batch: VAEBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared and absolute error of the pixels and the KL to N(0, 1)."""
        posterior = self.module.encode(batch.frames)
        latents = posterior.sample(batch.noise)
        deviation = latents.detach().float().std(dim=(0, 2, 3, 4), keepdim=True).to(latents)
        decoded = self.module.decode(latents + deviation * batch.disturbance).float()
        target = batch.frames.float()
        squared, absolute = F.mse_loss(decoded, target), F.l1_loss(decoded, target)
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = SQUARED * squared + ABSOLUTE * absolute + KL * kl
        # Pixels span 2, so that the peak's square is 4.
        psnr = -10 * (squared.detach() / 4).log10()
        return loss, {"psnr": psnr, "kl": kl.detach(), "absolute": absolute.detach()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """PSNR of held-out clips and of their first frames from the posterior's mean, dB."""
        clips, first = [], []
        for start in range(0, len(self.held_out.rgb), EVALUATED):
            video = self._video(self.held_out.rgb[start : start + EVALUATED])
            decoded = self.module.decode(self.module.encode(video).mean)
            error = (decoded.float() - video.float()).square() / 4
            clips.append(-10 * error.mean(dim=(1, 2, 3, 4)).log10())
            first.append(-10 * error[:, :, 0].mean(dim=(1, 2, 3)).log10())
        return {
            "psnr": torch.cat(clips).mean().item(),
            "psnr_first_frame": torch.cat(first).mean().item(),
        }

    def _video(self, rgb: Tensor) -> Tensor:  # uint8 [B, F, H, W, 3] to [B, 3, F, H, W]
        video = rgb.to(torch.float32).permute(0, 4, 1, 2, 3) / 127.5 - 1
        return video.to(self.module.encoder_dtype).contiguous()

    def finish(self) -> None:
        """Measure the latents' mean and deviation and give them to the model."""
        batches = (video_of(images) for images in image_batches(self.train))
        mean, std = measure_statistics(self.module, batches)
        set_statistics(self.pipeline, "wan_vae", mean, std)


def _rows(values: Tensor) -> Tensor:  # [B] to [B, 1, 1, 1, 1]
    return values.view(-1, 1, 1, 1, 1)


def _kept(
    draw: Tensor,  # [B] uniform
    steps: Tensor,  # [T]
) -> Tensor:  # [B, T]: 1 where the frame stays, 0 where it is black
    ends = (steps == 0) | (steps == len(steps) - 1)
    kept = torch.where(draw[:, None] < MASKED / 2, steps == 0, ends)
    return torch.where(draw[:, None] < MASKED, kept, torch.ones_like(kept)).float()
