"""What built-in trajectories need to know of the conditioning views: intrinsics and scene scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen3r.cameras import decode_pose

if TYPE_CHECKING:
    from gen3r.vggt import VGGT

SCALE_OF_MEDIAN = 0.8  # upstream's zoom distance as a share of the median depth


def scene_scale(
    depth: Tensor,  # [B, N, H, W, 1] or [B, N, H, W]
) -> Tensor:  # [B] float64
    """0.8 * median depth over all views of a sample (the lower of two middle values)."""
    return SCALE_OF_MEDIAN * depth.float().flatten(1).median(dim=1).values.double()


@torch.no_grad()
def bootstrap(
    vggt: VGGT,
    images: Tensor,  # [B, N, 3, H, W] in [0, 1]
) -> tuple[
    Tensor, Tensor
]:  # intrinsics of the first view [B, 3, 3] in pixels, scene scale [B] float64
    """Estimate the first view's intrinsics and the scene's scale from the conditioning views."""
    height, width = images.shape[-2:]
    tokens = vggt.aggregator(images)
    pose = vggt.camera_head(tokens[-1])[-1]
    _, intrinsics = decode_pose(pose, height, width)
    depth, _ = vggt.depth_head(tokens, height, width, vggt.aggregator.num_special_tokens)
    return intrinsics[:, 0], scene_scale(depth)
