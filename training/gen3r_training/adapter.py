"""One step of stage 1: the geometry adapter learns to compress VGGT's tokens.

Frames go through the frozen VGGT; its token map is encoded, sampled and decoded by the adapter. The
loss compares the tokens, what VGGT's heads read from them, and the adapter's posterior with the
frozen appearance VAE's of the same frames (the alignment of both latent spaces: Gen3R, arXiv
2601.04090, section 3.2). The heads are frozen, but the loss is differentiated through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r.appearance_vae import AppearanceVAE
from gen3r.causal_video import Posterior
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.vggt import VGGT, token_map, token_views
from gen3r.vggt.tokens import NUM_LISTS
from gen3r_training import activations
from gen3r_training.losses import adaptive_weight, camera_loss, dense_loss, gaussian_kl

RECOMPUTED_FRAMES = 4  # of the dense heads, whose activations at full size are held at once


@dataclass(frozen=True)
class AdapterLossConfig:
    """Weights of stage 1's terms; the defaults are upstream's.

    Parameters
    ----------
    recon, similarity : of the summed reconstruction terms and of the cosine distance.
    align_kl : of the KL to the appearance VAE's posterior; 0 takes the KL to N(0, 1) instead.
    align_scale : further factor of the alignment KL (not of the KL to N(0, 1)).
    normal_kl : of the KL to N(0, 1), where that is taken.
    full_kl : sum the KL over all axes of the latents, see `gaussian_kl`.
    image_beta, camera_beta : corners of the smooth L1 of image tokens and mean camera tokens.
    camera, depth, point : within the reconstruction, of what the heads read.

    Raises
    ------
    ValueError : a negative weight, or a beta that is not positive.
    """

    recon: float = 0.5
    similarity: float = 0.1
    align_kl: float = 2.0
    align_scale: float = 0.1
    normal_kl: float = 1.0
    full_kl: bool = False
    image_beta: float = 0.15
    camera_beta: float = 0.1
    camera: float = 10.0
    depth: float = 2.0
    point: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("beta") and not value > 0:
                raise ValueError(f"{name} {value} must be > 0")
            if not value >= 0:
                raise ValueError(f"loss weight {name} {value} must not be negative")


@dataclass(frozen=True)
class AdapterStep:
    """loss: scalar with gradient; logs: each term by name; kl, kl_weight: the KL before its
    weights.
    """

    loss: Tensor
    logs: dict[str, float]
    kl: float
    kl_weight: float


@dataclass(frozen=True)
class AdapterTerms:
    """The parts of stage 1's loss, 0-d tensors with gradient.

    parts : smooth L1 terms and head terms by name; recon : their weighted sum times its weight
    cosine, kl : before their weights; kl_factor : weight of the KL beside the adaptive one
    posterior : of the adapter, float32
    """

    parts: dict[str, Tensor]
    recon: Tensor
    cosine: Tensor
    kl: Tensor
    kl_factor: float
    posterior: Posterior


@torch.no_grad()
def vggt_token_maps(
    vggt: VGGT,
    frames: Tensor,  # [B, F, 3, H, W] in [0, 1]
) -> Tensor:  # [B, 10 C, F, H / 14, W / 14]
    """VGGT's tokens of the frames as the map that the adapter encodes (behaviour 7)."""
    patch = vggt.config.patch_size
    rows, columns = frames.shape[-2] // patch, frames.shape[-1] // patch
    tokens = token_map(vggt.aggregator(frames), rows, columns, vggt.aggregator.num_special_tokens)
    return tokens.permute(0, 4, 1, 2, 3)


def adapter_step(
    adapter: GeometryAdapter,
    vggt: VGGT,
    vae: AppearanceVAE,
    frames: Tensor,  # [B, F, 3, H, W] in [0, 1]
    noise: Tensor,  # [B, 16, f, H / 8, W / 8] standard normal, of the posterior's sample
    config: AdapterLossConfig | None = None,
    *,
    recompute: str = "none",
) -> AdapterStep:
    """The loss of one batch; call ``.loss.backward()`` for the adapter's gradients.

    VGGT and the VAE should have ``requires_grad_(False)``. The three modules may differ in dtype.

    recompute : which activations of losses and heads are computed again in the backward pass, one
        of `gen3r_training.activations.MODES`.

    Raises
    ------
    ValueError : frames whose size or number the modules do not take.
    """
    target = vggt_token_maps(vggt, frames)
    with torch.no_grad():
        reference = vae.encode((2 * frames - 1).transpose(1, 2).to(vae.encoder_dtype))
    return adapter_loss(adapter, vggt, target, reference, noise, config, recompute=recompute)


