"""A scene's cloud made and kept on the GPU, so that its copy to the host goes on beside others."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gen3r.scene import PointCloud, Scene
from gen3r_engine.fusion_config import FusionConfig
from gen3r_engine.fusion_normals import grid_normals

if TYPE_CHECKING:  # it needs triton, which is not everywhere
    from gen3r_engine.fusion_cuda import FusedTensors

NAMES = ("points", "colors", "normals")


@dataclasses.dataclass(frozen=True)
class Valid:
    """Which points of a scene take part.

    valid : [F, H, W] bool. masked, not_finite : how many do not, and why.
    """

    valid: Tensor
    masked: int
    not_finite: int


def valid_points(scene: Scene) -> Valid:
    """The mask without points that are not finite and frames whose camera is not (an infinite focal
    length)."""
    points = torch.as_tensor(scene.points)
    mask = torch.as_tensor(scene.mask).to(points.device)
    cameras = (torch.as_tensor(c).to(points.device) for c in (scene.extrinsics, scene.intrinsics))
    pose, k = (c.flatten(1).isfinite().all(1) for c in cameras)
    finite = (pose & k)[:, None, None] & points.isfinite().all(-1)
    valid = mask & finite
    bad = int((~finite).sum())
    return Valid(valid, valid.numel() - int(valid.sum()) - bad, bad)


def fuse_tensors(
    scene: Scene,  # of CUDA tensors
    config: FusionConfig,
) -> FusedTensors:
    """`fusion.fuse` on the device of the scene's tensors, and left there.

    Raises
    ------
    ValueError : a cloud too large for the voxel size.
    """
    from gen3r_engine.fusion_cuda import fuse_cuda

    use = valid_points(scene)
    normals = grid_normals(scene.points, use.valid, scene.extrinsics) if config.normals else None
    unsure = config.confidence_percentile is not None
    fused = fuse_cuda(
        scene.points.reshape(-1, 3),
        scene.rgb.reshape(-1, 3).contiguous(),
        config,
        normals=None if normals is None else normals.reshape(-1, 3),
        confidence=scene.depth_confidence.reshape(-1) if unsure else None,
        valid=use.valid.reshape(-1),
    )
    counts = fused.counts | {"masked": use.masked, "not_finite": use.not_finite}
    return dataclasses.replace(fused, counts=counts)


def cloud_tensors(fused: FusedTensors | None) -> dict[str, Tensor | None]:
    """The arrays of a cloud under names of their own, to be copied with the scene's."""
    return {} if fused is None else {f"cloud_{name}": getattr(fused, name) for name in NAMES}


def take_cloud(
    arrays: dict[str, Any],  # of the scene and of `cloud_tensors`, on the host
    fused: FusedTensors | None,
) -> PointCloud | None:
    """The cloud out of what was copied; its arrays are taken out of `arrays`."""
    if fused is None:
        return None
    points, colors, normals = (arrays.pop(f"cloud_{name}") for name in NAMES)
    directions: np.ndarray | None = None if normals is None else normals.numpy()
    return PointCloud(points.numpy(), colors.numpy(), directions, fused.counts, "cuda")
