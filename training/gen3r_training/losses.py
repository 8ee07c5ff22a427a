"""Loss terms of both training stages, each checked against upstream's values.

Sources: VGGT's training losses (arXiv 2503.11651, section 3.4) as Gen3R uses them for stage 1, the
Gaussian KL with diffusers' reduction, and the truncated MSE of stage 2 (arXiv 2601.04090).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ERROR_LIMIT = (
    100.0  # elementwise errors above this are cut, so that one bad pixel cannot rule a step
)
CAMERA_WEIGHTS = (1.0, 1.0, 0.5)  # translation, rotation, field of view
CAMERA_LOSSES = ("l1", "l2", "l1_smooth", "huber")


def _finite(difference: Tensor, dim: int | None = -1) -> Tensor:
    """The difference, 0 wherever an entry along `dim` (None: anywhere) is NaN or infinite.

    Before the norm, not after it: 0 times the norm's gradient there would still be NaN.
    """
    finite = difference.isfinite()
    finite = finite.all() if dim is None else finite.all(dim, keepdim=True)
    return torch.where(finite, difference, 0.0)


def _pose_error(difference: Tensor, kind: str) -> Tensor:
    if kind == "l1":
        return torch.where(difference.isfinite(), difference, 0.0).abs()
    if kind == "l2":
        return _finite(difference).norm(dim=-1, keepdim=True)
    # Both have their corner at 1, where they are the same function. Reduced before the cut, as
    # upstream, so one NaN makes the whole term 0.
    difference = _finite(difference, None)
    return F.smooth_l1_loss(difference, torch.zeros_like(difference))


def camera_loss_terms(
    prediction: Tensor,  # [..., 9] pose encoding: translation 3, quaternion 4, field of view 2
    target: Tensor,  # [..., 9]
    kind: str = "l1",
) -> tuple[Tensor, Tensor, Tensor]:  # scalars
    """Translation, rotation and field-of-view error of one iteration of the camera head.

    ``l1`` averages |d| over all entries, ``l2`` the length of d per camera; ``l1_smooth`` and
    ``huber`` (corner at 1) are one function. Translation errors are cut at 100: per entry (``l1``),
    per camera (``l2``), or as a mean (the others).

    Raises
    ------
    ValueError : an unknown `kind`, or shapes that differ or do not end in 9.
    """
    if kind not in CAMERA_LOSSES:
        raise ValueError(f"camera loss '{kind}' is unknown; known: {', '.join(CAMERA_LOSSES)}")
    if prediction.shape != target.shape or prediction.shape[-1] != 9:
        raise ValueError(
            f"pose encodings {list(prediction.shape)} and {list(target.shape)} must be one [..., 9]"
        )
    parts = (prediction - target).split((3, 4, 2), -1)
    translation, rotation, view = (_pose_error(part, kind) for part in parts)
    return translation.clamp(max=ERROR_LIMIT).mean(), rotation.mean(), view.mean()


def camera_loss(
    predictions: Sequence[Tensor],  # one [..., 9] per iteration, the last one is the best
    targets: Sequence[Tensor],  # as many, or one for all iterations
    kind: str = "l1",
    decay: float = 0.6,
) -> Tensor:  # scalar
    """Camera loss over the iterations of the camera head: weights decay^(n-1-i), divided by n.

    T + R + 0.5 fov per iteration.

    Raises
    ------
    ValueError : no prediction, as many targets as neither one nor the predictions;
        `camera_loss_terms`.
    """
    count = len(predictions)
    if count == 0 or len(targets) not in (1, count):
        raise ValueError(
            f"{count} pose predictions and {len(targets)} targets; give one each or one"
        )
    if len(targets) == 1:
        targets = [targets[0]] * count
    total = torch.zeros((), dtype=predictions[0].dtype, device=predictions[0].device)
    for index, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        terms = camera_loss_terms(prediction, target, kind)
        weighted = sum(w * term for w, term in zip(CAMERA_WEIGHTS, terms, strict=True))
        total = total + decay ** (count - 1 - index) * weighted
    return total / count


def dense_loss(
    prediction: Tensor,  # [..., C], C = 1 (depth) or 3 (points)
    target: Tensor,  # [..., C]
    power: float = 1.0,
) -> Tensor:  # scalar
    """Mean over pixels of |d|^power, |d| the length over C; NaN and infinity count 0, the rest is
    cut at 100 (after the power).

    Raises
    ------
    ValueError : shapes that differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"shapes {list(prediction.shape)} and {list(target.shape)} differ")
    error = _finite(prediction - target).norm(dim=-1)
    if power != 1.0:
        error = error**power
    return error.clamp(max=ERROR_LIMIT).mean()


