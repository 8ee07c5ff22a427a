"""Point-cloud fusion: every path's bounds and conversions, the numpy path against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gen3r_engine import fusion_reference
from gen3r_engine.fusion import FusionConfig, fuse_points
from gen3r_engine.fusion_reference import statistical_inliers, voxel_average
from gen3r_engine.native import native, why_missing

needs_native = pytest.mark.skipif(native() is None, reason=f"the extension is {why_missing()}")
PATHS = ["python", pytest.param("native", marks=needs_native)]


def cloud(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(count, 3)), random.integers(0, 256, size=(count, 3), dtype=np.uint8)


def test_statistical_inliers_equal_brute_force() -> None:
    points, _ = cloud()
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    mean = np.sort(distance, axis=1)[:, :7].mean(1)
    expected = mean < mean.mean() + 1.5 * mean.std(ddof=1)
    assert 0 < (~expected).sum() < len(points)
    assert (statistical_inliers(points, 7, 1.5) == expected).all()


def test_chunked_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points, colors = cloud()
    config = FusionConfig(near_percentile=60, radius_neighbors=3, backend="python")
    whole = fuse_points(points, colors, config)
    monkeypatch.setattr(fusion_reference, "_CHUNK", 37)
    parts = fuse_points(points, colors, config)
    assert np.array_equal(whole.points, parts.points)
    assert np.array_equal(whole.colors, parts.colors)


def test_voxel_average_keeps_the_mass() -> None:
    points, colors = cloud()
    mean, value = voxel_average(points, colors.astype(float), 0.5)
    cells = {tuple(c) for c in np.floor((points - points.min(0)) / 0.5).astype(int)}
    assert len(mean) == len(value) == len(cells) < len(points)
    one, _ = voxel_average(points, colors.astype(float), 100.0)
    assert np.allclose(one, points.mean(0))


@pytest.mark.parametrize("backend", PATHS)
def test_nan_points_are_dropped_and_integer_colors_survive(backend: str) -> None:
    points, colors = cloud(50)
    points[7, 1] = np.nan
    points[9, 2] = -np.inf
    config = FusionConfig(voxel_size=None, filter_outliers=False, backend=backend)
    out = fuse_points(points, colors, config)
    kept = ~np.isin(np.arange(50), (7, 9))
    assert np.array_equal(out.points, points[kept])
    assert np.array_equal(out.colors, colors[kept])
    assert out.backend == backend
    expected = {"given": 50, "not_finite": 2, "kept": 48, "cells": 48}
    assert {name: n for name, n in out.counts.items() if n} == expected


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("count", [0, 1, 2, 24])
def test_tiny_clouds_do_not_fail(count: int, backend: str) -> None:
    points, colors = cloud(count)
    config = FusionConfig(far_percentile=80, near_percentile=50, backend=backend)
    out = fuse_points(points, colors, config)
    assert len(out) <= count
    assert out.points.shape == out.colors.shape == (len(out), 3)
    assert (out.points.dtype, out.colors.dtype) == (np.float64, np.uint8)
    assert sum(out.counts.values()) == 2 * count + out.counts["cells"]


@pytest.mark.parametrize("backend", PATHS)
def test_confidence_and_normals(backend: str) -> None:
    points, colors = cloud(200)
    confidence = np.arange(200, dtype=np.float32)
    confidence[3] = np.nan
    normals = np.zeros((200, 3), np.float32)
    normals[:, 2] = 1
    normals[150] = (np.nan, 1, 1)
    config = FusionConfig(*(None, False), confidence_percentile=25, normals=True, backend=backend)
    out = fuse_points(points, colors, config, normals=normals, confidence=confidence)
    sure = confidence >= np.percentile(np.delete(confidence, 3), 25)
    assert np.array_equal(out.points, points[sure])
    assert out.counts["unsure"] == (~sure).sum()
    normals[150] = 0
    assert out.normals is not None and np.array_equal(out.normals, normals[sure])
    whole = fuse_points(
        *(points, colors, FusionConfig(1e3, False, normals=True, backend=backend)), normals=normals
    )
    assert whole.normals is not None and whole.normals.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("backend", PATHS)
def test_every_kind_of_input_gives_the_same_cloud(backend: str) -> None:
    points, colors = cloud(120)
    points = points.astype(np.float32)
    config = FusionConfig(voxel_size=0.5, std_ratio=2.0, backend=backend)
    expected = fuse_points(points.astype(np.float64), colors, config)
    assert 0 < len(expected) < 120
    shaped = points.reshape(4, 30, 3), colors.reshape(4, 30, 3)
    strided = np.repeat(points, 2, axis=0)[::2], np.repeat(colors, 2, axis=0)[::2]
    tensors = torch.from_numpy(points), torch.from_numpy(colors)
    wide = points, colors.astype(np.int64)
    for given in ((points, colors), shaped, strided, tensors, wide, (points, colors / 255.0)):
        out = fuse_points(*given, config)
        assert np.array_equal(out.points, expected.points)
        # Sums of n / 255 round differently: a mean that ends in .5 may go either way.
        exact = given[1].dtype in (np.uint8, np.int64, torch.uint8)
        assert np.abs(out.colors.astype(int) - expected.colors).max() <= (0 if exact else 1)


def test_auto_takes_the_fastest_that_is_there() -> None:
    points, colors = cloud(30)
    expected = "python" if native() is None else "native"
    assert fuse_points(points, colors).backend == expected


@pytest.mark.parametrize(
    "bad",
    [
        {"voxel_size": 0.0},
        {"voxel_size": float("nan")},
        {"far_percentile": 0.0},
        {"far_percentile": 101.0},
        {"near_percentile": -1.0},
        {"nb_neighbors": 0},
        {"std_ratio": 0.0},
        {"confidence_percentile": 100.0},
        {"backend": "gpu"},
    ],
)
def test_config_limits(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        FusionConfig(**bad)


@pytest.mark.parametrize("backend", PATHS)
def test_input_limits(backend: str) -> None:
    points, colors = cloud(10)
    with pytest.raises(ValueError, match="one colour per point"):
        fuse_points(points, colors[:5])
    with pytest.raises(ValueError, match="needs a confidence"):
        fuse_points(points, colors, FusionConfig(confidence_percentile=5))
    with pytest.raises(ValueError, match="use fuse"):
        fuse_points(points, colors, FusionConfig(normals=True))
    points[0] = 1e12
    with pytest.raises(ValueError, match="larger voxels"):
        fuse_points(points, colors, FusionConfig(1e-9, filter_outliers=False, backend=backend))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_what_to_use() -> None:
    with pytest.raises(ValueError, match="use 'auto'"):
        fuse_points(*cloud(10), FusionConfig(backend="cuda"))


def test_native_without_the_extension_says_how_to_build_it(monkeypatch: Any) -> None:
    monkeypatch.setattr("gen3r_engine.fusion_native.native", lambda: None)
    with pytest.raises(ValueError, match="or use 'python'"):
        fuse_points(*cloud(10), FusionConfig(backend="native"))
