"""The fusion in numpy: the definition, and what runs where the C++ extension is not built.

Nearest neighbours come from scipy's k-d tree. `gen3r_engine.fusion` describes the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from gen3r_engine.fusion_config import COUNTS, FusionConfig, PointCloud, Points

_CHUNK = 250_000  # queries at a time: 25 neighbours of 250 k points take 100 MB


@dataclass
class _Cloud:
    """The points that are left, with all that belongs to them."""

    xyz: Points
    rgb: NDArray[np.generic]  # [N, 3], 0 to 255
    normals: NDArray[np.float32] | None
    confidence: NDArray[np.float32] | None
    counts: dict[str, int]

    def drop(self, why: str, kept: NDArray[np.bool_]) -> None:
        self.counts[why] += int(np.count_nonzero(~kept))
        self.xyz, self.rgb = self.xyz[kept], self.rgb[kept]
        self.normals = None if self.normals is None else self.normals[kept]
        self.confidence = None if self.confidence is None else self.confidence[kept]


def fuse_python(
    points: NDArray[np.floating],  # [N, 3]
    colors: NDArray[np.generic],  # [N, 3] uint8, or float64 from 0 to 255
    config: FusionConfig,
    *,
    normals: NDArray[np.float32] | None = None,  # [N, 3]
    confidence: NDArray[np.float32] | None = None,  # [N]
    valid: NDArray[np.bool_] | None = None,  # [N]
) -> PointCloud:
    """Steps 1 to 6 of `gen3r_engine.fusion`.

    Raises
    ------
    ValueError : a cloud too large for the voxel size.
    """
    counts = dict.fromkeys(COUNTS, 0) | {"given": len(points)}
    cloud = _Cloud(points.astype(np.float64), colors, normals, confidence, counts)
    if valid is not None:
        cloud.drop("masked", valid)
    cloud.drop("not_finite", np.asarray(np.isfinite(cloud.xyz).all(axis=1)))
    if config.confidence_percentile is not None and cloud.confidence is not None:
        sure = np.isfinite(cloud.confidence)
        values = cloud.confidence.astype(np.float64)
        if sure.any():
            sure &= values >= np.percentile(values[sure], config.confidence_percentile)
        cloud.drop("unsure", sure)
    if config.far_percentile is not None and len(cloud.xyz):
        z = cloud.xyz[:, 2]
        cloud.drop("far", np.asarray(z <= np.percentile(z, config.far_percentile)))
    if config.filter_outliers:
        kept = statistical_inliers(cloud.xyz, config.nb_neighbors, config.std_ratio)
        cloud.drop("outliers", kept)
        if config.near_percentile > 0 and len(cloud.xyz):
            cloud.drop("near_outliers", _near_inliers(cloud.xyz, config))
    counts["kept"] = len(cloud.xyz)
    directions = None if cloud.normals is None else np.nan_to_num(_whole(cloud.normals))
    if config.voxel_size is None:
        xyz, rgb = cloud.xyz, cloud.rgb
    else:
        columns = [cloud.rgb] if directions is None else [cloud.rgb, directions]
        values = np.concatenate(columns, axis=1, dtype=np.float64)
        xyz, values = voxel_average(cloud.xyz, values, config.voxel_size)
        rgb = values[:, :3]
        directions = None if directions is None else _unit(values[:, 3:])
    counts["cells"] = len(xyz)
    return PointCloud(xyz, np.rint(rgb).astype(np.uint8), directions, counts, "python")


def _whole(normals: NDArray[np.float32]) -> NDArray[np.float32]:
    """A normal that is not known in all three coordinates is not known."""
    return np.where(np.isnan(normals).any(axis=1, keepdims=True), np.float32(0), normals)


def _unit(normals: Points) -> NDArray[np.float32]:
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return (normals / np.where(length > 0, length, 1.0)).astype(np.float32)


def statistical_inliers(
    points: Points,  # [N, 3]
    nb_neighbors: int,
    std_ratio: float,
) -> NDArray[np.bool_]:  # [N]
    """Open3D's ``remove_statistical_outlier`` as a mask.

    A mean distance of exactly 0 (nb_neighbors coinciding points) is an outlier there, and left out
    of the deviation's sum, but counted as a point; the same here.
    """
    if len(points) < 2:
        return np.zeros(len(points), dtype=bool)
    tree = cKDTree(points)
    count = min(nb_neighbors, len(points))
    mean = np.concatenate(
        [tree.query(c, k=[*range(1, count + 1)], workers=-1)[0].mean(1) for c in _chunks(points)]
    )
    centre, positive = mean.mean(), mean > 0
    deviation = np.sqrt(np.square(mean[positive] - centre).sum() / (len(mean) - 1))
    return positive & (mean < centre + std_ratio * deviation)


def _near_inliers(points: Points, config: FusionConfig) -> NDArray[np.bool_]:
    near = points[:, 2] <= np.percentile(points[:, 2], config.near_percentile)
    near[near] = ~_radius_inliers(points[near], config)
    return ~near


def _radius_inliers(points: Points, config: FusionConfig) -> NDArray[np.bool_]:
    if len(points) < 2:
        return np.zeros(len(points), dtype=bool)
    tree = cKDTree(points)
    nearest = [tree.query(c, k=[2], workers=-1)[0][:, 0] for c in _chunks(points)]
    radius = config.radius_scale * np.median(np.concatenate(nearest))
    # The neighbour number radius_neighbors + 1 (the point itself is number 1) within the radius:
    # bounded memory, where counting all neighbours of a dense cloud is not.
    wanted = [config.radius_neighbors + 1]
    distance = np.concatenate(
        [tree.query(c, k=wanted, workers=-1)[0][:, 0] for c in _chunks(points)]
    )
    return distance <= radius


def _chunks(points: Points) -> Iterator[Points]:
    for start in range(0, len(points), _CHUNK):
        yield points[start : start + _CHUNK]


def voxel_average(
    points: Points,  # [N, 3]
    values: NDArray[np.float64],  # [N, C]
    voxel_size: float,
) -> tuple[Points, NDArray[np.float64]]:  # [M, 3], [M, C]
    """The mean point and the mean of `values` of every occupied cell, ordered by cell (x, y, z).

    Cell edges start at the least corner of the points' bounding box.

    Raises
    ------
    ValueError : more than 2^62 cells in the bounding box (remove far points or use larger cells).
    """
    if len(points) == 0:
        return points, values
    extent = np.floor((points.max(0) - points.min(0)) / voxel_size) + 1.0
    if not np.prod(extent) < 2.0**62:
        raise ValueError(
            f"voxel_size {voxel_size} cuts a cloud of extent {extent * voxel_size} into more than "
            "2^62 cells; remove far points or use larger voxels"
        )
    cell = np.floor((points - points.min(0)) / voxel_size).astype(np.int64)
    sides = extent.astype(np.int64)
    key = (cell[:, 0] * sides[1] + cell[:, 1]) * sides[2] + cell[:, 2]
    _, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)

    def means(columns: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = [np.bincount(inverse, column, len(counts)) for column in columns.T]
        return np.stack(sums, axis=1) / counts[:, None]

    return means(points), means(values)
