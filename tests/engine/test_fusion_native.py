"""The fusion in C++ against the one in numpy: any cloud, any options, the same points."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.room import room
from gen3r_engine.fusion import FusionConfig, PointCloud, fuse, fuse_points
from gen3r_engine.fusion_native import fuse_native
from gen3r_engine.native import native, why_missing

pytestmark = pytest.mark.skipif(native() is None, reason=f"the extension is {why_missing()}")


def both(
    points: np.ndarray, colors: np.ndarray, config: FusionConfig, **optional: np.ndarray
) -> tuple[PointCloud, PointCloud]:
    one, other = (
        fuse_points(points, colors, dataclasses.replace(config, backend=name), **optional)
        for name in ("native", "python")
    )
    return one, other


def assert_same(one: PointCloud, other: PointCloud) -> None:
    assert one.counts == other.counts
    assert np.array_equal(one.points, other.points)
    assert np.array_equal(one.colors, other.colors)
    if other.normals is None:
        assert one.normals is None
    else:
        assert one.normals is not None
        assert np.allclose(one.normals, other.normals, atol=1e-6)


def made(kind: str, count: int, random: np.random.Generator) -> np.ndarray:
    """[count, 3] points of a kind that is hard on a search tree or a grid."""
    points = random.normal(size=(count, 3))
    if kind == "surface":
        points[:, 2] = 0.01 * points[:, 2] + 3
    elif kind == "line":
        points[:, 1:] = 0.5
    elif kind == "scales":
        points[::2] *= 1e-4
        points[:2] *= 1e5
    elif kind == "broken":
        points[random.random(count) < 0.2] = np.nan
        points[random.random(count) < 0.1, 0] = np.inf
    return points


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["normal", "surface", "line", "scales", "broken"]),
    count=st.integers(0, 400),
    seed=st.integers(0, 2**32 - 1),
    config=st.builds(
        FusionConfig,
        voxel_size=st.none() | st.floats(0.01, 10.0),
        filter_outliers=st.booleans(),
        nb_neighbors=st.integers(1, 60),
        std_ratio=st.floats(0.1, 3.0),
        far_percentile=st.none() | st.floats(0.5, 100.0),
        near_percentile=st.floats(0.0, 100.0),
        radius_neighbors=st.integers(1, 12),
        radius_scale=st.floats(0.5, 6.0),
        confidence_percentile=st.none() | st.floats(0.0, 99.0),
        normals=st.booleans(),
    ),
)
def test_any_cloud_with_any_options(kind: str, count: int, seed: int, config: FusionConfig) -> None:
    random = np.random.default_rng(seed)
    points = made(kind, count, random)
    colors = random.integers(0, 256, size=(count, 3), dtype=np.uint8)
    normals = random.normal(size=(count, 3)).astype(np.float32)
    normals[random.random(count) < 0.1, 0] = np.nan
    confidence = random.integers(0, 30, count).astype(np.float32)
    confidence[random.random(count) < 0.1] = np.nan
    try:
        expected = fuse_points(
            *(points, colors, dataclasses.replace(config, backend="python")),
            normals=normals,
            confidence=confidence,
        )
    except ValueError as error:
        with pytest.raises(ValueError, match="larger voxels"):
            both(points, colors, config, normals=normals, confidence=confidence)
        assert "larger voxels" in str(error)
        return
    native_config = dataclasses.replace(config, backend="native")
    found = fuse_points(points, colors, native_config, normals=normals, confidence=confidence)
    assert_same(found, expected)


def test_a_room_with_every_step() -> None:
    scene = room(5, 56, 84, flying=0.03)
    config = FusionConfig(
        *(0.02, True), far_percentile=90, near_percentile=60, confidence_percentile=5, normals=True
    )
    one = fuse(scene, dataclasses.replace(config, backend="native"))
    other = fuse(scene, dataclasses.replace(config, backend="python"))
    assert_same(one, other)
    assert min(one.counts[n] for n in one.counts if n != "not_finite") > 0


@pytest.mark.parametrize(
    "points",
    [
        np.ones((4000, 3)),
        np.concatenate([np.ones((4000, 3)), np.random.default_rng(1).normal(size=(500, 3))]),
        np.random.default_rng(2).integers(0, 4, size=(20_000, 3)).astype(float),
        np.concatenate([np.full((1, 3), 1e9), np.random.default_rng(3).random((3000, 3))]),
        np.random.default_rng(4).normal(size=(3000, 1)) * np.ones(3),
    ],
    ids=["coinciding", "half coinciding", "64 places", "one far away", "collinear"],
)
def test_masses_in_one_place(points: np.ndarray) -> None:
    colors = np.zeros(points.shape, np.uint8)
    assert_same(*both(points, colors, FusionConfig(voxel_size=None, near_percentile=50)))


def test_masses_in_one_place_take_no_quadratic_time() -> None:
    points = np.ones((200_000, 3))  # scipy would take 10 minutes
    points[:100] = np.random.default_rng(0).normal(size=(100, 3))
    config = FusionConfig(voxel_size=None, near_percentile=50, backend="native")
    cloud = fuse_points(points, np.zeros(points.shape, np.uint8), config)
    assert cloud.counts["outliers"] >= 199_900


def test_equal_distances_drop_what_rounding_drops() -> None:
    # On a grid all inner points have one mean distance; it is far from the threshold.
    points = np.stack(np.meshgrid(*[np.arange(12.0)] * 3), -1).reshape(-1, 3)
    assert_same(*both(points, np.zeros(points.shape, np.uint8), FusionConfig(nb_neighbors=7)))


def test_threads_change_nothing() -> None:
    scene = room(3, 112, 112)
    points = scene.points.numpy().reshape(-1, 3)
    colors = scene.rgb.numpy().reshape(-1, 3)
    one, four = (fuse_native(points, colors, FusionConfig(), threads=n) for n in (1, 4))
    assert_same(one, four)


def test_other_threads_run_meanwhile() -> None:
    points = np.random.default_rng(0).normal(size=(200_000, 3))
    colors = np.zeros(points.shape, np.uint8)
    fusing = threading.Thread(target=fuse_native, args=(points, colors, FusionConfig()))
    fusing.start()
    turns = 0
    while fusing.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 5


def test_the_binding_checks_what_it_is_given() -> None:
    extension = native()
    assert extension is not None
    options = dataclasses.asdict(FusionConfig())
    del options["normals"], options["backend"]
    points, colors = np.zeros((4, 3)), np.zeros((4, 3), np.uint8)

    def call(*arrays: object, **changed: object) -> None:
        extension.fuse_points(*arrays, **(options | changed))

    with pytest.raises(ValueError, match=r"points must be \[N, 3\]"):
        call(points[0], colors, None, None, None)
    with pytest.raises(ValueError, match="points has the wrong type or is not contiguous"):
        call(points.astype(np.int64), colors, None, None, None)
    with pytest.raises(ValueError, match="points has the wrong type or is not contiguous"):
        call(np.zeros((4, 6))[:, ::2], colors, None, None, None)
    with pytest.raises(ValueError, match="colors must have 4 rows of 3"):
        call(points, colors[:3], None, None, None)
    with pytest.raises(ValueError, match="valid must have 4 rows of 1"):
        call(points, colors, None, None, np.ones(5, np.uint8))
    with pytest.raises(ValueError, match="needs a confidence"):
        call(points, colors, None, None, None, confidence_percentile=5.0)
