"""The GPU path of scene fusion in Triton's interpreter: the same cloud as the path in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gen3r_engine.fusion import FusionConfig, fuse_points
from gen3r_engine.fusion_cuda import FusedTensors, fuse_cuda, percentile
from gen3r_engine.fusion_reference import fuse_python


def cloud(count: int = 90) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    points = random.normal(size=(count, 3))
    points[1:3] = (9, 9, 0)
    points[5:6, 1] = np.nan
    return points, random.integers(0, 256, size=(count, 3), dtype=np.uint8)


def ours(points: np.ndarray, colors: np.ndarray, config: FusionConfig, **more: Any) -> FusedTensors:
    return fuse_cuda(torch.from_numpy(points), torch.from_numpy(colors), config, **more)


CONFIGS = [
    {"nb_neighbors": 4},
    {"nb_neighbors": 4, "far_percentile": 80.0, "voxel_size": None},
    {"nb_neighbors": 4, "near_percentile": 60.0, "radius_neighbors": 3, "voxel_size": 0.7},
    {"nb_neighbors": 3, "near_percentile": 5.0, "radius_neighbors": 20, "voxel_size": None},
    {"filter_outliers": False, "voxel_size": 1.5},
]


@pytest.mark.parametrize("given", CONFIGS, ids=str)
def test_equals_the_python_path(given: dict[str, Any]) -> None:
    points, colors = cloud()
    config = FusionConfig(**given, backend="python")
    expected, found = fuse_points(points, colors, config), ours(points, colors, config)
    np.testing.assert_allclose(found.points.numpy(), expected.points, rtol=1e-12, atol=1e-14)
    assert np.array_equal(found.colors.numpy(), expected.colors)
    assert found.normals is None
    assert found.counts == expected.counts
    assert found.counts["outliers"] > 0 or not config.filter_outliers


def test_float32_points() -> None:
    points, colors = cloud()
    config = FusionConfig(nb_neighbors=4, voxel_size=None)
    narrow = points.astype(np.float32)
    found = ours(narrow, colors, config)
    assert np.array_equal(found.points.numpy(), fuse_points(narrow, colors, config).points)


def test_masks_confidence_and_normals() -> None:
    points, colors = cloud(20)
    confidence, valid = torch.linspace(0, 1, 20), torch.arange(20) != 7
    confidence[12], confidence[13] = np.nan, np.inf
    normals = torch.nn.functional.normalize(torch.randn(20, 3), dim=1)
    normals[15, 1] = np.nan
    config = FusionConfig(filter_outliers=False, voxel_size=None, confidence_percentile=50.0)
    found = ours(points, colors, config, normals=normals, confidence=confidence, valid=valid)
    expected = fuse_python(
        points, colors, config, normals=normals.numpy(), confidence=confidence.numpy(),
        valid=valid.numpy(),
    )  # fmt: skip
    assert np.array_equal(found.points.numpy(), expected.points) and len(expected) == 8
    assert found.normals is not None and expected.normals is not None
    assert np.array_equal(found.normals.numpy(), expected.normals)
    assert found.counts == expected.counts
    assert (found.counts["masked"], found.counts["not_finite"], found.counts["unsure"]) == (
        1,
        1,
        10,
    )


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tiny_clouds_do_not_fail(count: int) -> None:
    points, colors = cloud(4)
    config = FusionConfig(far_percentile=80, near_percentile=50)
    expected = fuse_points(points[:count], colors[:count], config)
    assert len(ours(points[:count], colors[:count], config).points) == len(expected)


def test_coinciding_points_are_outliers() -> None:
    points, colors = np.ones((40, 3)), np.zeros((40, 3), np.uint8)
    found = ours(points, colors, FusionConfig())
    assert len(found.points) == 0 and found.counts["outliers"] == 40


@pytest.mark.parametrize("percent", [0.0, 12.5, 50.0, 80.0, 100.0])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_percentile_is_numpys(percent: float, count: int) -> None:
    values = np.random.default_rng(1).normal(size=count)
    assert percentile(torch.from_numpy(values), percent) == np.percentile(values, percent)


def test_refusals() -> None:
    points, colors = (torch.from_numpy(x) for x in cloud(4))

    def refused(match: str, colors: Tensor = colors, **more: Any) -> None:
        with pytest.raises(ValueError, match=match):
            fuse_cuda(points, colors, FusionConfig(**more.pop("given", {})), **more)

    refused("colors of shape", colors=colors[:2])
    refused("uint8", colors=colors.int())
    refused("valid of shape", valid=torch.ones(3, dtype=torch.bool))
    refused("use backend='native'", given={"nb_neighbors": 65})
    refused("needs a confidence", given={"confidence_percentile": 5.0})
