"""The fusion in C++ (csrc/fusion.h): the same steps, several times faster, in bounded memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gen3r_engine.fusion_config import COUNTS, FusionConfig, PointCloud
from gen3r_engine.native import native, why_missing


def fuse_native(
    points: NDArray[np.floating],  # [N, 3] float32 or float64, contiguous, as all
    colors: NDArray[np.generic],  # [N, 3] uint8, or float64 from 0 to 255
    config: FusionConfig,
    *,
    normals: NDArray[np.float32] | None = None,  # [N, 3]
    confidence: NDArray[np.float32] | None = None,  # [N]
    valid: NDArray[np.bool_] | None = None,  # [N]
    threads: int = 0,
) -> PointCloud:
    """Steps 1 to 6 of `gen3r_engine.fusion`.

    Takes at most 56 bytes a point beyond its arguments, the returned cloud included. `threads`: 0
    means as many as OpenMP would take; the result does not depend on it.

    Raises
    ------
    ValueError : the extension is not built; a cloud too large for the voxel size.
    """
    module = native()
    if module is None:
        raise ValueError(f"backend 'native': the extension is {why_missing()}; or use 'python'")
    xyz, rgb, directions, fates = module.fuse_points(
        points,
        colors,
        normals,
        confidence,
        None if valid is None else valid.view(np.uint8),
        voxel_size=config.voxel_size,
        filter_outliers=config.filter_outliers,
        nb_neighbors=config.nb_neighbors,
        std_ratio=config.std_ratio,
        far_percentile=config.far_percentile,
        near_percentile=config.near_percentile,
        radius_neighbors=config.radius_neighbors,
        radius_scale=config.radius_scale,
        confidence_percentile=config.confidence_percentile,
        threads=threads,
    )
    counts = {"given": len(points), **fates, "cells": len(xyz)}
    return PointCloud(xyz, rgb, directions, {name: counts[name] for name in COUNTS}, "native")
