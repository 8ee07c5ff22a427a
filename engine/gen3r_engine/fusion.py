"""From the points of all frames to one clean cloud: far cut, outlier filters, voxel grid.

The filters and their order are those of upstream's point-cloud export with Open3D 0.20's
definitions (checked row by row against it); nearest neighbours come from scipy's k-d tree, so
Open3D is not needed:

1. points with NaN or infinity are dropped (a field of view of 0 yields them);
2. far cut: z <= the `far_percentile` of z, z being the world's z (the first camera's depth axis);
3. statistical outliers: a point's mean distance to its `nb_neighbors` nearest points, itself
   included, must lie below mean + std_ratio * std (n - 1) over all points;
4. radius outliers among the near points (z <= the `near_percentile` of z): more than
   `radius_neighbors` near points, itself included, within radius_scale * the median distance to the
   nearest neighbour;
5. voxel grid: one averaged point and colour per occupied cell, the grid starting at the least
   corner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

_CHUNK = 250_000  # queries at a time: 25 neighbours of 250 k points take 100 MB

Points = NDArray[np.float64]


@dataclass(frozen=True)
class FusionConfig:
    """What is filtered. The defaults are upstream's for ``infer.py``; `REMOVE_FAR` is its flag.

    Parameters
    ----------
    voxel_size : edge of a grid cell in the points' unit; None keeps every point.
    filter_outliers : whether steps 3 and 4 run at all.
    nb_neighbors, std_ratio : step 3.
    far_percentile : step 2, in (0, 100]; None cuts nothing.
    near_percentile : step 4, in [0, 100]; at 0 (upstream's default) step 4 does not run.
    radius_neighbors, radius_scale : step 4.

    Raises
    ------
    ValueError : a value outside these limits.
    """

    voxel_size: float | None = 0.005
    filter_outliers: bool = True
    nb_neighbors: int = 25
    std_ratio: float = 1.25
    far_percentile: float | None = None
    near_percentile: float = 0.0
    radius_neighbors: int = 10
    radius_scale: float = 4.0

    def __post_init__(self) -> None:
        if self.voxel_size is not None and not 0 < self.voxel_size < float("inf"):
            raise ValueError(f"voxel_size {self.voxel_size} must be > 0; None keeps every point")
        if self.far_percentile is not None and not 0 < self.far_percentile <= 100:
            raise ValueError(f"far_percentile {self.far_percentile} must be in (0, 100] or None")
        if not 0 <= self.near_percentile <= 100:
            raise ValueError(f"near_percentile {self.near_percentile} must be in [0, 100]")
        for name in ("nb_neighbors", "radius_neighbors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("std_ratio", "radius_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be > 0")


REMOVE_FAR = FusionConfig(voxel_size=0.003, far_percentile=80.0)
"""Upstream's ``--remove_far_points``: the nearest 80 % of the points on a finer grid."""


@dataclass(frozen=True)
class PointCloud:
    """points: [N, 3] float64, world frame; colors: [N, 3] uint8."""

    points: Points
    colors: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.points)


def fuse_points(
    points: ArrayLike,  # [..., 3] any float
    colors: ArrayLike,  # [..., 3] uint8, or float in [0, 1] (clipped)
    config: FusionConfig | None = None,
) -> PointCloud:
    """Filter and thin out points (module docstring, steps 1 to 5).

    Parameters
    ----------
    points : world coordinates, any leading shape; masked points are the caller's to drop.
    colors : same leading shape. Clipped to [0, 1] before averaging, rounded to 8 bits at the end.
    config : `FusionConfig()` when None.

    Raises
    ------
    ValueError : shapes that differ or do not end in 3; a cloud too large for the voxel size.
    """
    config = config or FusionConfig()
    xyz, rgb = _as_rows(points, colors)
    kept = np.isfinite(xyz).all(axis=1)
    xyz, rgb = xyz[kept], rgb[kept]
    if config.far_percentile is not None and len(xyz):
        kept = xyz[:, 2] <= np.percentile(xyz[:, 2], config.far_percentile)
        xyz, rgb = xyz[kept], rgb[kept]
    if config.filter_outliers:
        kept = statistical_inliers(xyz, config.nb_neighbors, config.std_ratio)
        xyz, rgb = xyz[kept], rgb[kept]
        if config.near_percentile > 0 and len(xyz):
            near = xyz[:, 2] <= np.percentile(xyz[:, 2], config.near_percentile)
            near[near] = ~_radius_inliers(xyz[near], config)
            xyz, rgb = xyz[~near], rgb[~near]
    if config.voxel_size is not None:
        xyz, rgb = voxel_average(xyz, rgb, config.voxel_size)
    return PointCloud(xyz, np.rint(rgb * 255.0).astype(np.uint8))


def _as_rows(points: ArrayLike, colors: ArrayLike) -> tuple[Points, Points]:
    xyz, rgb = np.asarray(points), np.asarray(colors)
    if xyz.shape != rgb.shape or xyz.ndim < 1 or xyz.shape[-1] != 3:
        raise ValueError(
            f"points {xyz.shape} and colors {rgb.shape} must have one shape [..., 3]; "
            "give one colour per point"
        )
    scale = 255.0 if np.issubdtype(rgb.dtype, np.integer) else 1.0
    rgb = np.clip(np.nan_to_num(rgb.reshape(-1, 3).astype(np.float64) / scale), 0.0, 1.0)
    return xyz.reshape(-1, 3).astype(np.float64), rgb


def statistical_inliers(
    points: Points,  # [N, 3]
    nb_neighbors: int,
    std_ratio: float,
) -> NDArray[np.bool_]:  # [N]
    """Open3D's ``remove_statistical_outlier`` as a mask (step 3).

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
