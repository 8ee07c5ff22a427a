"""The files of a scene: which appear, and that they hold the scene's values."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen3r.media import load_video, read_cameras
from gen3r.scene import SceneRequest
from gen3r.writers import masked_cloud
from gen3r_engine.depth_colors import colormap, depth_colors
from gen3r_engine.fusion import FusionConfig, PointCloud
from gen3r_engine.outputs import OUTPUTS, OutputOptions, write_scene
from gen3r_engine.splat import orbit, render
from tests.engine.scenes import made_scene

VIEW = np.full((40, 60, 3), 120, dtype=np.uint8)
WHEN = datetime(2026, 11, 22, 17, 30)


def request(views: int = 1) -> SceneRequest:
    return SceneRequest(
        images=[VIEW] * views, prompt="a slope", num_frames=5, height=56, width=56, seed=7
    )


def test_everything_is_written_and_holds_the_scene(tmp_path: Path) -> None:
    scene = made_scene()
    options = OutputOptions(frozenset(OUTPUTS), FusionConfig(voxel_size=0.05))
    written = write_scene(
        scene,
        request(),
        tmp_path,
        options,
        config={"model": "embedded", "untrained": True},
        sources=["photo.jpg"],
        when=WHEN,
    )
    assert written.path == tmp_path / "1view" / "20261122_1730"
    assert written.files == sorted(p.name for p in written.path.iterdir())
    assert written.files == [
        *("cameras.json", "depth", "depth.mp4", "images", "pcds.ply", "preview.png"),
        *("prompts.txt", "rgb.mp4", "run.json", "scene.glb", "scene.npz", "sparse"),
        *("transforms.json", "view.html"),
    ]
    frames = np.stack(load_video(written.path / "rgb.mp4")).astype(int)
    assert np.abs(frames - np.asarray(scene.rgb)).mean() < 8
    assert len(load_video(written.path / "depth.mp4")) == 5
    cameras = read_cameras(written.path / "cameras.json")
    np.testing.assert_allclose(cameras.extrinsics, scene.extrinsics, rtol=1e-7)
    np.testing.assert_allclose(cameras.intrinsics, scene.intrinsics, rtol=1e-7)
    assert (written.path / "prompts.txt").read_text() == "a slope\n"
    with np.load(written.path / "scene.npz") as arrays:
        np.testing.assert_array_equal(arrays["depth"], np.asarray(scene.depth))
        np.testing.assert_array_equal(arrays["mask"], np.asarray(scene.mask))
    with Image.open(written.path / "preview.png") as preview:
        assert preview.width == 1400

    record = json.loads((written.path / "run.json").read_text())
    assert record["request"]["views"] == ["photo.jpg"]
    assert record["request"]["task"] == "1view"
    assert record["seed"] == 7
    assert record["config"]["fusion"]["voxel_size"] == 0.05
    assert record["seconds"]["denoise"] == 1.5
    assert record["seconds"]["write points"] > 0 and record["seconds"]["fuse points"] > 0
    assert record["cloud"]["backend"] in ("native", "python")
    counts = record["cloud"]["counts"]
    assert counts["given"] == scene.mask.numel()
    assert counts["masked"] == int((~scene.mask).sum())
    assert record["cloud"]["points"] == counts["cells"] <= counts["kept"]
    assert record["failed"] == {}
    assert record["peak_memory"]["host_bytes"] > 10**6
    assert record["versions"]["torch"]
    assert record["scene"]["solver"] == "euler"


def test_a_cloud_that_the_engine_made_is_kept(tmp_path: Path) -> None:
    points, colors = np.ones((3, 3)), np.full((3, 3), 9, np.uint8)
    cloud = PointCloud(points, colors, counts={"given": 3, "cells": 3}, backend="cuda")
    scene = dataclasses.replace(made_scene(), cloud=cloud)
    written = write_scene(scene, request(), tmp_path, OutputOptions(frozenset({"ply"})))
    record = json.loads((written.path / "run.json").read_text())
    assert record["cloud"] == {"points": 3, "backend": "cuda", "counts": cloud.counts}
    assert "fuse points" not in record["seconds"]
    assert b"element vertex 3\n" in (written.path / "pcds.ply").read_bytes()
    assert OutputOptions(frozenset({"rgb", "npz"})).cloud_fusion is None
    assert OutputOptions(frozenset({"glb"})).cloud_fusion == FusionConfig()


def test_only_what_was_asked(tmp_path: Path) -> None:
    written = write_scene(made_scene(), request(), tmp_path, OutputOptions(frozenset({"cameras"})))
    assert written.files == ["cameras.json", "prompts.txt", "run.json"]


def test_second_scene_of_a_minute_gets_a_number(tmp_path: Path) -> None:
    options = OutputOptions(frozenset({"cameras"}))
    names = [
        write_scene(made_scene(), request(), tmp_path, options, when=WHEN).path.name
        for _ in range(3)
    ]
    assert names == ["20261122_1730", "20261122_1730-2", "20261122_1730-3"]


def test_unknown_output() -> None:
    with pytest.raises(ValueError, match="'video' is unknown; choose from rgb, depth"):
        OutputOptions(frozenset({"rgb", "video"}))
    with pytest.raises(ValueError, match="no outputs"):
        OutputOptions(frozenset())


def test_names_of_outputs() -> None:
    assert OutputOptions(frozenset({"ply"})).outputs == {"points"}
    assert OutputOptions(frozenset({"nerfstudio"})).outputs == {"nerfstudio", "points"}
    assert OutputOptions(frozenset({"all", "rgb"})).outputs == set(OUTPUTS)


@pytest.mark.filterwarnings("ignore:no point of")
def test_preview_of_a_scene_without_points(tmp_path: Path) -> None:
    scene = made_scene()
    scene.mask[:] = False
    scene.depth[:] = float("nan")
    written = write_scene(scene, request(2), tmp_path)
    assert {"preview.png", "pcds.ply", "depth.mp4"} <= set(written.files)


def test_a_cloud_too_wide_for_the_grid_is_saved_whole(tmp_path: Path) -> None:
    scene = made_scene()
    scene.points[:] *= 1e9
    written = write_scene(scene, request(), tmp_path, OutputOptions(frozenset({"points"})))
    assert "not thinned out" in written.notes[0]
    assert json.loads((written.path / "run.json").read_text())["notes"] == written.notes
    assert (written.path / "pcds.ply").stat().st_size > 15 * 10_000


def test_cloud_leaves_out_masked_and_broken_points() -> None:
    scene = made_scene()
    scene.points[0, 10, 10] = float("nan")
    points, colors = masked_cloud(scene)
    assert len(points) == int(scene.mask.sum()) - 1
    assert np.isfinite(points).all()
    assert colors.dtype == np.uint8


def test_colormap_is_evenly_brighter() -> None:
    colors = colormap(np.linspace(0, 1, 256)).astype(np.float64) / 255.0
    luminance = (colors**2.2) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) >= -1e-3).all()
    assert luminance[-1] > 0.8
    assert luminance[0] < 0.02


def test_depth_colours_keep_one_scale_for_the_clip() -> None:
    depth = np.stack([np.linspace(1, 4, 64).reshape(8, 8)] * 3)
    depth[2] *= 1.5
    depth[1, 0, 0] = np.nan
    colors = depth_colors(depth)
    np.testing.assert_array_equal(colors[0, 1:], colors[1, 1:])
    assert (colors[2] != colors[0]).any()
    assert colors[0, 0, 0].sum() > colors[0, 7, 7].sum()  # near is bright
    assert colors[1, 0, 0].tolist() == [40, 40, 44]  # no depth


def test_nearest_point_is_drawn_on_top() -> None:
    points = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0], [1.0, 1.0, 2.0], [-1.0, -1.0, 2.0]])
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 255]], dtype=np.uint8)
    view = orbit(points, np.eye(4), yaw=0, pitch=0, width=80, height=60)
    image = render(points, colors, view, (0, 0, 0))
    assert image[30, 40].tolist() == [255, 0, 0]
    pixels, depth = view.project(points)
    assert (depth > 0).all()
    assert (pixels >= 0).all() and (pixels <= [80, 60]).all()


def test_orbit_sees_from_the_right_and_from_above() -> None:
    points = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 3.0]])
    view = orbit(points, np.eye(4), yaw=30, pitch=20, width=80, height=60)
    near, far = view.project(points)[0]
    assert near[0] < far[0], "seen from the right, what is near lies further left"
    assert near[1] > far[1], "seen from above, what is far lies higher"
