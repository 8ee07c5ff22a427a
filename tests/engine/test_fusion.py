"""Point-cloud fusion: bounds, degenerate clouds, agreement of its parts with brute force."""

from __future__ import annotations

import numpy as np
import pytest

from gen3r_engine import fusion
from gen3r_engine.fusion import FusionConfig, fuse_points, statistical_inliers, voxel_average


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
    config = FusionConfig(near_percentile=60, radius_neighbors=3)
    whole = fuse_points(points, colors, config)
    monkeypatch.setattr(fusion, "_CHUNK", 37)
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


def test_nan_points_are_dropped_and_integer_colors_survive() -> None:
    points, colors = cloud(50)
    points[7] = np.nan
    out = fuse_points(points, colors, FusionConfig(voxel_size=None, filter_outliers=False))
    kept = np.arange(50) != 7
    assert np.array_equal(out.points, points[kept])
    assert np.array_equal(out.colors, colors[kept])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tiny_clouds_do_not_fail(count: int) -> None:
    points, colors = cloud(count)
    config = FusionConfig(far_percentile=80, near_percentile=50)
    assert len(fuse_points(points, colors, config)) <= count


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
    ],
)
def test_config_limits(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        FusionConfig(**bad)


def test_input_limits() -> None:
    points, colors = cloud(10)
    with pytest.raises(ValueError, match="one colour per point"):
        fuse_points(points, colors[:5])
    points[0] = 1e12
    with pytest.raises(ValueError, match="larger voxels"):
        fuse_points(points, colors, FusionConfig(voxel_size=1e-9, filter_outliers=False))
