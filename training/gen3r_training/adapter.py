"""One step of stage 1: the geometry adapter learns to compress VGGT's tokens.

Frames go through the frozen VGGT; its token map is encoded, sampled and decoded by the adapter. The
loss compares the tokens, what VGGT's heads read from them, and the adapter's posterior with the
frozen appearance VAE's of the same frames (the alignment of both latent spaces: Gen3R, arXiv
2601.04090, section 3.2). The heads are frozen, but the loss is differentiated through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r.appearance_vae import AppearanceVAE
from gen3r.causal_video import Posterior
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.vggt import VGGT, token_list, token_map
from gen3r.vggt.tokens import NUM_LISTS
from gen3r_training.losses import adaptive_weight, camera_loss, dense_loss, gaussian_kl


@dataclass(frozen=True)
class AdapterLossConfig:
    """Weights of stage 1's terms; the defaults are upstream's.

    Parameters
    ----------
    recon, similarity : of the summed reconstruction terms and of the cosine distance.
    align_kl : of the KL to the appearance VAE's posterior; 0 takes the KL to N(0, 1) instead.
    align_scale : further factor of the alignment KL (not of the KL to N(0, 1)).
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
) -> AdapterStep:
    """The loss of one batch; call ``.loss.backward()`` for the adapter's gradients.

    VGGT and the VAE should have ``requires_grad_(False)``.

    Raises
    ------
    ValueError : frames whose size or number the modules do not take.
    """
    config = config or AdapterLossConfig()
    target = vggt_token_maps(vggt, frames)
    posterior = adapter.encode(target)
    decoded = adapter.decode(posterior.sample(noise))
    terms, cosine = token_terms(decoded, target, config)
    terms |= head_terms(vggt, decoded, target, frames.shape[-2], frames.shape[-1])
    weights = {"camera_loss": config.camera, "depth_loss": config.depth, "point_loss": config.point}
    weighted = [weights.get(name, 1.0) * term for name, term in terms.items()]
    recon = config.recon * torch.stack(weighted).sum()
    with torch.no_grad():
        reference = vae.encode((2 * frames - 1).transpose(1, 2).to(posterior.mean.dtype))

    aligned = config.align_kl > 0
    other = (reference.mean, reference.logvar) if aligned else (None, None)
    kl = gaussian_kl(posterior.mean, posterior.logvar, *other).mean()
    weight = adaptive_weight(recon.item(), kl.item())
    regular = weight * kl * (config.align_kl * config.align_scale if aligned else 1.0)
    loss = recon + config.similarity * cosine + regular

    logs = {name: term.item() for name, term in terms.items()}
    logs |= {"loss": loss.item(), "recon_loss": recon.item()}
    if aligned:
        logs["align_loss"] = regular.item()
    logs |= _statistics(posterior) | {
        f"{name}_wan": value for name, value in _statistics(reference).items()
    }
    return AdapterStep(loss, logs, kl.item(), weight)


def token_terms(
    decoded: Tensor,  # [B, 10 C, F, h, w]
    target: Tensor,  # [B, 10 C, F, h, w]
    config: AdapterLossConfig,
) -> tuple[dict[str, Tensor], Tensor]:  # the two smooth L1 terms, the cosine distance
    """Distances of the image tokens and of the spatial mean of the camera tokens."""
    channels = decoded.shape[1] // (NUM_LISTS + 1) * NUM_LISTS
    image, camera = decoded[:, :channels], decoded[:, channels:].mean(dim=(-2, -1))
    image_target, camera_target = target[:, :channels], target[:, channels:].mean(dim=(-2, -1))
    terms = {
        "image_token_loss": F.smooth_l1_loss(image, image_target, beta=config.image_beta),
        "camera_token_loss": F.smooth_l1_loss(camera, camera_target, beta=config.camera_beta),
    }
    image_cosine = F.cosine_similarity(image, image_target, dim=1).mean()
    camera_cosine = F.cosine_similarity(camera, camera_target, dim=1).mean()
    return terms, (1 - image_cosine) + (1 - camera_cosine)


def head_terms(
    vggt: VGGT,
    decoded: Tensor,  # [B, 10 C, F, h, w]
    target: Tensor,  # [B, 10 C, F, h, w]
    height: int,
    width: int,
) -> dict[str, Tensor]:
    """Camera, depth and point losses between what the heads read from the decoded and the true
    tokens.
    """
    poses, depth, points = _read_heads(vggt, decoded, height, width)
    with torch.no_grad():
        true_poses, true_depth, true_points = _read_heads(vggt, target, height, width)
    return {
        "camera_loss": camera_loss(poses, true_poses),
        "depth_loss": dense_loss(depth, true_depth),
        "point_loss": dense_loss(points, true_points),
    }


def _read_heads(
    vggt: VGGT, tokens: Tensor, height: int, width: int
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    special = vggt.aggregator.num_special_tokens
    lists = token_list(tokens.permute(0, 2, 3, 4, 1), special)
    depth, _ = vggt.depth_head(lists, height, width, special)
    points, _ = vggt.point_head(lists, height, width, special)
    return vggt.camera_head(lists[-1]), depth, points


def _statistics(posterior: Posterior) -> dict[str, float]:
    """Mean and spread of the means, and the mean deviation."""
    mean, deviation = posterior.mean.detach(), (0.5 * posterior.logvar.detach()).exp()
    return {
        "mean": mean.mean().item(),
        "mean_std": mean.std().item(),
        "std": deviation.mean().item(),
    }