def filter_by_quantile(
    errors: Tensor,  # any shape
    fraction: float,
    min_elements: int = 1000,
    limit: float = ERROR_LIMIT,
) -> Tensor:  # [M], or `errors` itself
    """The errors strictly below both their `fraction` quantile (nearest rank) and `limit`.

    When at most `min_elements` would remain, all errors come back, cut at `limit`; a tensor of at
    most `min_elements` comes back as it is.

    Raises
    ------
    ValueError : `fraction` outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction} must be in [0, 1]")
    if errors.numel() <= min_elements:
        return errors
    cut = errors.clamp(max=limit)
    # kthvalue, as torch.quantile refuses more than 2^24 entries.
    rank = round(fraction * (cut.numel() - 1)) + 1
    kept = cut < cut.detach().flatten().kthvalue(rank).values.clamp(max=limit)
    return cut[kept] if int(kept.sum()) > min_elements else cut


def adaptive_weight(target: float, current: float) -> float:
    """A power of ten that brings `current` to at most the order of `target`; 1 if it is not above
    it.

    10^floor(log10(target / current)), a plain number: no gradient flows through it. The quotient is
    rounded to float32, as that of upstream's tensors, which decides at exact powers of ten.

    Raises
    ------
    ValueError : a `target` that is not positive while `current` is above it.
    """
    if current <= target:
        return 1.0
    if target <= 0:
        raise ValueError(f"adaptive weight: target {target} must be > 0 (current {current})")
    quotient = torch.tensor(target, dtype=torch.float32) / torch.tensor(
        current, dtype=torch.float32
    )
    return 10.0 ** math.floor(math.log10(quotient.item()))


def adaptive_weight_of(
    target: Tensor,  # 0-d float32
    current: Tensor,  # 0-d float32
) -> Tensor:  # 0-d float32, detached
    """`adaptive_weight` where both values are, so that nothing waits for a GPU.

    1 where one of them is not finite. A target of 0 gives 0, where `adaptive_weight` raises.
    """
    target, current = target.detach(), current.detach()
    power = 10.0 ** (target / current).double().log10().floor()
    plain = (current <= target) | ~(target.isfinite() & current.isfinite())
    return torch.where(plain, 1.0, power).float()


def gaussian_kl(
    mean: Tensor,  # [B, C, F, H, W]
    logvar: Tensor,  # [B, C, F, H, W]
    other_mean: Tensor | None = None,  # [B, C, F, H, W]; None: the standard normal
    other_logvar: Tensor | None = None,  # [B, C, F, H, W]
    *,
    full: bool = False,
) -> Tensor:  # [B, W], or [B] with `full`
    """KL(N(mean, e^logvar) || N(other_mean, e^other_logvar)), summed over axes 1, 2 and 3 only.

    The width axis stays, because diffusers' posterior sums three axes of what it takes for an
    image; the loss averages over it. Log variances are clamped to [-30, 20] as there.

    full : sum over the width too, which is the divergence: W times the average over the width.
    """
    logvar = logvar.clamp(-30.0, 20.0)
    if other_mean is None or other_logvar is None:
        terms = mean.square() + logvar.exp() - 1.0 - logvar
    else:
        other_logvar = other_logvar.clamp(-30.0, 20.0)
        other_var = other_logvar.exp()
        terms = (mean - other_mean).square() / other_var + logvar.exp() / other_var
        terms = terms - 1.0 - logvar + other_logvar
    return 0.5 * terms.sum(dim=(1, 2, 3, 4) if full else (1, 2, 3))


def truncated_square(
    prediction: Tensor,  # any shape
    target: Tensor,  # same
    limit: float = 50.0,
) -> Tensor:  # same, float32
    """Squared error in float32; 0 where |error| > `limit`."""
    error = prediction.float() - target.float()
    return torch.where(error.abs() > limit, 0.0, error.square())


def linear_decay(step: int, decay_steps: int, start: float = 0.5, end: float = 0.25) -> float:
    """From `start` at step 0 to `end` at `decay_steps`, then constant (stage 2's clip norm).

    Raises
    ------
    ValueError : `decay_steps` below 1.
    """
    if decay_steps < 1:
        raise ValueError(f"decay_steps {decay_steps} must be at least 1")
    return start + (end - start) * min(step / decay_steps, 1.0)
