"""From the points of all frames to one clean cloud: masks, far cut, outlier filters, voxel grid.

The filters and their order are those of upstream's point-cloud export with Open3D 0.20's
definitions (checked row by row against it), the confidence cut and the normals are additions. Steps
and the names under which `PointCloud.counts` has what they drop:

1. masked, not_finite: points that the mask leaves out, or with NaN or infinity (a field of view of
   0 yields them);
2. unsure: a confidence that is not finite or lies below the `confidence_percentile` of the points
   that are left;
3. far: z above the `far_percentile` of z, z being the world's z (the first camera's depth axis);
4. outliers: a point's mean distance to its `nb_neighbors` nearest points, itself included, must lie
   below mean + std_ratio * std (n - 1) over all points, and above 0;
5. near_outliers, among the near points (z <= the `near_percentile` of z): more than
   `radius_neighbors` near points, itself included, must lie within radius_scale * the median
   distance to the nearest neighbour. Steps 4 and 5 leave nothing of a single point;
6. voxel grid: one averaged point, colour and normal per occupied cell, the grid starting at the
   least corner.

Percentiles are numpy's, linear between samples. Three paths compute the same cloud: `fusion_cuda`
(Triton), `fusion_native` (C++), `fusion_reference` (numpy and scipy). They keep the same points up
to ties of distances; means differ in their last bits.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gen3r.scene import Scene
from gen3r_engine.fusion_config import (
    BACKENDS,
    COUNTS,
    REMOVE_FAR,
    FusionConfig,
    PointCloud,
    Points,
)
from gen3r_engine.fusion_device import valid_points
from gen3r_engine.fusion_native import fuse_native
from gen3r_engine.fusion_normals import grid_normals
from gen3r_engine.fusion_reference import fuse_python
from gen3r_engine.native import native

__all__ = [
    "BACKENDS",
    "COUNTS",
    "REMOVE_FAR",
    "FusionConfig",
    "PointCloud",
    "Points",
    "fuse",
    "fuse_points",
]

Values = ArrayLike | Tensor


def fuse(scene: Scene, config: FusionConfig | None = None) -> PointCloud:
    """The scene's masked points as one cloud (module docstring, steps 1 to 6).

    Normals come from the depth maps' own grid and face the camera that saw them. Pixels of frames
    whose camera is not finite (an infinite focal length) count as not_finite.

    Returns
    -------
    PointCloud : empty, with a warning, when no point is left.

    Raises
    ------
    ValueError : a cloud too large for the voxel size; a backend that is not there.
    """
    config = config or FusionConfig()
    points = torch.as_tensor(scene.points)
    use = valid_points(scene)
    normals = None
    if config.normals:
        normals = grid_normals(points, use.valid, torch.as_tensor(scene.extrinsics))
    confidence = scene.depth_confidence if config.confidence_percentile is not None else None
    cloud = _fuse(points, torch.as_tensor(scene.rgb), config, normals, confidence, use.valid)
    counts = cloud.counts | {"masked": use.masked, "not_finite": use.not_finite}
    if len(cloud) == 0:
        steps = ", ".join(f"{name} {counts[name]:,}" for name in COUNTS[1:-2] if counts[name])
        warnings.warn(
            f"no point of {counts['given']:,} is left ({steps}); the cloud is empty", stacklevel=2
        )
    return dataclasses.replace(cloud, counts=counts)


def fuse_points(
    points: Values,  # [..., 3] any float
    colors: Values,  # [..., 3] uint8, or float in [0, 1] (clipped)
    config: FusionConfig | None = None,
    *,
    normals: Values | None = None,  # [..., 3]
    confidence: Values | None = None,  # [...]
) -> PointCloud:
    """Filter and thin out points (module docstring, steps 1 to 6).

    Parameters
    ----------
    points : world coordinates, any leading shape, array or tensor; masked points are the caller's
        to drop.
    colors : same leading shape. Averaged in float64 and rounded to 8 bits at the end; on the GPU
        float colours are rounded before.
    normals : unit vectors, or 0 or NaN where unknown; carried with ``config.normals``.
    confidence : larger is surer; used with ``config.confidence_percentile``.
    config : `FusionConfig()` when None.

    Raises
    ------
    ValueError : shapes that differ or do not end in 3; a cloud too large for the voxel size;
        normals or confidence asked for and not given; a backend that is not there.
    """
    return _fuse(points, colors, config or FusionConfig(), normals, confidence, None)


def _fuse(
    points: Values,
    colors: Values,
    config: FusionConfig,
    normals: Values | None,
    confidence: Values | None,
    valid: Tensor | None,  # [...] bool
) -> PointCloud:
    normals = normals if config.normals else None
    confidence = confidence if config.confidence_percentile is not None else None
    _check(points, colors, config, normals, confidence)
    on_gpu = isinstance(points, Tensor) and points.is_cuda
    backend = config.backend
    if backend == "auto":
        backend = "cuda" if on_gpu else "native" if native() is not None else "python"
    if backend == "cuda":
        return _fuse_on_gpu(points, colors, config, normals, confidence, valid)
    run = fuse_native if backend == "native" else fuse_python
    return run(
        _float_rows(points),
        _color_rows(_array(colors)),
        config,
        normals=None if normals is None else _rows(normals, np.float32, 3),
        confidence=None if confidence is None else _rows(confidence, np.float32),
        valid=None if valid is None else _rows(valid, np.bool_),
    )


def _check(
    points: Values,
    colors: Values,
    config: FusionConfig,
    normals: Values | None,
    confidence: Values | None,
) -> None:
    shape, given = np.shape(points), np.shape(colors)
    if shape != given or len(shape) < 1 or shape[-1] != 3:
        raise ValueError(
            f"points {shape} and colors {given} must have one shape [..., 3]; "
            "give one colour per point"
        )
    if config.normals and (normals is None or np.shape(normals) != shape):
        raise ValueError(
            f"normals of shape {shape} are asked for, "
            f"{None if normals is None else np.shape(normals)} given; give them, use fuse(scene), "
            "which makes them, or set normals=False"
        )
    if config.confidence_percentile is not None and (
        confidence is None or np.shape(confidence) != shape[:-1]
    ):
        raise ValueError(
            f"confidence_percentile {config.confidence_percentile} needs a confidence of shape "
            f"{shape[:-1]}, {None if confidence is None else np.shape(confidence)} given"
        )


def _array(values: Values) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _rows(values: Values, dtype: type[np.generic], columns: int | None = None) -> NDArray[Any]:
    shape = (-1,) if columns is None else (-1, columns)
    return np.ascontiguousarray(_array(values).reshape(shape), dtype=dtype)


def _float_rows(points: Values) -> NDArray[Any]:
    """[N, 3] float32 or float64, without a copy where it is that already."""
    rows = _array(points).reshape(-1, 3)
    return np.ascontiguousarray(rows, np.float32 if rows.dtype == np.float32 else np.float64)


def _color_rows(colors: NDArray[Any]) -> NDArray[Any]:
    """[N, 3], uint8 or float64 from 0 to 255."""
    rows = colors.reshape(-1, 3)
    if rows.dtype == np.uint8:
        return np.ascontiguousarray(rows)
    if np.issubdtype(rows.dtype, np.integer):
        return np.clip(rows, 0, 255).astype(np.uint8, order="C")
    return np.clip(np.nan_to_num(rows.astype(np.float64)), 0.0, 1.0) * 255.0


def _fuse_on_gpu(
    points: Values,
    colors: Values,
    config: FusionConfig,
    normals: Values | None,
    confidence: Values | None,
    valid: Tensor | None,
) -> PointCloud:
    # Imported here: it needs triton, which is not everywhere.
    from gen3r_engine.fusion_cuda import fuse_cuda

    xyz = torch.as_tensor(points)
    if not xyz.is_cuda:
        if not torch.cuda.is_available():
            raise ValueError("backend 'cuda' needs a CUDA GPU; use 'auto', 'native' or 'python'")
        xyz = xyz.cuda()
    if xyz.dtype not in (torch.float32, torch.float64):
        xyz = xyz.double()
    rgb = torch.as_tensor(colors, device=xyz.device)
    if rgb.is_floating_point():
        rgb = rgb.nan_to_num().clamp(0, 1).mul(255).round()

    def rows(values: Values | None, columns: tuple[int, ...]) -> Tensor | None:
        if values is None:
            return None
        tensor = torch.as_tensor(values, device=xyz.device)
        return tensor.reshape(-1, *columns).contiguous()

    fused = fuse_cuda(
        xyz.reshape(-1, 3).contiguous(),
        rgb.clamp(0, 255).to(torch.uint8).reshape(-1, 3).contiguous(),
        config,
        normals=rows(normals, (3,)),
        confidence=rows(confidence, ()),
        valid=rows(valid, ()),
    )
    directions = None if fused.normals is None else fused.normals.cpu().numpy()
    return PointCloud(
        fused.points.cpu().numpy(), fused.colors.cpu().numpy(), directions, fused.counts, "cuda"
    )
