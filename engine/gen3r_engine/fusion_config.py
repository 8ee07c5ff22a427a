"""What a fusion is asked to do; `gen3r_engine.fusion` is where to import it from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gen3r.scene import PointCloud

__all__ = ["BACKENDS", "COUNTS", "REMOVE_FAR", "FusionConfig", "PointCloud", "Points"]

BACKENDS = ("auto", "cuda", "native", "python")
COUNTS = (
    *("given", "masked", "not_finite", "unsure", "far", "outliers", "near_outliers"),
    *("kept", "cells"),
)

Points = NDArray[np.float64]


@dataclass(frozen=True)
class FusionConfig:
    """What is filtered. The defaults are upstream's for ``infer.py``; `REMOVE_FAR` is its flag.

    The steps are those of `gen3r_engine.fusion`.

    Parameters
    ----------
    voxel_size : edge of a grid cell in the points' unit; None keeps every point.
    filter_outliers : whether steps 4 and 5 run at all.
    nb_neighbors, std_ratio : step 4.
    far_percentile : step 3, in (0, 100]; None cuts nothing.
    near_percentile : step 5, in [0, 100]; at 0 (upstream's default) step 5 does not run.
    radius_neighbors, radius_scale : step 5.
    confidence_percentile : step 2, in [0, 100); None drops nothing. Needs a confidence.
    normals : whether the cloud carries normals.
    backend : "cuda", "native" (the C++ extension), "python" (scipy), or "auto": cuda for tensors on
        a GPU, else native where the extension is built, else python.

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
    confidence_percentile: float | None = None
    normals: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        if self.voxel_size is not None and not 0 < self.voxel_size < float("inf"):
            raise ValueError(f"voxel_size {self.voxel_size} must be > 0; None keeps every point")
        if self.far_percentile is not None and not 0 < self.far_percentile <= 100:
            raise ValueError(f"far_percentile {self.far_percentile} must be in (0, 100] or None")
        if not 0 <= self.near_percentile <= 100:
            raise ValueError(f"near_percentile {self.near_percentile} must be in [0, 100]")
        if self.confidence_percentile is not None and not 0 <= self.confidence_percentile < 100:
            value = self.confidence_percentile
            raise ValueError(f"confidence_percentile {value} must be in [0, 100) or None")
        for name in ("nb_neighbors", "radius_neighbors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("std_ratio", "radius_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be > 0")
        if self.backend not in BACKENDS:
            raise ValueError(f"backend '{self.backend}' is unknown; known: {', '.join(BACKENDS)}")


REMOVE_FAR = FusionConfig(voxel_size=0.003, far_percentile=80.0)
"""Upstream's ``--remove_far_points``: the nearest 80 % of the points on a finer grid."""
