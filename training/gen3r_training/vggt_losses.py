"""Losses of a VGGT that is trained from exact depth, world points and cameras.

Source: VGGT (arXiv 2503.11651, section 3.4). Camera: Huber error of the pose encoding over the
camera head's iterations, weighted by 0.6^(n-1-i). Depth and points, with confidence c, error e and
the error g of the gradient over the image:

    mean over known pixels of  c e - alpha log c,    and of  c g.

Added to these: the error of the relative pose of every pair of views. Cameras of one clip are near
each other, so an error that is small beside the scene can turn the direction between two of them;
this term divides it by their distance.

The camera errors are quadratic near 0, not absolute. Most moves leave most entries of a pose at
exactly 0, and an absolute error is then least at 0 (the median) until a model is more than half
sure that something moved: it has nothing to climb.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r.cameras import quaternion_to_matrix
from gen3r_training.losses import CAMERA_WEIGHTS, ERROR_LIMIT

DECAY = 0.6  # of the camera terms, from one iteration to the one before
CORNER = 0.05  # of the Huber errors of poses (scene units, quaternion entries, radians)
DIRECTION_CORNER = 0.25  # of that of directions, in about the sine of their angle


@dataclass(frozen=True)
class VGGTLossConfig:
    """Weights of the terms.

    Parameters
    ----------
    camera, pairs : of the pose encodings and of the relative poses of all pairs of views.
    depth, points : of the confidence-weighted error of either map.
    gradient : of the error of either map's gradient, beside its error.
    alpha : of the logarithm of the confidence.
    pair_floor : distance of two cameras (scene units) below which their direction counts less and
        less.

    Raises
    ------
    ValueError : a negative weight, or an `alpha` or `pair_floor` that is not positive.
    """

    camera: float = 5.0
    pairs: float = 1.0
    depth: float = 1.0
    points: float = 1.0
    gradient: float = 1.0
    alpha: float = 0.2
    pair_floor: float = 0.05

    def __post_init__(self) -> None:
        for name in ("camera", "pairs", "depth", "points", "gradient"):
            if getattr(self, name) < 0:
                raise ValueError(f"VGGT loss: {name} {getattr(self, name)} must be at least 0")
        for name in ("alpha", "pair_floor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"VGGT loss: {name} {getattr(self, name)} must be above 0")


def masked_mean(
    values: Tensor,  # any shape
    mask: Tensor,  # same, bool
) -> Tensor:  # scalar
    """Mean of the values where the mask is set; 0 where it is set nowhere."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def gradient_error(
    difference: Tensor,  # [..., H, W, C] prediction minus target
    mask: Tensor,  # [..., H, W] bool
) -> tuple[Tensor, Tensor]:  # both [..., H - 1, W - 1]: error, and where it is known
    """Length over C of the difference's step to the right plus that of its step down.

    The gradient of a difference is the difference of the gradients. Known where all three pixels
    are.
    """
    here = difference[..., :-1, :-1, :]
    right = torch.linalg.vector_norm(difference[..., :-1, 1:, :] - here, dim=-1)
    below = torch.linalg.vector_norm(difference[..., 1:, :-1, :] - here, dim=-1)
    known = mask[..., :-1, :-1] & mask[..., :-1, 1:] & mask[..., 1:, :-1]
    return right + below, known


