"""fuse(scene): masks, counts, normals, and what a broken scene gives."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from benchmarks.room import room
from gen3r.cameras import depth_bounds, invert_pose
from gen3r.scene import Scene
from gen3r_engine.fusion import FusionConfig, fuse
from gen3r_kernels import unproject

ALL = FusionConfig(voxel_size=None, filter_outliers=False)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return room(3, 56, 84)


def with_depth(scene: Scene, depth: torch.Tensor, **changed: torch.Tensor) -> Scene:
    """The scene with other depth maps (or cameras), made as the pipeline makes it."""
    scene = dataclasses.replace(scene, depth=depth, **changed)
    points, mask = unproject(depth, scene.extrinsics, scene.intrinsics, *depth_bounds(depth))
    return dataclasses.replace(scene, points=points, mask=mask & points.isfinite().all(-1))


def test_the_room_is_a_scene(scene: Scene) -> None:
    assert scene.rgb.dtype == torch.uint8 and scene.points.dtype == torch.float64
    assert 0.9 < scene.mask.float().mean() < 1
    assert torch.equal(scene.extrinsics[0], torch.eye(4))
    again, other = room(3, 56, 84), room(3, 56, 84, seed=1)
    assert torch.equal(again.points, scene.points) and not torch.equal(other.depth, scene.depth)
    clean = room(1, 56, 84, noise=0, flying=0)
    assert clean.depth.min() > 0.5 and clean.depth.max() < 20.1


def test_masked_points_stay_out_and_are_counted(scene: Scene) -> None:
    cloud = fuse(scene, ALL)
    assert np.array_equal(cloud.points, scene.points[scene.mask].numpy())
    assert np.array_equal(cloud.colors, scene.rgb[scene.mask].numpy())
    assert cloud.counts["masked"] == int((~scene.mask).sum())
    assert cloud.counts["given"] == scene.mask.numel()


def test_confidence_cut(scene: Scene) -> None:
    cloud = fuse(scene, dataclasses.replace(ALL, confidence_percentile=20.0))
    valid = int(scene.mask.sum())
    assert 0.1 * valid < cloud.counts["unsure"] <= 0.2 * valid


def test_normals_face_the_camera_and_follow_the_surface() -> None:
    clean = room(2, 112, 112, noise=0, flying=0)
    cloud = fuse(clean, dataclasses.replace(ALL, normals=True))
    normals = cloud.normals
    assert normals is not None and normals.dtype == np.float32
    length = np.linalg.norm(normals, axis=1)
    assert np.all((np.abs(length - 1) < 1e-5) | (length == 0)) and (length == 0).mean() < 0.01
    # The floor is at y = 1.6 (y points down): its normals point up, to within rounding, but for
    # the pixels at the feet of the furniture.
    floor = np.abs(cloud.points[:, 1] - 1.6) < 1e-3
    assert floor.sum() > 1000
    assert np.mean(normals[floor, 1] < -0.99) > 0.97
    centers = invert_pose(clean.extrinsics.double())[:, :3, 3].numpy()
    frame = np.nonzero(clean.mask.numpy())[0]
    towards = ((centers[frame] - cloud.points) * normals).sum(1)
    assert (towards >= 0).all()
    averaged = fuse(clean, FusionConfig(0.1, False, normals=True)).normals
    assert averaged is not None and (np.linalg.norm(averaged, axis=1) < 1 + 1e-5).all()


def test_nan_depth_is_dropped_and_counted(scene: Scene) -> None:
    depth = scene.depth.clone()
    depth[1, :10] = torch.nan
    depth[2, 3, 4] = torch.inf
    points, mask = unproject(depth, scene.extrinsics, scene.intrinsics, *depth_bounds(scene.depth))
    broken = dataclasses.replace(scene, depth=depth, points=points, mask=mask)
    cloud = fuse(broken, dataclasses.replace(ALL, normals=True))
    assert cloud.counts["not_finite"] == 10 * 84 + 1
    assert np.isfinite(cloud.points).all()
    assert cloud.normals is not None and np.isfinite(cloud.normals).all()


def test_an_infinite_focal_length_is_dropped_and_counted(scene: Scene) -> None:
    intrinsics = scene.intrinsics.clone()
    intrinsics[1, 0, 0] = torch.inf
    cloud = fuse(with_depth(scene, scene.depth, intrinsics=intrinsics), ALL)
    assert cloud.counts["not_finite"] == 56 * 84
    assert 0 < len(cloud) <= 2 * 56 * 84


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan"), -1.0, 1e30])
def test_constant_depth_gives_an_empty_cloud_and_a_warning(scene: Scene, value: float) -> None:
    flat = with_depth(scene, torch.full_like(scene.depth, value))
    with pytest.warns(UserWarning, match=r"no point of 14,112 is left"):
        cloud = fuse(flat, FusionConfig(normals=True))
    assert len(cloud) == 0
    assert cloud.points.shape == cloud.colors.shape == (0, 3)
    assert cloud.normals is not None and cloud.normals.shape == (0, 3)
    assert cloud.counts["masked"] + cloud.counts["not_finite"] == cloud.counts["given"] == 14112


def test_a_wall_of_constant_depth_that_the_mask_keeps(scene: Scene) -> None:
    flat = with_depth(scene, torch.ones_like(scene.depth))
    flat = dataclasses.replace(flat, mask=torch.ones_like(flat.mask))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cloud = fuse(flat, FusionConfig(0.01, normals=True))
    assert 0 < len(cloud) < flat.mask.numel()


def test_confidence_of_every_value_is_kept_or_counted(scene: Scene) -> None:
    flat = dataclasses.replace(scene, depth_confidence=torch.ones_like(scene.depth))
    cloud = fuse(flat, dataclasses.replace(ALL, confidence_percentile=50.0))
    assert cloud.counts["unsure"] == 0
    flat = dataclasses.replace(scene, depth_confidence=torch.full_like(scene.depth, torch.nan))
    with pytest.warns(UserWarning, match="unsure"):
        assert len(fuse(flat, dataclasses.replace(ALL, confidence_percentile=50.0))) == 0
