"""How well a VGGT does on views whose depth, points and cameras are known; batched."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen3r.vggt import VGGT, bootstrap
from gen3r.vggt.bootstrap import SCALE_OF_MEDIAN
from gen3r_training.vggt_losses import VGGTPrediction, masked_mean, relative_poses

if TYPE_CHECKING:
    from gen3r_training.resident.vggt import Views

LEAST_BASELINE = 0.01  # scene units; nearer cameras have no direction between them
THRESHOLD = 30  # degrees


def masked_median(
    values: Tensor,  # [B, ...]
    mask: Tensor,  # same, bool
) -> Tensor:  # [B], NaN where the mask is set nowhere
    """The lower median of each row's values where the mask is set."""
    return torch.where(mask, values, math.nan).flatten(1).nanmedian(dim=1).values


def depth_errors(
    prediction: Tensor,  # [B, S, H, W]
    truth: Tensor,  # [B, S, H, W], 0 where none is known
) -> tuple[Tensor, Tensor]:  # [B] each
    """AbsRel, the mean of |d - truth| / truth, as predicted and after scaling by the medians.

    One factor a clip: the quotient of the medians of truth and prediction over all its frames.
    """
    mask = truth > 0
    scale = masked_median(truth, mask) / masked_median(prediction, mask)
    results = []
    for depth in (prediction, prediction * scale[:, None, None, None]):
        error = (depth - truth).abs() / truth.clamp(min=1e-6)
        known = mask.flatten(1).sum(1).clamp(min=1)
        results.append(torch.where(mask, error, 0.0).flatten(1).sum(1) / known)
    return results[0], results[1]


def pose_errors(
    prediction: Tensor,  # [B, S, 9]
    truth: Tensor,  # [B, S, 9]
    least: float = LEAST_BASELINE,
) -> tuple[Tensor, Tensor]:  # both [B, P] degrees
    """Rotation error and direction error of all pairs of views.

    The direction of pairs not further apart than `least` is NaN: they count with their rotation
    alone. A predicted baseline of zero has no direction and is 90 degrees off.
    """
    rotation, translation = relative_poses(prediction)
    true_rotation, true_translation = relative_poses(truth)
    # From the chord, as acos has no digits left near 1: |R - R'| = sqrt(8) sin(a / 2).
    chord = torch.linalg.matrix_norm(rotation - true_rotation) / math.sqrt(8)
    turned = torch.rad2deg(2 * torch.asin(chord.clamp(max=1)))
    across = torch.linalg.vector_norm(
        torch.linalg.cross(translation, true_translation, dim=-1), dim=-1
    )
    along = (translation * true_translation).sum(-1)
    angle = torch.rad2deg(torch.atan2(across, along))
    angle = torch.where(torch.linalg.vector_norm(translation, dim=-1) > 0, angle, 90.0)
    near = torch.linalg.vector_norm(true_translation, dim=-1) <= least
    return turned, torch.where(near, math.nan, angle)


def pose_auc(
    turned: Tensor,  # [P] degrees
    angle: Tensor,  # [P] degrees, NaN for pairs without a direction
    threshold: int = THRESHOLD,
) -> float:
    """Area under the share of pairs whose larger error is below a limit, limit 0 to `threshold`.

    In steps of whole degrees, as VGGT's evaluation (arXiv 2503.11651, section 4.1).
    """
    worst = torch.fmax(turned, angle)
    limits = torch.arange(1, threshold + 1, device=worst.device)
    return float((worst[:, None] < limits).float().mean())


class VGGTMeter:
    """Collects batches and gives their mean errors.

    depth_abs_rel, depth_abs_rel_aligned : see `depth_errors`
    pose_auc30, rotation_error, direction_error : over all pairs of views; the errors are medians
        in degrees
    point_error : mean distance of the point head's points, scene units
    fov_error : mean error of the field of view, degrees
    scale_error, one_view_fov_error : what one view says (`gen3r.vggt.bootstrap`): relative error of
        the scene scale, and of the field of view in degrees
    """

    def __init__(self) -> None:
        self._means: dict[str, list[Tensor]] = {}
        self._turned: list[Tensor] = []
        self._angle: list[Tensor] = []

    def add(self, vggt: VGGT, prediction: VGGTPrediction, views: Views) -> None:
        """Measure one batch whose first map is the first frame's.

        `vggt` is what predicted, asked again for the first view alone.
        """
        mask, pose = views.depth > 0, prediction.poses[-1].float()
        plain, aligned = depth_errors(prediction.depth[..., 0], views.depth)
        turned, angle = pose_errors(pose, views.pose)
        distance = torch.linalg.vector_norm(prediction.points - views.points, dim=-1)
        intrinsics, scale = bootstrap(vggt, views.images[:, :1])
        true_scale = SCALE_OF_MEDIAN * masked_median(views.depth[:, :1], mask[:, :1])
        half = views.images.shape[-1] / 2
        seen = 2 * torch.atan(half / intrinsics[:, 0, 0].float())
        values = {
            "depth_abs_rel": plain,
            "depth_abs_rel_aligned": aligned,
            "point_error": masked_mean(distance, mask)[None],
            "fov_error": torch.rad2deg((pose[..., 7:] - views.pose[..., 7:]).abs()).flatten(),
            "scale_error": (scale.float() / true_scale - 1).abs(),
            "one_view_fov_error": torch.rad2deg((seen - views.pose[:, 0, 8]).abs()),
        }
        for name, value in values.items():
            self._means.setdefault(name, []).append(value)
        self._turned.append(turned.flatten())
        self._angle.append(angle.flatten())

    def result(self) -> dict[str, float]:
        """Means and medians over all batches. Clips of one frame have no pairs: NaN."""
        turned, angle = torch.cat(self._turned), torch.cat(self._angle)
        found = {name: float(torch.cat(values).mean()) for name, values in self._means.items()}
        found["pose_auc30"] = pose_auc(turned, angle)
        found["rotation_error"] = float(turned.nanmedian()) if len(turned) else math.nan
        found["direction_error"] = float(angle.nanmedian()) if len(angle) else math.nan
        return found