def confidence_loss(
    prediction: Tensor,  # [..., H, W, C] float32
    confidence: Tensor,  # [..., H, W] float32, above 0
    target: Tensor,  # [..., H, W, C] float32
    mask: Tensor,  # [..., H, W] bool, pixels that count
    alpha: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:  # scalars
    """Confidence-weighted error, confidence-weighted error of the gradient, and the plain error.

    Errors are lengths over C, cut at `ERROR_LIMIT` so that one pixel cannot rule a step.

    Raises
    ------
    ValueError : shapes that do not fit.
    """
    if prediction.shape != target.shape or not (
        confidence.shape == mask.shape == prediction.shape[:-1]
    ):
        raise ValueError(
            f"prediction {list(prediction.shape)}, target {list(target.shape)}, confidence "
            f"{list(confidence.shape)} and mask {list(mask.shape)} do not fit; expected twice "
            "[..., H, W, C] and twice [..., H, W]"
        )
    difference = torch.where(mask[..., None], prediction - target, 0.0)
    error = torch.linalg.vector_norm(difference, dim=-1).clamp(max=ERROR_LIMIT)
    weighted = masked_mean(error * confidence - alpha * confidence.log(), mask)
    steps, known = gradient_error(difference, mask)
    steps = steps.clamp(max=ERROR_LIMIT) * confidence[..., :-1, :-1]
    return weighted, masked_mean(steps, known), masked_mean(error.detach(), mask)


def relative_poses(
    pose: Tensor,  # [..., S, 9] pose encodings
) -> tuple[Tensor, Tensor]:  # rotation [..., P, 3, 3], translation [..., P, 3]
    """What maps camera i's coordinates to camera j's, R_ij = R_j R_i^T and t_j - R_ij t_i, i < j.

    The P = S (S - 1) / 2 pairs come in the order of `torch.triu_indices`. Products are written out:
    matrix units would round them to TF32 where that is allowed.
    """
    views = pose.shape[-2]
    first, second = torch.triu_indices(views, views, 1, device=pose.device)
    rotation, translation = quaternion_to_matrix(pose[..., 3:7]), pose[..., :3]
    start = rotation[..., first, :, :]
    between = (rotation[..., second, :, :].unsqueeze(-2) * start.unsqueeze(-3)).sum(-1)
    moved = (between * translation[..., first, :].unsqueeze(-2)).sum(-1)
    return between, translation[..., second, :] - moved


def _over_iterations(errors: Tensor) -> Tensor:
    """Sum of errors [n] weighted by DECAY^(n-1-i), divided by n."""
    count = len(errors)
    decay = DECAY ** torch.arange(count - 1, -1, -1, device=errors.device)
    return (decay * errors).sum() / count


def _huber(error: Tensor, corner: float) -> Tensor:
    """error^2 / (2 corner) below the corner, error - corner / 2 above it, cut at `ERROR_LIMIT`."""
    error = error.clamp(min=-ERROR_LIMIT, max=ERROR_LIMIT)
    return F.smooth_l1_loss(error, torch.zeros_like(error), reduction="none", beta=corner)


def pose_loss(
    predictions: Sequence[Tensor],  # one [B, S, 9] per iteration, the last one is the best
    target: Tensor,  # [B, S, 9]
) -> Tensor:  # scalar
    """Huber errors of translation, quaternion and (half) field of view, over the iterations."""
    error = _huber(torch.stack(list(predictions)) - target, CORNER)
    parts = [part.mean((-3, -2, -1)) for part in error.split((3, 4, 2), -1)]
    weighted = torch.stack([w * part for w, part in zip(CAMERA_WEIGHTS, parts, strict=True)])
    return _over_iterations(weighted.sum(0))


def pair_loss(
    predictions: Sequence[Tensor],  # one [B, S, 9] per iteration, the last one is the best
    target: Tensor,  # [B, S, 9]
    floor: float = 0.05,
) -> Tensor:  # scalar
    """Huber errors of all pairs' relative poses over the iterations.

    Translation: the length of the error times D / (D^2 + floor^2) for cameras D apart, about the
    sine of the angle between both directions, and 0 for cameras at one place. Rotation: the
    Frobenius norm, about 1.4 times the angle in radians. One view has no pairs: 0.
    """
    if target.shape[1] == 1:
        return torch.zeros((), device=target.device)
    rotation, translation = relative_poses(torch.stack(list(predictions)))
    true_rotation, true_translation = relative_poses(target)
    distance = torch.linalg.vector_norm(true_translation, dim=-1)
    moved = torch.linalg.vector_norm(translation - true_translation, dim=-1)
    moved = moved * (distance / (distance.square() + floor**2))
    turned = torch.linalg.matrix_norm(rotation - true_rotation)
    error = _huber(moved, DIRECTION_CORNER) + _huber(turned, CORNER)
    return _over_iterations(error.mean((-2, -1)))


@dataclass(frozen=True)
class VGGTPrediction:
    """What the three heads return."""

    poses: Sequence[Tensor]  # one [B, S, 9] per iteration
    depth: Tensor  # [B, D, H, W, 1], of D of the S frames, as all maps
    depth_confidence: Tensor  # [B, D, H, W]
    points: Tensor  # [B, D, H, W, 3]
    point_confidence: Tensor  # [B, D, H, W]


def vggt_loss(
    prediction: VGGTPrediction,
    depth: Tensor,  # [B, D, H, W] float32, 0 where none is known
    points: Tensor,  # [B, D, H, W, 3] float32
    pose: Tensor,  # [B, S, 9] float32
    config: VGGTLossConfig,
) -> tuple[Tensor, dict[str, Tensor]]:  # scalar; detached scalars
    """The weighted sum of all terms, and each of them (`depth_error` and `point_error`: the plain
    mean errors, in scene units)."""
    mask = depth > 0
    alpha = config.alpha
    camera = pose_loss(prediction.poses, pose)
    pairs = pair_loss(prediction.poses, pose, config.pair_floor)
    depth_term, depth_steps, depth_error = confidence_loss(
        prediction.depth, prediction.depth_confidence, depth[..., None], mask, alpha
    )
    point_term, point_steps, point_error = confidence_loss(
        prediction.points, prediction.point_confidence, points, mask, alpha
    )
    total = (
        config.camera * camera
        + config.pairs * pairs
        + config.depth * (depth_term + config.gradient * depth_steps)
        + config.points * (point_term + config.gradient * point_steps)
    )
    logs = {
        "camera": camera,
        "pairs": pairs,
        "depth": depth_term,
        "depth_gradient": depth_steps,
        "depth_error": depth_error,
        "points": point_term,
        "point_gradient": point_steps,
        "point_error": point_error,
    }
    return total, {name: value.detach() for name, value in logs.items()}
