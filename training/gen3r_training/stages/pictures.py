"""Validation pictures: depth as grey levels, clips side by side, uint8 as the reports take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FRACTIONS = (0.02, 0.98)  # of the sorted inverse depths: black and white
SAMPLES = 1_000_000  # values that are sorted to find them


def depth_range(
    depth: Tensor,  # any shape, > 0
) -> tuple[float, float]:
    """The inverse depths that become black and white: a scale for a whole clip, or for several."""
    inverse = _inverse(depth).flatten()
    inverse = inverse[:: max(1, inverse.numel() // SAMPLES)]
    low, high = torch.quantile(inverse, torch.tensor(FRACTIONS, device=inverse.device)).tolist()
    return low, high


def depth_picture(
    depth: Tensor,  # [F, H, W]; values that are no depth (<= 0, NaN) become black
    scale: tuple[float, float] | None = None,
) -> Tensor:  # [F, H, W, 3] uint8, near is bright
    """Grey levels of inverse depth between the two of `scale` (None: those of this clip)."""
    low, high = depth_range(depth) if scale is None else scale
    level = ((_inverse(depth) - low) / max(high - low, 1e-12)).clamp(0, 1)
    return (255 * level).round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3).cpu()


def rgb_picture(
    frames: Tensor,  # [F, H, W, 3] in [0, 1]
) -> Tensor:  # [F, H, W, 3] uint8
    """Rounded to bytes."""
    return (255 * frames.float().clamp(0, 1)).round().to(torch.uint8).cpu()


def side_by_side(
    clips: Sequence[Tensor],  # each [F, H, W, 3] uint8
) -> Tensor:  # [F, H, n W, 3] uint8
    """One clip beside the other."""
    return torch.cat(list(clips), dim=2)


def _inverse(depth: Tensor) -> Tensor:
    depth = depth.float()
    return torch.where(depth > 0, 1 / depth, 0.0).nan_to_num(0.0, 0.0, 0.0)
