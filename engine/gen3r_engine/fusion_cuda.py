"""Scene fusion on the GPU: the steps of fusion.py on tensors that stay where they are.

Masks, percentiles and compaction are torch's; the neighbour search and the sums of the cells are
operators of gen3r_kernels. Distances are right to a few roundings of float32 and are averaged in
float64: a point is kept exactly when the other paths keep it, unless its mean distance equals the
threshold to about 1e-7.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gen3r_engine.fusion_config import COUNTS, FusionConfig
from gen3r_kernels.dispatch import INTERPRETED
from gen3r_kernels.neighbor_distance import MAX_NEIGHBORS, neighbor_distance
from gen3r_kernels.neighbor_index import build_index
from gen3r_kernels.voxel_average import voxel_average


@dataclass(frozen=True)
class FusedTensors:
    """A cloud on the device.

    points : [M, 3] float64
    colors : [M, 3] uint8
    normals : [M, 3] float32, or None where none were given
    counts : what each step dropped, keys `fusion_config.COUNTS`
    """

    points: Tensor
    colors: Tensor
    normals: Tensor | None
    counts: dict[str, int]


def fuse_cuda(
    points: Tensor,  # [N, 3] float32 or float64
    colors: Tensor,  # [N, 3] uint8
    config: FusionConfig,
    *,
    normals: Tensor | None = None,  # [N, 3], 0 or NaN where unknown
    confidence: Tensor | None = None,  # [N]
    valid: Tensor | None = None,  # [N] bool
) -> FusedTensors:
    """Filter and thin out points, all tensors on one GPU.

    15.4 M points need about 2 GiB beside the input. CPU tensors are taken under Triton's
    interpreter only.

    Raises
    ------
    ValueError : CPU tensors, shapes or dtypes other than the above, more neighbours than the kernel
        keeps, more cells than keys can number, a confidence cut without confidence.
    """
    _check(points, colors, config, normals=normals, confidence=confidence, valid=valid)
    kept, counts = _first_cuts(points, config, confidence, valid)
    columns = _Columns(points, colors, normals).where(kept)
    del kept
    columns = _Columns(columns.points.double(), columns.colors, _known(columns.normals))
    if config.filter_outliers:
        kept = statistical_inliers(columns.points, config.nb_neighbors, config.std_ratio)
        before, columns = len(columns), columns.where(kept)
        counts["outliers"] = before - len(columns)
        if config.near_percentile > 0 and len(columns):
            before, columns = len(columns), columns.where(_not_near_outliers(columns, config))
            counts["near_outliers"] = before - len(columns)
    counts["kept"] = len(columns)
    if config.voxel_size is not None:
        columns = _Columns(
            *voxel_average(columns.points, columns.colors, config.voxel_size, columns.normals)
        )
    counts["cells"] = len(columns)
    return FusedTensors(columns.points, columns.colors, columns.normals, counts)


@dataclass(frozen=True)
class _Columns:
    """What belongs to each point."""

    points: Tensor
    colors: Tensor
    normals: Tensor | None

    def __len__(self) -> int:
        return len(self.points)

    def where(self, kept: Tensor) -> _Columns:  # [N] bool
        rows = kept.nonzero().flatten()
        normals = None if self.normals is None else self.normals[rows]
        return _Columns(self.points[rows], self.colors[rows], normals)


def _known(normals: Tensor | None) -> Tensor | None:
    """float32, 0 where a coordinate is not finite."""
    if normals is None:
        return None
    return torch.where(normals.isfinite().all(dim=1, keepdim=True), normals, 0.0).float()


def _check(
    points: Tensor,
    colors: Tensor,
    config: FusionConfig,
    **optional: Tensor | None,
) -> None:
    if not (points.is_cuda or INTERPRETED):
        raise ValueError(
            f"points on {points.device}: backend 'cuda' takes CUDA tensors; use 'auto'"
        )
    count = len(points)
    given = {"points": points, "colors": colors, **optional}
    shapes = {"confidence": (count,), "valid": (count,)}
    for name, tensor in given.items():
        if tensor is None:
            continue
        shape = shapes.get(name, (count, 3))
        if tensor.shape != shape or tensor.device != points.device:
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} on {tensor.device}; expected {shape} on "
                f"{points.device}, as the points"
            )
    if points.dtype not in (torch.float32, torch.float64) or colors.dtype != torch.uint8:
        raise ValueError(
            f"points of {points.dtype} and colors of {colors.dtype}; expected float32 or float64, "
            "and uint8"
        )
    wanted = max(config.nb_neighbors, config.radius_neighbors + 1)
    if config.filter_outliers and wanted > MAX_NEIGHBORS:
        raise ValueError(
            f"nb_neighbors {config.nb_neighbors} and radius_neighbors {config.radius_neighbors}: "
            f"the cuda backend serves at most {MAX_NEIGHBORS} and {MAX_NEIGHBORS - 1}; use "
            "backend='native'"
        )
    if config.confidence_percentile is not None and optional["confidence"] is None:
        raise ValueError(
            f"confidence_percentile {config.confidence_percentile} needs a confidence for each "
            "point; give one or None"
        )


def _first_cuts(
    points: Tensor, config: FusionConfig, confidence: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, dict[str, int]]:  # [N] bool
    """Mask, finite coordinates, confidence, far cut: what is left, and what each dropped."""
    counts = dict.fromkeys(COUNTS, 0) | {"given": len(points)}
    kept = torch.ones(len(points), dtype=torch.bool, device=points.device)
    left = len(points)

    def cut(name: str, condition: Tensor) -> None:
        nonlocal kept, left
        kept = kept & condition
        before, left = left, int(kept.sum())
        counts[name] = before - left

    if valid is not None:
        cut("masked", valid)
    cut("not_finite", points.isfinite().all(dim=1))
    if config.confidence_percentile is not None and confidence is not None:
        sure = confidence.isfinite()
        values = confidence[kept & sure]
        if len(values):
            sure &= confidence.double() >= percentile(values, config.confidence_percentile)
        cut("unsure", sure)
    if config.far_percentile is not None and left:
        z = points[:, 2]
        cut("far", z.double() <= percentile(z[kept], config.far_percentile))
    return kept, counts


def percentile(
    values: Tensor,  # [N >= 1]
    percent: float,
) -> float:
    """numpy's ``percentile`` with its linear interpolation, in float64."""
    ordered = values.sort().values
    place = (len(ordered) - 1) * (percent / 100)
    below = min(math.floor(place), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    a, b = ordered[torch.tensor([below, above], device=ordered.device)].double().tolist()
    share = place - below
    return float(b - (b - a) * (1 - share) if share >= 0.5 else a + (b - a) * share)


def statistical_inliers(
    points: Tensor,  # [N, 3] float64
    nb_neighbors: int,
    std_ratio: float,
) -> Tensor:  # [N] bool
    """`fusion.statistical_inliers` on the device."""
    if len(points) < 2:
        return torch.zeros(len(points), dtype=torch.bool, device=points.device)
    index = build_index(points)
    mean, _ = neighbor_distance(index, min(nb_neighbors, len(points)))
    centre, positive = mean.mean(), mean > 0
    squares = torch.where(positive, mean - centre, 0.0).square().sum()
    deviation = (squares / (len(mean) - 1)).sqrt()
    return positive & (mean < centre + std_ratio * deviation)


def _not_near_outliers(columns: _Columns, config: FusionConfig) -> Tensor:  # [N] bool
    """Step 4: False for the near points that have too few near points around."""
    z = columns.points[:, 2]
    near = z <= percentile(z, config.near_percentile)
    points = columns.points[near]
    kept = ~near
    wanted = config.radius_neighbors + 1
    if len(points) >= wanted and len(points) >= 2:
        index = build_index(points)
        _, nearest = neighbor_distance(index, 2)
        radius = config.radius_scale * percentile(nearest, 50.0)
        _, distance = neighbor_distance(index, wanted)
        kept[near] = distance <= radius
    return kept