def adapter_loss(
    adapter: GeometryAdapter,
    vggt: VGGT,
    target: Tensor,  # [B, 10 C, F, h, w] token maps of `vggt_token_maps`, in the dtype of VGGT
    reference: Posterior,  # of [B, 16, f, 1.75 h, 1.75 w], the appearance latents of the frames
    noise: Tensor,  # [B, 16, f, 1.75 h, 1.75 w] standard normal, of the posterior's sample
    config: AdapterLossConfig | None = None,
    *,
    recompute: str = "none",
    dtype: torch.dtype | None = None,
) -> AdapterStep:
    """`adapter_step` of a clip that VGGT and the VAE have encoded. Losses are float32.

    dtype : what the adapter computes in; None: the dtype of its weights (sharded ones are float32
        and compute in bf16).
    """
    config = config or AdapterLossConfig()
    terms = adapter_terms(
        adapter, vggt, target, reference, noise, config, recompute=recompute, dtype=dtype
    )
    recon, kl = terms.recon, terms.kl
    values = recon.item(), kl.item()
    weight = adaptive_weight(*values) if all(map(math.isfinite, values)) else 1.0
    regular = terms.kl_factor * weight * kl
    loss = recon + config.similarity * terms.cosine + regular

    logs = {name: term.item() for name, term in terms.parts.items()}
    logs |= {"loss": loss.item(), "recon_loss": recon.item(), "cosine": terms.cosine.item()}
    logs |= {"kl": kl.item(), "kl_weight": terms.kl_factor * weight}
    if config.align_kl > 0:
        logs["align_loss"] = regular.item()
    logs |= _statistics(terms.posterior) | {
        f"{name}_wan": value for name, value in _statistics(in_float32(reference)).items()
    }
    return AdapterStep(loss, logs, kl.item(), weight)


def adapter_terms(
    adapter: GeometryAdapter,
    vggt: VGGT,
    target: Tensor,  # [B, 10 C, F, h, w], in the dtype of VGGT
    reference: Posterior,  # of [B, 16, f, 1.75 h, 1.75 w]
    noise: Tensor,  # [B, 16, f, 1.75 h, 1.75 w] standard normal
    config: AdapterLossConfig,
    *,
    recompute: str = "none",
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,  # [10 C] float32
    disturbance: Tensor | None = None,  # [B, 16, f, 1.75 h, 1.75 w]
) -> AdapterTerms:
    """The parts of `adapter_loss`, which never wait for a GPU.

    Parameters
    ----------
    scale : what tokens are divided by before they are compared, one value a channel; None: 1.
    disturbance : added to the drawn latents, in deviations of each channel over this batch, so that
        the decoder learns to bear latents that are not quite an encoder's. None: nothing.
    """
    dtype = dtype or next(adapter.parameters()).dtype
    patch = vggt.config.patch_size
    encoded = adapter.encode(target.to(dtype))
    latents = encoded.sample(noise.to(dtype))
    if disturbance is not None:
        deviation = encoded.mean.detach().float().std(dim=(0, 2, 3, 4), keepdim=True)
        latents = latents + (deviation * disturbance).to(dtype)
    decoded = adapter.decode(latents).to(target.dtype)
    posterior, reference = in_float32(encoded), in_float32(reference)
    if scale is None:
        parts, cosine = token_terms(decoded, target, config, recompute)
    else:
        parts, cosine = scaled_token_terms(decoded, target, config, scale)
    size = target.shape[-2] * patch, target.shape[-1] * patch
    parts |= head_terms(vggt, decoded, target, *size, recompute)
    weights = {"camera_loss": config.camera, "depth_loss": config.depth, "point_loss": config.point}
    weighted = [weights.get(name, 1.0) * term for name, term in parts.items()]
    recon = config.recon * torch.stack(weighted).sum()

    aligned = config.align_kl > 0
    other = (reference.mean, reference.logvar) if aligned else (None, None)
    kl = gaussian_kl(posterior.mean, posterior.logvar, *other, full=config.full_kl).mean()
    factor = config.align_kl * config.align_scale if aligned else config.normal_kl
    return AdapterTerms(parts, recon, cosine, kl, factor, posterior)


def token_terms(
    decoded: Tensor,  # [B, 10 C, F, h, w]
    target: Tensor,  # [B, 10 C, F, h, w]
    config: AdapterLossConfig,
    recompute: str = "none",
) -> tuple[dict[str, Tensor], Tensor]:  # the two smooth L1 terms, the cosine distance
    """Distances of the image tokens and of the spatial mean of the camera tokens, in float32.

    Frame by frame: float32 copies of whole token maps would be 3 GB each at 49 frames of 560 px.
    """
    run = activations.recompute(recompute)
    pairs = zip(decoded.unbind(2), target.unbind(2), strict=True)
    rows = [run(_frame_terms, a, b, config) for a, b in pairs]
    return _named(torch.stack(rows).mean(0))


