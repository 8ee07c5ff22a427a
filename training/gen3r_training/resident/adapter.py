"""Stage 1 at small size: the geometry adapter learns the tokens of a small VGGT.

The loss is that of `gen3r_training.adapter`, for a whole batch and without waiting for the device.
Three things belong to training alone and change nothing of the model: tokens are divided by a scale
before they are compared, since those of a small VGGT are not of size 1; an untrained adapter starts
from values that suit a short training (`prepare`); the decoder is given slightly wrong latents, as
the diffusion transformer will give it (arXiv 2510.11690 trains decoders so).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from gen3r.causal_video import Posterior
from gen3r.geometry_adapter import GeometryAdapter, TokenDecoder, TokenEncoder
from gen3r.pipeline import Gen3RPipeline
from gen3r.stages import read_heads
from gen3r.vggt.tokens import NUM_LISTS
from gen3r_training.adapter import AdapterLossConfig, adapter_terms, in_float32, vggt_token_maps
from gen3r_training.losses import adaptive_weight_of
from gen3r_training.resident.latents import (
    WORKING_GIB,
    appearance_posterior,
    clear_statistics,
    image_batches,
    measure_statistics,
    set_statistics,
)
from gen3r_training.resident.vggt import relative_to_first, taken
from gen3r_training.resident.vggt_metrics import depth_errors, pose_auc, pose_errors

if TYPE_CHECKING:
    from gen3r_training.procedural import Clips
    from gen3r_training.resident.config import ResidentConfig

# Reconstruction rules; the pull towards the appearance latents is at most a hundredth of it. What
# the heads read counts more than in full-size training: a small adapter cannot keep all of a token.
WEIGHTS = AdapterLossConfig(
    recon=1.0, similarity=0.2, align_kl=0.01, align_scale=1.0, camera=50.0, depth=8.0, point=3.0
)
DISTURBANCE = 0.2  # deviations of the latents; of each clip between 0 and this
MEASURED, EVALUATED_AT_ONCE = 256, 16  # clips
LOGVAR = -6.0  # of an untrained adapter's draws: a twentieth of a latent of size 1
UNTRAINED = 0.02  # an adapter whose round trip keeps less of the tokens writes about nothing
LEAST_SCALE = 0.05  # of a block's: a channel that hardly varies is no reason to amplify it


@dataclass(frozen=True)
class AdapterBatch:
    """Clips as the frozen modules see them.

    target : [B, 10 C, F, h, w] token maps in VGGT's dtype
    mean, logvar : [B, 16, f, H / 8, W / 8] of the appearance posterior
    noise : same shape, of the adapter's own draw; disturbance : same, in deviations of the latents
    """

    target: Tensor
    mean: Tensor
    logvar: Tensor
    noise: Tensor
    disturbance: Tensor


class AdapterObjective:
    """Trains the pipeline's geometry adapter on resident clips.

    disturbance : most that latents are disturbed by, see `DISTURBANCE`.

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
        for split, clips in (("train", train), ("held-out", held_out)):
            if len(clips) == 0:
                raise ValueError(
                    f"adapter: no {split} clips; render some with `prepare procedural`"
                )
        self.pipeline, self.train, self.held_out = pipeline, train, held_out
        self.adapter: GeometryAdapter = pipeline.geo_adapter
        self.module: nn.Module = self.adapter
        self.components: dict[str, nn.Module] = {"geo_adapter": self.adapter}
        self.disturbance = DISTURBANCE
        clear_statistics(pipeline, "geo_adapter")
        mean, std = self._token_statistics()
        blocks = std.square().unflatten(0, (NUM_LISTS + 1, -1)).mean(1, keepdim=True).sqrt()
        blocks = blocks.clamp(min=1e-6).expand(-1, len(std) // (NUM_LISTS + 1)).flatten()
        self.scale = blocks
        if self._explained() < UNTRAINED:
            prepare(self.adapter, mean, torch.maximum(std, LEAST_SCALE * blocks))
        self.adapter.requires_grad_(True)

    @torch.no_grad()
    def _token_statistics(self) -> tuple[Tensor, Tensor]:  # [10 C] float32 each
        """Mean and deviation of every channel of the token maps."""
        sums: list[Tensor] = []
        for images in image_batches(self.train, MEASURED, EVALUATED_AT_ONCE):
            tokens = vggt_token_maps(self.pipeline.vggt, images).double()
            sums.append(torch.stack([t.mean((0, 2, 3, 4)) for t in (tokens, tokens.square())]))
        mean, second = torch.stack(sums).mean(0)
        return mean.float(), (second - mean.square()).clamp(min=0).sqrt().float()

    @torch.no_grad()
    def _explained(self) -> float:
        """Share of the tokens' squares, see `_squares`, that survives the round trip."""
        images = next(image_batches(self.train, EVALUATED_AT_ONCE, EVALUATED_AT_ONCE))
        tokens = vggt_token_maps(self.pipeline.vggt, images)
        error = self._squares(self._round_trip(tokens).float() - tokens)
        return float(1 - error / self._squares(tokens))

    def _squares(self, maps: Tensor) -> Tensor:  # [B, 10 C, F, h, w] to 0-d
        """Mean square in units of `scale`; of camera tokens as they are read: meant over space."""
        maps = maps / self.scale.view(-1, 1, 1, 1)
        lists = maps.shape[1] * NUM_LISTS // (NUM_LISTS + 1)
        image, camera = maps.tensor_split([lists], dim=1)
        squares = NUM_LISTS * image.square().mean() + camera.mean((-2, -1)).square().mean()
        return squares / (NUM_LISTS + 1)

    def _round_trip(self, tokens: Tensor) -> Tensor:
        """Encoded, the mean, decoded; in the dtype of the tokens."""
        given = tokens.to(next(self.adapter.parameters()).dtype)
        latents = self.adapter.encode(given, WORKING_GIB).mode()
        return self.adapter.decode(latents, WORKING_GIB).to(tokens.dtype)

    @torch.no_grad()
    def draw(self, generator: torch.Generator, count: int) -> AdapterBatch:
        """`count` clips, each mirrored with probability 1/2 and reversed in time with 1/2."""
        device, clips = self.train.rgb.device, self.train
        numbers = torch.randint(len(clips), (count,), generator=generator, device=device)
        flags = torch.rand(2, count, 1, 1, 1, 1, generator=generator, device=device) < 0.5
        images = clips.rgb[numbers].permute(0, 1, 4, 2, 3)
        images = torch.where(flags[0], images.flip(-1), images)
        images = torch.where(flags[1], images.flip(1), images).float() / 255
        reference = in_float32(appearance_posterior(self.pipeline, images))
        noise = torch.randn(2, *reference.mean.shape, generator=generator, device=device)
        level = torch.rand(count, 1, 1, 1, 1, generator=generator, device=device)
        return AdapterBatch(
            vggt_token_maps(self.pipeline.vggt, images),
            reference.mean,
            reference.logvar,
            noise[0],
            self.disturbance * level * noise[1],
        )

    def loss(self, batch: AdapterBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """See `gen3r_training.adapter.adapter_loss`; its terms by the same names."""
        terms = adapter_terms(
            self.adapter,
            self.pipeline.vggt,
            batch.target,
            Posterior(batch.mean, batch.logvar),
            batch.noise,
            WEIGHTS,
            scale=self.scale,
            disturbance=batch.disturbance,
        )
        regular = terms.kl_factor * adaptive_weight_of(terms.recon, terms.kl) * terms.kl
        loss = terms.recon + WEIGHTS.similarity * terms.cosine + regular
        logs = {**terms.parts, "cosine": terms.cosine, "kl": terms.kl, "align_loss": regular}
        logs["std"] = terms.posterior.mean.std()
        return loss, {name: value.detach() for name, value in logs.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """What VGGT's heads read from true and from decoded tokens, against the exact scene.

        abs_rel_vggt, abs_rel : of depth, medians of each clip aligned; abs_rel_increase : of both
        auc_vggt, auc : of pairwise poses, up to 30 degrees
        token_error : mean square distance of tokens, of their variance within the blocks
        """
        device, clips = self.held_out.rgb.device, self.held_out
        every = torch.arange(clips.rgb.shape[1], device=device)
        found: dict[str, list[Tensor]] = {}
        for part in torch.arange(len(clips), device=device).split(EVALUATED_AT_ONCE):
            views = relative_to_first(*taken(clips, part, every.expand(len(part), -1)))
            tokens = vggt_token_maps(self.pipeline.vggt, views.images)
            decoded = self._round_trip(tokens)
            found.setdefault("token_error", []).append(
                self._squares(decoded.float() - tokens)[None]
            )
            for suffix, maps in (("_vggt", tokens), ("", decoded)):
                depth, pose = read_geometry(self.pipeline, maps)
                turned, angle = pose_errors(pose, views.pose)
                values = {"abs_rel": depth_errors(depth, views.depth)[1], "turned": turned}
                for name, value in (values | {"angle": angle}).items():
                    found.setdefault(name + suffix, []).append(value.flatten())
        joined = {name: torch.cat(values) for name, values in found.items()}
        names = ("abs_rel_vggt", "abs_rel", "token_error")
        result = {name: float(joined[name].mean()) for name in names}
        result["abs_rel_increase"] = result["abs_rel"] - result["abs_rel_vggt"]
        for suffix in ("_vggt", ""):
            result["auc" + suffix] = pose_auc(joined["turned" + suffix], joined["angle" + suffix])
        return result

    def finish(self) -> None:
        """Measure the latents of the training clips; the pipeline scales by them from now on."""
        tokens = (vggt_token_maps(self.pipeline.vggt, x) for x in image_batches(self.train))
        set_statistics(self.pipeline, "geo_adapter", *measure_statistics(self.adapter, tokens))


def read_geometry(
    pipeline: Gen3RPipeline,
    tokens: Tensor,  # [B, 10 C, F, h, w]
) -> tuple[Tensor, Tensor]:  # depth [B, F, H, W] float32, pose encodings [B, F, 9] float32
    """What VGGT's depth and camera head read from token maps."""
    patch = pipeline.vggt.config.patch_size
    size = tokens.shape[-2] * patch, tokens.shape[-1] * patch
    maps = tokens.permute(0, 2, 3, 4, 1).to(next(pipeline.vggt.parameters()).dtype)
    read = read_heads(pipeline.vggt, maps, *size, frozenset({"depth", "cameras"}))
    assert read.depth is not None and read.pose_encoding is not None
    return read.depth.float(), read.pose_encoding.float()


@torch.no_grad()
def prepare(
    adapter: GeometryAdapter,
    mean: Tensor,  # [10 C] of the tokens
    std: Tensor,  # [10 C]
) -> None:
    """Starting values for a short training, in place.

    The adapter sees tokens as (x - mean) / std and writes them as mean + std y, by its first and
    last convolution, of which the last would first have to learn the tokens' scale. Its draws
    begin narrow, so that the decoder sees latents before it sees noise.
    """
    encoder = cast(TokenEncoder, adapter.model.encoder)
    decoder = cast(TokenDecoder, adapter.model.decoder)
    first = cast(nn.Conv2d, encoder.init_block.resample["1"])
    last = cast(nn.Conv2d, decoder.out_block.resample["2"])
    moments, means = adapter.model.conv1, adapter.latent_channels
    assert first.bias is not None and last.bias is not None and moments.bias is not None
    first.weight /= std.to(first.weight).view(1, -1, 1, 1)
    shift = (first.weight.float().sum((2, 3)) * mean).sum(1)
    first.bias -= shift.to(first.bias)
    last.weight *= std.to(last.weight).view(-1, 1, 1, 1)
    last.bias.copy_((last.bias.float() * std + mean).to(last.bias))
    moments.weight[means:] *= 0.1
    moments.bias[means:] = LOGVAR
