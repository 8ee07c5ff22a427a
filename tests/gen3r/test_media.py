"""Files in and out: what is read equals what was written, and bad files are told in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from gen3r.media import (
    InputError,
    image_files,
    load_image,
    load_video,
    load_views,
    read_cameras,
)
from gen3r.writers import save_video, write_cameras, write_ply


def picture(height: int = 40, width: int = 56) -> np.ndarray:
    """A smooth test image, uint8 [H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 4, y * 6, 255 - x - y], axis=-1).clip(0, 255).astype(np.uint8)


def pose(shift: float = 0.0) -> list[list[float]]:
    matrix = np.eye(4)
    matrix[0, 3] = shift
    return matrix.tolist()


K = [[100.0, 0.0, 56.0], [0.0, 100.0, 56.0], [0.0, 0.0, 1.0]]


# ------------------------------------------------------------------------------------------ images


def test_rgb_image_is_read_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), picture())


def test_grey_image_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = picture()[..., 0]
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), np.stack([grey] * 3, axis=-1))


def test_sixteen_bit_grey_is_scaled(tmp_path: Path) -> None:
    wide = (picture()[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "a.png")
    np.testing.assert_allclose(load_image(tmp_path / "a.png")[..., 1], picture()[..., 0], atol=1)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[..., 0], rgba[:2, :, 3] = 200, 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert (image[:2] == [200, 0, 0]).all()
    assert (image[2:] == 255).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    Image.fromarray(picture(40, 56)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), np.rot90(picture(40, 56), -1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "empty"),
        (b"this is not a picture", "is not an image"),
        ("truncated", "damaged"),
    ],
)
def test_bad_images(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "a.png"
    if content == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- views


def test_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert [f.name for f in image_files(tmp_path)] == ["frame1.png", "frame2.png", "frame10.png"]
    views = load_views([tmp_path])
    assert (views.kind, [int(f[0, 0, 0]) for f in views.frames]) == ("folder", [1, 2, 10])
    assert [int(f[0, 0, 0]) for f in load_views([tmp_path], stride=2).frames] == [1, 10]
    assert len(load_views([tmp_path], max_frames=2).frames) == 2


def test_two_images_of_different_size(tmp_path: Path) -> None:
    for name, size in (("a", (20, 30)), ("b", (50, 40))):
        Image.fromarray(picture(*size)).save(tmp_path / f"{name}.png")
    views = load_views([tmp_path / "a.png", tmp_path / "b.png"])
    assert [f.shape for f in views.frames] == [(20, 30, 3), (50, 40, 3)]


def test_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        load_views([tmp_path])


def test_three_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 paths given"):
        load_views([tmp_path / "a.png"] * 3)


# ------------------------------------------------------------------------------------------- video


def test_video_round_trip(tmp_path: Path) -> None:
    clip = np.stack([np.roll(picture(64, 96), 2 * i, axis=1) for i in range(7)])
    path = tmp_path / "a.mp4"
    save_video(clip, path, fps=12)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (float(stream.average_rate or 0), stream.frames) == (12.0, 7)
    frames = load_video(path)
    assert len(frames) == 7
    # 4:2:0 chroma and rounding: a few grey levels on average, not a shifted or swapped picture.
    assert np.abs(np.stack(frames).astype(int) - clip).mean() < 6
    every_third = load_video(path, stride=3)
    np.testing.assert_array_equal(np.stack(every_third), np.stack(frames)[::3])
    assert len(load_video(path, max_frames=4)) == 4
    assert load_views([path]).kind == "video"


def test_video_refuses_odd_sizes_and_floats(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even sizes"):
        save_video(np.zeros((2, 5, 4, 3), np.uint8), tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="uint8"):
        save_video(np.zeros((2, 4, 4, 3)), tmp_path / "a.mp4")


def test_video_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 16000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(InputError, match="no video track"):
        load_video(path)


def test_broken_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0" * 2000)
    with pytest.raises(InputError, match="can not be decoded"):
        load_video(tmp_path / "a.mp4")


# ----------------------------------------------------------------------------------------- cameras


def test_cameras_round_trip(tmp_path: Path) -> None:
    extrinsics = np.array([pose(0.1 * i) for i in range(5)])
    intrinsics = np.array([K] * 5)
    write_cameras(tmp_path / "c.json", extrinsics, intrinsics)
    cameras = read_cameras(tmp_path / "c.json")
    np.testing.assert_array_equal(np.asarray(cameras.extrinsics), extrinsics)
    np.testing.assert_array_equal(np.asarray(cameras.intrinsics), intrinsics)
    write_cameras(tmp_path / "d.json", extrinsics[:, :3], intrinsics)
    assert (tmp_path / "d.json").read_text() == (tmp_path / "c.json").read_text()


BAD_CAMERAS: dict[str, tuple[Any, str]] = {
    "malformed": ('{"extrinsics": [', "not valid JSON"),
    "list": ([pose()], "one JSON object"),
    "no intrinsics": ({"extrinsics": [pose()]}, "has no 'intrinsics'"),
    "empty": ({"extrinsics": [], "intrinsics": []}, "list with one matrix per frame"),
    "3x4": (
        {"extrinsics": [pose(), pose()[:3]], "intrinsics": [K, K]},
        "extrinsics of frame 1 is 3 x 4, not 4 x 4",
    ),
    "ragged": ({"extrinsics": [[[1, 0], [0]]], "intrinsics": [K]}, "not a matrix of numbers"),
    "text": ({"extrinsics": ["identity"], "intrinsics": [K]}, "not a matrix of numbers"),
    "nan": ({"extrinsics": [pose(math.nan)], "intrinsics": [K]}, "frame 0 hold NaN"),
    "singular": ({"extrinsics": [[[0.0] * 4] * 4], "intrinsics": [K]}, "no inverse"),
    "flat intrinsics": ({"extrinsics": [pose()], "intrinsics": [[1, 2, 3]]}, "is 3, not 3 x 3"),
    "lengths": ({"extrinsics": [pose()] * 2, "intrinsics": [K]}, "2 extrinsics and 1 intrinsics"),
}


@pytest.mark.parametrize("case", BAD_CAMERAS)
def test_bad_cameras(tmp_path: Path, case: str) -> None:
    content, message = BAD_CAMERAS[case]
    path = tmp_path / "c.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        read_cameras(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


# --------------------------------------------------------------------------------------------- ply


def test_ply_is_read_back_byte_for_byte(tmp_path: Path) -> None:
    points = np.array([[0.5, -1.0, 2.0], [3.0, 4.0, 5.25]])
    colors = np.array([[1, 2, 3], [253, 254, 255]], np.uint8)
    write_ply(tmp_path / "p.ply", points, colors)
    header, body = (tmp_path / "p.ply").read_bytes().split(b"end_header\n")
    assert b"format binary_little_endian 1.0\nelement vertex 2\n" in header
    rows = np.frombuffer(body, dtype=[("p", "<f4", 3), ("c", "u1", 3)])
    np.testing.assert_array_equal(rows["p"], points.astype(np.float32))
    np.testing.assert_array_equal(rows["c"], colors)
    with pytest.raises(ValueError, match="uint8"):
        write_ply(tmp_path / "p.ply", points, colors / 255.0)