def scaled_token_terms(
    decoded: Tensor,  # [B, 10 C, F, h, w]
    target: Tensor,  # [B, 10 C, F, h, w]
    config: AdapterLossConfig,
    scale: Tensor,  # [10 C] float32
) -> tuple[dict[str, Tensor], Tensor]:
    """`token_terms` of tokens divided by `scale`, all frames at once."""
    a, b = (x.transpose(1, 2).flatten(0, 1) / scale[:, None, None] for x in (decoded, target))
    return _named(_frame_terms(a, b, config))


def _named(terms: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    image, camera, distance = terms.unbind()
    return {"image_token_loss": image, "camera_token_loss": camera}, distance


def _frame_terms(
    decoded: Tensor,  # [B, 10 C, h, w]
    target: Tensor,  # [B, 10 C, h, w]
    config: AdapterLossConfig,
) -> Tensor:  # [3] float32: both smooth L1 means, the cosine distance
    channels = decoded.shape[1] // (NUM_LISTS + 1) * NUM_LISTS
    decoded, target = decoded.float(), target.float()
    image, camera = decoded[:, :channels], decoded[:, channels:].mean(dim=(-2, -1))
    image_target, camera_target = target[:, :channels], target[:, channels:].mean(dim=(-2, -1))
    image_cosine = F.cosine_similarity(image, image_target, dim=1).mean()
    camera_cosine = F.cosine_similarity(camera, camera_target, dim=1).mean()
    return torch.stack(
        [
            F.smooth_l1_loss(image, image_target, beta=config.image_beta),
            F.smooth_l1_loss(camera, camera_target, beta=config.camera_beta),
            (1 - image_cosine) + (1 - camera_cosine),
        ]
    )


def head_terms(
    vggt: VGGT,
    decoded: Tensor,  # [B, 10 C, F, h, w]
    target: Tensor,  # [B, 10 C, F, h, w]
    height: int,
    width: int,
    recompute: str = "none",
) -> dict[str, Tensor]:
    """Camera, depth and point losses between what the heads read from the decoded and the true
    tokens.
    """
    with torch.no_grad():
        true_poses = _poses(vggt, target)
        true_maps = _dense_maps(vggt, target, height, width)
    frames, run = decoded.shape[2], activations.recompute(recompute)
    step = frames if recompute == "none" else RECOMPUTED_FRAMES
    dense = torch.zeros(2, device=decoded.device)
    for start in range(0, frames, step):
        part = slice(start, start + step)
        true_part = [values[:, part] for values in true_maps]
        arguments = vggt, decoded[:, :, part], true_part, height, width
        share = true_part[0].shape[1] / frames
        dense = dense + share * run(_dense_losses, *arguments)
    return {
        "camera_loss": camera_loss(_poses(vggt, decoded), true_poses),
        "depth_loss": dense[0],
        "point_loss": dense[1],
    }


def _dense_losses(
    vggt: VGGT, tokens: Tensor, true_maps: Sequence[Tensor], height: int, width: int
) -> Tensor:  # [2]: depth and point loss
    maps = _dense_maps(vggt, tokens, height, width)
    return torch.stack([dense_loss(a, b) for a, b in zip(maps, true_maps, strict=True)])


def read_heads(
    vggt: VGGT,
    tokens: Tensor,  # [B, 10 C, F, h, w]
    height: int,
    width: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Poses of every iteration [B, F, 9], depth [B, F, H, W, 1], points [B, F, H, W, 3]."""
    return _poses(vggt, tokens), *_dense_maps(vggt, tokens, height, width)


def _poses(
    vggt: VGGT,
    tokens: Tensor,  # [B, 10 C, F, h, w]
) -> list[Tensor]:  # one [B, F, 9] per iteration
    return vggt.camera_head(token_views(tokens.permute(0, 2, 3, 4, 1))[1])


def _dense_maps(
    vggt: VGGT,
    tokens: Tensor,  # [B, 10 C, F, h, w]
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # depth [B, F, H, W, 1], points [B, F, H, W, 3]
    layers, _ = token_views(tokens.permute(0, 2, 3, 4, 1))
    depth, _ = vggt.depth_head(layers, height, width, patch_start_idx=0)
    points, _ = vggt.point_head(layers, height, width, patch_start_idx=0)
    return depth, points


def in_float32(posterior: Posterior) -> Posterior:
    """The same distribution in float32."""
    return Posterior(posterior.mean.float(), posterior.logvar.float())


def _statistics(posterior: Posterior) -> dict[str, float]:
    """Mean and spread of the means, and the mean deviation."""
    mean, deviation = posterior.mean.detach(), (0.5 * posterior.logvar.detach()).exp()
    return {
        "mean": mean.mean().item(),
        "mean_std": mean.std().item(),
        "std": deviation.mean().item(),
    }
