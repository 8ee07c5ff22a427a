"""Formats of other programs: their own readers open what is written, and find the scene in it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.room import room
from gen3r.scene import Scene
from gen3r.writers import masked_cloud
from gen3r_engine.formats import colmap, nerfstudio
from gen3r_engine.formats.cameras import (
    FrameCameras,
    frame_cameras,
    frustum_corners,
    frustum_lines,
    frustum_size,
)
from gen3r_engine.formats.depth_png import quantise, write_depth_png
from gen3r_engine.formats.frames import write_frames
from gen3r_engine.formats.glb import linear_light, write_glb
from gen3r_engine.formats.ply import write_cloud
from gen3r_engine.formats.tracks import MOST, observe, project
from gen3r_engine.fusion import PointCloud, fuse_points
from gen3r_engine.native import native, why_missing

HEIGHT, WIDTH, FRAMES = 84, 112, 5


@cache
def scene() -> Scene:
    return room(FRAMES, HEIGHT, WIDTH)


@cache
def cloud() -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    fused = fuse_points(*masked_cloud(scene()))
    return fused.points, fused.colors


def cameras() -> FrameCameras:
    return frame_cameras(scene().extrinsics, scene().intrinsics)


# ----------------------------------------------------------------------------------------- cameras


def test_unusable_cameras_are_left_out() -> None:
    pose = np.repeat(np.eye(4)[None], 6, axis=0)
    k = np.repeat(np.array([[50.0, 0, 28], [0, 50, 28], [0, 0, 1]])[None], 6, axis=0)
    pose[1, 0, 3] = np.nan
    k[2, 0, 0] = np.inf
    k[3, 1, 1] = 0.0
    pose[4, :3, :3] *= 2.0
    assert frame_cameras(pose, k).frames.tolist() == [0, 5]
    assert len(frame_cameras(pose[1:2], k[1:2])) == 0
    k[5, 0, 1] = 4.0
    with pytest.raises(ValueError, match="frame 5 has a skew of 4 pixels"):
        frame_cameras(pose, k)
    with pytest.raises(ValueError, match="must be"):
        frame_cameras(pose, k[:2])


def test_frusta_show_what_the_frames_show() -> None:
    corners = frustum_corners(cameras(), HEIGHT, WIDTH, 0.5)
    for camera in range(FRAMES):
        np.testing.assert_allclose(corners[camera, 0], cameras().positions[camera], atol=1e-12)
        pixels, depth = project(corners[camera, 1:], cameras(), camera)
        np.testing.assert_allclose(depth, 0.5, rtol=1e-6)
        expected = [[0, 0], [WIDTH, 0], [WIDTH, HEIGHT], [0, HEIGHT]]
        np.testing.assert_allclose(pixels, expected, atol=1e-4)  # float32 poses
    assert frustum_lines(corners).shape == (FRAMES, 8, 2, 3)
    assert frustum_size(np.zeros((0, 3))) == frustum_size(np.ones((5, 3))) == 0.1


# --------------------------------------------------------------------------------------------- glTF


def linear_to_srgb(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_glb_opens_in_trimesh(tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed")
    points, colors = cloud()
    write_glb(tmp_path / "s.glb", PointCloud(points, colors), cameras(), HEIGHT, WIDTH)
    loaded = trimesh.load(tmp_path / "s.glb")
    assert set(loaded.geometry) == {"points", "cameras"}
    upright = np.array([1.0, -1.0, -1.0])  # glTF: y up, looking along -z
    for node, geometry in loaded.geometry.items():
        transform = loaded.graph.get(next(n for n in loaded.graph.nodes_geometry if n == node))[0]
        placed = geometry.vertices @ transform[:3, :3].T + transform[:3, 3]
        if node == "points":
            np.testing.assert_allclose(placed, points * upright, atol=1e-5)
            # trimesh shows linear values as they are, rounded to 8 bits.
            linear = np.rint(linear_light()[colors] * 255.0)
            np.testing.assert_array_equal(geometry.colors[:, :3], linear)
        else:
            corners = frustum_corners(cameras(), HEIGHT, WIDTH, frustum_size(points))
            assert {tuple(p) for p in np.round(placed, 3)} == {
                tuple(p) for p in np.round((corners * upright).reshape(-1, 3), 3)
            }


def glb_document(path: Path) -> Any:
    data = path.read_bytes()
    assert data[:4] == b"glTF" and int.from_bytes(data[8:12], "little") == len(data)
    length = int.from_bytes(data[12:16], "little")
    assert length % 4 == 0 and data[16:20] == b"JSON"
    return json.loads(data[20 : 20 + length])


def test_glb_of_nothing_is_valid(tmp_path: Path) -> None:
    none = frame_cameras(np.full((1, 4, 4), np.nan), np.ones((1, 3, 3)))
    normals = np.zeros((0, 3), np.float32)
    nothing = PointCloud(np.zeros((0, 3)), np.zeros((0, 3), np.uint8), normals)
    write_glb(tmp_path / "a.glb", nothing, none, HEIGHT, WIDTH)
    assert "meshes" not in glb_document(tmp_path / "a.glb")
    write_glb(tmp_path / "b.glb", nothing, cameras(), HEIGHT, WIDTH)
    document = glb_document(tmp_path / "b.glb")
    assert [mesh["name"] for mesh in document["meshes"]] == ["cameras"]
    trimesh = pytest.importorskip("trimesh", reason="trimesh is not installed")
    assert list(trimesh.load(tmp_path / "b.glb").geometry) == ["cameras"]


@pytest.mark.parametrize("with_normals", [False, True])
def test_native_writers_write_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_normals: bool
) -> None:
    if native() is None:
        pytest.skip(f"the C++ extension is {why_missing()}")
    points, colors = cloud()
    normals = np.zeros(points.shape, np.float32)
    normals[::2, 2] = -1.0  # every other one is unknown
    given = PointCloud(points, colors, normals if with_normals else None)
    for name in ("native", "python"):
        if name == "python":
            monkeypatch.setattr("gen3r_engine.formats.glb.native", lambda: None)
            monkeypatch.setattr("gen3r_engine.formats.ply.native", lambda: None)
        write_glb(tmp_path / f"{name}.glb", given, cameras(), HEIGHT, WIDTH)
        write_cloud(tmp_path / f"{name}.ply", given)
    for suffix in ("glb", "ply"):
        ours, plain = ((tmp_path / f"{n}.{suffix}").read_bytes() for n in ("native", "python"))
        assert ours == plain
    rows = np.frombuffer(plain.split(b"end_header\n")[1], np.uint8)
    assert rows.size == len(points) * (27 if with_normals else 15)


def test_normals_of_a_glb_are_unit_vectors(tmp_path: Path) -> None:
    points, colors = cloud()
    normals = np.zeros(points.shape, np.float32)
    normals[::2, 0] = 1.0
    given = PointCloud(points, colors, normals)
    write_glb(tmp_path / "n.glb", given, cameras(), HEIGHT, WIDTH)
    document = glb_document(tmp_path / "n.glb")
    (mesh, _) = document["meshes"]
    accessor = document["accessors"][mesh["primitives"][0]["attributes"]["NORMAL"]]
    view = document["bufferViews"][accessor["bufferView"]]
    data = (tmp_path / "n.glb").read_bytes()
    start = len(data) - document["buffers"][0]["byteLength"] + view["byteOffset"]
    written = np.frombuffer(data, "<f4", len(points) * 3, start).reshape(-1, 3)
    np.testing.assert_allclose(np.linalg.norm(written, axis=1), 1.0)
    np.testing.assert_array_equal(written[::2], normals[::2])


def test_linear_light_turns_back() -> None:
    back = linear_to_srgb(linear_light().astype(float)) * 255.0
    np.testing.assert_allclose(back, np.arange(256), atol=1e-3)


# ------------------------------------------------------------------------------------------- COLMAP


def test_points_are_observed_where_they_are_seen() -> None:
    points, _ = cloud()
    depth = np.asarray(scene().depth)
    seen = observe(points, cameras(), depth)
    counts = np.bincount(seen.point, minlength=len(points))
    assert counts.max() == MOST and (counts >= 1).all() and counts.mean() > 2
    assert (np.diff(seen.camera) >= 0).all()
    pairs = seen.point * FRAMES + seen.camera
    assert len(np.unique(pairs)) == len(pairs), "a frame sees a point once"
    for camera in range(FRAMES):
        rows = seen.camera == camera
        pixel, z = project(points[seen.point[rows]], cameras(), camera)
        np.testing.assert_allclose(pixel, seen.pixel[rows])
        column, row = pixel.astype(int).T
        gap = np.abs(depth[camera, row, column] - z) / z
        assert (gap < 0.031).mean() > 0.98


def test_a_pixel_is_observed_at_its_centre() -> None:
    points = np.asarray(scene().points)[2, 10:12, 20]
    pixel, depth = project(points, cameras(), 2)
    np.testing.assert_allclose(pixel, [[20.5, 10.5], [20.5, 11.5]], atol=1e-3)
    np.testing.assert_allclose(depth, scene().depth[2, 10:12, 20], rtol=1e-6)


@pytest.mark.parametrize("form", ["binary", "text"])
def test_colmap_model_reads_in_pycolmap(tmp_path: Path, form: str) -> None:
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    points, colors = cloud()
    model = colmap.colmap_model(points, colors, cameras(), np.asarray(scene().depth))
    {"binary": colmap.write_binary, "text": colmap.write_text}[form](model, tmp_path)
    read = pycolmap.Reconstruction(str(tmp_path))
    assert (read.num_images(), read.num_cameras()) == (FRAMES, FRAMES)
    assert read.num_points3D() == len(points) - model.left_out == len(points)
    assert read.num_reg_images() == FRAMES
    worst = 0.0
    for number, image in read.images.items():
        frame = number - 1
        assert image.name == f"frame_{frame:05d}.png"
        pose = image.cam_from_world() if callable(image.cam_from_world) else image.cam_from_world
        np.testing.assert_allclose(pose.matrix(), scene().extrinsics[frame, :3], atol=2e-6)
        k = scene().intrinsics[frame].numpy()
        camera = read.cameras[image.camera_id]
        assert (camera.width, camera.height) == (WIDTH, HEIGHT)
        expected = [k[0, 0], k[1, 1], k[0, 2] + 0.5, k[1, 2] + 0.5]
        np.testing.assert_allclose(camera.params, expected, rtol=1e-6)
        for observation in image.points2D[::7]:
            point = read.points3D[observation.point3D_id]
            worst = max(worst, np.abs(image.project_point(point.xyz) - observation.xy).max())
            assert any(e.image_id == number for e in point.track.elements)
    assert worst < 0.5
    assert worst < 1e-3, "observations are the points' own projections"
    row = len(points) // 2
    np.testing.assert_array_equal(read.points3D[row + 1].color, colors[row])
    np.testing.assert_allclose(read.points3D[row + 1].xyz, points[row], atol=0)
    assert read.compute_mean_reprojection_error() < 0.5


def test_a_large_cloud_is_thinned_out_for_colmap(monkeypatch: pytest.MonkeyPatch) -> None:
    points, colors = cloud()
    monkeypatch.setattr(colmap, "MOST_POINTS", 1000)
    model = colmap.colmap_model(points, colors, cameras(), np.asarray(scene().depth))
    assert (len(model.points), model.thinned) == (1000, len(points) - 1000)
    assert model.points[:, 0].std() == pytest.approx(points[:, 0].std(), rel=0.1)


def test_colmap_leaves_out_what_no_frame_sees(tmp_path: Path) -> None:
    points, colors = cloud()
    behind = np.vstack([points[:50], [[0.0, 0.0, -50.0]]])
    model = colmap.colmap_model(behind, colors[:51], cameras(), np.asarray(scene().depth))
    assert (model.left_out, len(model.points)) == (1, 50)
    none = np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
    empty = colmap.colmap_model(*none, cameras(), np.asarray(scene().depth))
    no_cameras = frame_cameras(np.full((5, 4, 4), np.nan), scene().intrinsics)
    for name, nothing in (
        ("no points", empty),
        ("no cameras", colmap.colmap_model(points, colors, no_cameras, np.asarray(scene().depth))),
    ):
        folder = tmp_path / name
        folder.mkdir()
        colmap.write_binary(nothing, folder)
        colmap.write_text(nothing, folder)
        assert (folder / "points3D.bin").read_bytes() == bytes(8)
    pycolmap = pytest.importorskip("pycolmap", reason="pycolmap is not installed")
    assert pycolmap.Reconstruction(str(tmp_path / "no points")).num_points3D() == 0


# --------------------------------------------------------------------------------------- nerfstudio


def test_nerfstudio_poses_round_trip(tmp_path: Path) -> None:
    content = nerfstudio.transforms(cameras(), HEIGHT, WIDTH, images="images", cloud="pcds.ply")
    nerfstudio.write_transforms(tmp_path / "transforms.json", content)
    read = json.loads((tmp_path / "transforms.json").read_text())
    assert read["ply_file_path"] == "pcds.ply" and len(read["frames"]) == FRAMES
    points = np.asarray(scene().points)
    for index, frame in enumerate(read["frames"]):
        assert frame["file_path"] == f"images/frame_{index:05d}.png"
        pose = np.array(frame["transform_matrix"]) @ np.diag([1.0, -1.0, -1.0, 1.0])
        np.testing.assert_allclose(np.linalg.inv(pose), scene().extrinsics[index], atol=2e-6)
        # As nerfstudio does it: the camera looks along -z, y up, pixel centres at a half.
        local = (points[index, 30, 40] - pose[:3, 3]) @ np.array(frame["transform_matrix"])[:3, :3]
        x = frame["fl_x"] * local[0] / -local[2] + frame["cx"]
        y = frame["fl_y"] * -local[1] / -local[2] + frame["cy"]
        np.testing.assert_allclose([x, y], [40.5, 30.5], atol=1e-3)


# ------------------------------------------------------------------------------------------- images


def test_depth_png_reads_back_within_half_a_step(tmp_path: Path) -> None:
    depth = np.asarray(scene().depth).copy()
    depth[0, 0, :4] = (np.nan, np.inf, 0.0, -1.0)
    scale = write_depth_png(tmp_path / "depth", depth)
    record = json.loads((tmp_path / "depth" / "scale.json").read_text())
    assert record["scale"] == scale.scale == pytest.approx(np.nanmax(depth[1:]) / 65535, rel=0.2)
    assert record["pixels_without_depth"] == 4
    for frame in range(FRAMES):
        with Image.open(tmp_path / "depth" / f"frame_{frame:05d}.png") as image:
            steps = np.asarray(image)
        assert steps.dtype == np.uint16
        known = np.isfinite(depth[frame]) & (depth[frame] > 0)
        assert (steps[~known] == 0).all() and (steps[known] > 0).all()
        error = np.abs(steps[known] * record["scale"] - depth[frame][known])
        assert error.max() <= 0.5 * record["scale"] * (1 + 1e-9)


@pytest.mark.parametrize("value", [3.0, 0.0, float("nan"), 1e-30, 1e30])
def test_constant_depth_has_a_scale(value: float) -> None:
    steps, scale = quantise(np.full((2, 4, 4), value, np.float32))
    if np.isfinite(value) and value > 0:
        assert (steps == 65535).all() and scale.unknown == 0
        assert steps[0, 0, 0] * scale.scale == pytest.approx(value)
    else:
        assert (steps == 0).all() and scale.unknown == 32


def test_frames_are_lossless(tmp_path: Path) -> None:
    rgb = scene().rgb.numpy()
    write_frames(tmp_path / "images", rgb)
    for frame in range(FRAMES):
        with Image.open(tmp_path / "images" / f"frame_{frame:05d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), rgb[frame])
    with pytest.raises(FileExistsError):
        write_frames(tmp_path / "images", rgb)
