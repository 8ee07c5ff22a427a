"""Each published format from a small copy with known cameras: do points land on their dots?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen3r_training.data.layout import read_scene
from gen3r_training.formats import (
    FORMATS,
    PrepareOptions,
    PrepareReport,
    co3d,
    dl3dv,
    format_named,
    prepare_scenes,
    re10k,
    tartanair,
    wildrgbd,
)
from gen3r_training.formats.cameras import pinhole
from gen3r_training.formats.distortion import IGNORED_PIXELS, distort, largest_shift
from tests.training import published
from tests.training.published import known_scene, worst_depth, worst_miss

KNOWN = known_scene()
CENTRED = known_scene(centred=True)
HALF_PIXEL = 0.5
Writer = Callable[[Path], object]

COPIES: dict[str, tuple[Writer, published.Known, str]] = {
    "re10k": (lambda p: published.write_re10k(p, KNOWN), KNOWN, "0123456789abcdef"),
    "dl3dv": (lambda p: published.write_dl3dv(p, KNOWN), KNOWN, "0a1b2c"),
    "co3d": (
        lambda p: published.write_co3d(p, KNOWN, {"11_22_33": {}}, "ndc_norm_image_bounds"),
        KNOWN,
        "apple_11_22_33",
    ),
    "wildrgbd": (lambda p: published.write_wildrgbd(p, KNOWN), KNOWN, "apple_scenes_000"),
    "tartanair": (lambda p: published.write_tartanair(p, CENTRED), CENTRED, "office_Easy_P000"),
}
WITH_DEPTH = ("co3d", "wildrgbd", "tartanair")


def prepared(name: str, source: Path, destination: Path, **options: object) -> PrepareReport:
    """Prepare all scenes with two workers."""
    chosen = PrepareOptions(destination, workers=2, **options)  # type: ignore[arg-type]
    return prepare_scenes(FORMATS[name].find(source), chosen)


@pytest.mark.parametrize("name", FORMATS)
def test_points_land_where_the_frames_show_them(name: str, tmp_path: Path) -> None:
    write, known, scene = COPIES[name]
    write(tmp_path / "src")
    report = prepared(name, tmp_path / "src", tmp_path / "dst")
    assert list(report.written) == [scene] and not report.skipped and not report.absent
    folder = tmp_path / "dst" / "train" / scene
    assert worst_miss(folder, known) < 0.2
    assert (folder / "depth").is_dir() == (name in WITH_DEPTH)
    if name in WITH_DEPTH:
        assert worst_depth(folder, known) < 0.01
    read = read_scene(folder)  # training takes it
    np.testing.assert_allclose(read.extrinsics, known.poses, atol=1e-6)
    np.testing.assert_allclose(read.intrinsics[0], known.intrinsics, atol=1e-4)
    assert [p.name for p in (tmp_path / "dst" / "train").iterdir()] == [scene]


def _camera_to_world(poses: np.ndarray) -> np.ndarray:  # [F, 3, 4] -> [F, 4, 4]
    return np.linalg.inv([np.r_[pose, [[0.0, 0.0, 0.0, 1.0]]] for pose in poses])


def _over_the_height(relative: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    width, height = size
    return np.stack([pinhole(*row) for row in relative * [height, width, height, width]])


@pytest.mark.parametrize(
    ("name", "module", "attribute", "wrong"),
    [
        ("re10k", re10k, "to_4x4", _camera_to_world),
        ("re10k", re10k, "_intrinsics", _over_the_height),
        ("dl3dv", dl3dv, "OPENGL_TO_OPENCV", np.eye(4)),
        ("co3d", co3d, "_FLIP", np.eye(3)),
        ("wildrgbd", wildrgbd, "invert", lambda poses: poses),
        ("tartanair", tartanair, "NED_TO_OPENCV", np.eye(3)),
        ("tartanair", tartanair, "invert", lambda poses: poses),
    ],
)
def test_a_wrong_convention_is_seen(
    name: str,
    module: object,
    attribute: str,
    wrong: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check of the other test finds what it should: poses read the wrong way miss the dots."""
    write, known, scene = COPIES[name]
    write(tmp_path / "src")
    monkeypatch.setattr(module, attribute, wrong)
    report = prepared(name, tmp_path / "src", tmp_path / "dst")
    assert not report.skipped
    assert worst_miss(tmp_path / "dst" / "train" / scene, known) > 0.5


@pytest.mark.parametrize("name", FORMATS)
def test_half_a_pixel_is_seen(name: str, tmp_path: Path) -> None:
    write, known, scene = COPIES[name]
    write(tmp_path / "src")
    prepared(name, tmp_path / "src", tmp_path / "dst")
    file = tmp_path / "dst" / "train" / scene / "cameras.json"
    record = json.loads(file.read_text())
    shifted = np.array(record["intrinsics"])
    shifted[:, :2, 2] -= HALF_PIXEL
    file.write_text(json.dumps({**record, "intrinsics": shifted.tolist()}))
    assert worst_miss(file.parent, known) > 0.5


@pytest.mark.parametrize("name", FORMATS)
def test_shrunk_frames(name: str, tmp_path: Path) -> None:
    """The short side is as asked, and intrinsics and depth follow."""
    write, known, scene = COPIES[name]
    write(tmp_path / "src")
    report = prepared(name, tmp_path / "src", tmp_path / "dst", size=101)
    folder = tmp_path / "dst" / "train" / scene
    with Image.open(
        folder / "frames" / "000000.jpg" if name == "co3d" else folder / "frames" / "000000.png"
    ) as image:
        assert image.size == (133, 101)
    assert report.written[scene].shrunk
    assert worst_miss(folder, known) < 0.3
    if name in WITH_DEPTH:
        assert worst_depth(folder, known) < 0.01


def test_co3d_in_isotropic_space(tmp_path: Path) -> None:
    """Both normalised spaces give the same pixels; one taken for the other does not."""
    published.write_co3d(tmp_path, KNOWN, {"1_2_3": {}}, "ndc_isotropic")
    prepared("co3d", tmp_path, tmp_path / "dst")
    assert worst_miss(tmp_path / "dst" / "train" / "apple_1_2_3", KNOWN) < 0.2
    viewpoint = {"focal_length": [2.0, 2.0], "principal_point": [0.1, 0.1]}
    isotropic = co3d.intrinsics_in_pixels(
        {**viewpoint, "intrinsics_format": "ndc_isotropic"}, 200, 100
    )
    np.testing.assert_allclose(isotropic, [[100, 0, 95], [0, 100, 45], [0, 0, 1]])
    legacy = co3d.intrinsics_in_pixels(viewpoint, 200, 100)
    np.testing.assert_allclose(legacy, [[200, 0, 90], [0, 100, 45], [0, 0, 1]])
    with pytest.raises(ValueError, match="neither ndc_norm_image_bounds nor ndc_isotropic"):
        co3d.intrinsics_in_pixels({**viewpoint, "intrinsics_format": "pixels"}, 200, 100)


def test_co3d_masked_depth_is_none(tmp_path: Path) -> None:
    published.write_co3d(tmp_path, KNOWN, {"1_2_3": {}}, "ndc_isotropic")
    prepared("co3d", tmp_path, tmp_path / "dst")
    with Image.open(tmp_path / "dst" / "train" / "apple_1_2_3" / "depth" / "000000.png") as image:
        steps = np.asarray(image)
    assert ((steps > 0) == (KNOWN.depth(0) < published.BACKGROUND)).all()


def test_co3d_quality_and_published_split(tmp_path: Path) -> None:
    sequences: dict[str, dict[str, object]] = {
        "1_1_1": {"viewpoint_quality_score": 0.9},
        "2_2_2": {"viewpoint_quality_score": 0.1},
        "3_3_3": {"viewpoint_quality_score": 0.9},
        "4_4_4": {"viewpoint_quality_score": float("nan")},
    }
    category = published.write_co3d(tmp_path, KNOWN, sequences, "ndc_isotropic")
    lists = category / "set_lists"
    lists.mkdir()
    held = {"train": [["1_1_1", 0, "x.jpg"]], "val": [["3_3_3", 0, "x.jpg"]], "test": []}
    (lists / "set_lists_fewview_dev.json").write_text(json.dumps(held))
    report = prepared("co3d", tmp_path, tmp_path / "dst")
    assert list(report.written) == ["apple_1_1_1"] and report.other_split == 1
    assert report.skipped["apple_2_2_2"] == "viewpoint_quality_score 0.1 is below 0.5"
    assert set(report.skipped) == {"apple_2_2_2", "apple_4_4_4"}
    report = prepared("co3d", tmp_path, tmp_path / "dst", split="val")
    assert list(report.written) == ["apple_3_3_3"]
    entries = co3d.find(tmp_path, min_quality=0.0)
    report = prepare_scenes(entries, PrepareOptions(tmp_path / "all", workers=1))
    assert len(report.written) == 3 and not report.skipped


@pytest.mark.parametrize(("camera", "depth"), [("left", "npz"), ("lcam_front", "png")])
def test_tartanair_other_depth_files(camera: str, depth: str, tmp_path: Path) -> None:
    published.write_tartanair(tmp_path, CENTRED, camera=camera, depth=depth)
    prepared("tartanair", tmp_path, tmp_path / "dst")
    folder = tmp_path / "dst" / "train" / "office_Easy_P000"
    assert worst_miss(folder, CENTRED) < 0.2 and worst_depth(folder, CENTRED) < 0.01
    with Image.open(folder / "depth" / "000000.png") as image:
        assert not np.asarray(image)[:4].any()  # the sky has none, and makes no step coarse


def test_wildrgbd_reads_row_wise_intrinsics_and_larger_cameras(tmp_path: Path) -> None:
    folder = published.write_wildrgbd(tmp_path, KNOWN)
    k = np.diag([2.0, 2.0, 1.0]) @ KNOWN.intrinsics
    metadata = {"w": 2 * KNOWN.size[0], "h": 2 * KNOWN.size[1], "K": k.ravel().tolist()}
    (folder / "metadata").write_text(json.dumps(metadata))
    prepared("wildrgbd", tmp_path, tmp_path / "dst")
    assert worst_miss(tmp_path / "dst" / "train" / "apple_scenes_000", KNOWN) < 0.2


@pytest.mark.parametrize(
    ("distortion", "resampled"),
    [
        ((1e-4, 0.0, 0.0, 0.0), False),
        ((0.09, -0.04, 2e-3, -1e-3), True),
        ((-0.12, 0.02, 0.0, 1e-3), True),
    ],
)
def test_dl3dv_distortion(
    distortion: tuple[float, float, float, float], resampled: bool, tmp_path: Path
) -> None:
    published.write_dl3dv(tmp_path, KNOWN, distortion=distortion)
    shift = largest_shift(KNOWN.intrinsics, KNOWN.size, distortion)
    assert (shift > IGNORED_PIXELS) == resampled
    report = prepared("dl3dv", tmp_path, tmp_path / "dst")
    assert report.written["0a1b2c"].undistorted == resampled
    assert worst_miss(tmp_path / "dst" / "train" / "0a1b2c", KNOWN) < 0.35


def test_dl3dv_left_distorted_would_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.write_dl3dv(tmp_path, KNOWN, distortion=(0.09, -0.04, 2e-3, -1e-3))
    monkeypatch.setattr("gen3r_training.formats.writer.IGNORED_PIXELS", 1e9)
    prepared("dl3dv", tmp_path, tmp_path / "dst")
    assert worst_miss(tmp_path / "dst" / "train" / "0a1b2c", KNOWN) > 0.5


def test_distortion_that_folds_is_refused(tmp_path: Path) -> None:
    published.write_dl3dv(tmp_path, KNOWN, distortion=(-3.0, 0.0, 0.0, 0.0))
    report = prepared("dl3dv", tmp_path, tmp_path / "dst")
    assert "folds the image" in report.skipped["0a1b2c"]
    assert distort(np.zeros((1, 2)), (1.0, 1.0, 1.0, 1.0)).tolist() == [[0.0, 0.0]]


def test_dl3dv_benchmark_folders(tmp_path: Path) -> None:
    """HASH/nerfstudio/transforms.json; COLMAP's copy of the frames beside it is no scene."""
    folder = published.write_dl3dv(tmp_path / "plain", KNOWN)
    (tmp_path / "src" / "abc" / "gaussian_splat" / "images_4").mkdir(parents=True)
    folder.rename(tmp_path / "src" / "abc" / "nerfstudio")
    report = prepared("dl3dv", tmp_path / "src", tmp_path / "dst")
    assert list(report.written) == ["abc"] and not report.skipped


@pytest.mark.parametrize("kind", ["whole video", "clip", "numbered images"])
def test_re10k_other_frames(kind: str, tmp_path: Path) -> None:
    frames = published.write_re10k(tmp_path, KNOWN)
    images = [KNOWN.image(frame) for frame in range(published.FRAMES)]
    if kind == "numbered images":
        for number, file in enumerate(sorted(frames.iterdir(), key=lambda f: int(f.stem))):
            file.rename(frames / f"frame_{number + 8}.png")
    else:
        for file in frames.iterdir():
            file.unlink()
        frames.rmdir()
        whole = kind == "whole video"
        name = "videos/ab-C_dEf012.mp4" if whole else "video_clips/0123456789abcdef.mp4"
        # The first timestamp is 0.96 s: frame 24 of a video of 25 frames a second.
        published.write_video(tmp_path / name, images, before=24 if whole else 0)
    report = prepared("re10k", tmp_path, tmp_path / "dst")
    assert not report.skipped
    assert worst_miss(tmp_path / "dst" / "train" / "0123456789abcdef", KNOWN) < 0.35


def test_re10k_a_video_that_ends_too_early(tmp_path: Path) -> None:
    frames = published.write_re10k(tmp_path, KNOWN)
    for file in frames.iterdir():
        file.unlink()
    frames.rmdir()
    images = [KNOWN.image(0)] * 3
    published.write_video(tmp_path / "videos" / "ab-C_dEf012.mp4", images)
    report = prepared("re10k", tmp_path, tmp_path / "dst")
    assert "has no frame at 0.960000 s" in report.skipped["0123456789abcdef"]
    (tmp_path / "videos" / "ab-C_dEf012.mp4").rename(tmp_path / "0123456789abcdef.mp4")
    report = prepared("re10k", tmp_path, tmp_path / "dst")
    assert "3 frames for 4 cameras" in report.skipped["0123456789abcdef"]
    (tmp_path / "0123456789abcdef.mp4").write_bytes(b"not a video")
    report = prepared("re10k", tmp_path, tmp_path / "dst")
    assert report.skipped["0123456789abcdef"].startswith("0123456789abcdef.mp4: ")
    assert not list((tmp_path / "dst").rglob("*"))


def test_names_of_the_data_sets() -> None:
    for name, text in (
        ("re10k", "RealEstate10K"),
        ("dl3dv", "DL3DV-10K"),
        ("co3d", "CO3DV2"),
        ("wildrgbd", "WildRGB-D"),
        ("tartanair", "TARTANAIR"),
        ("dl3dv", "DL3DV"),
    ):
        assert format_named(text).name == name
    with pytest.raises(ValueError, match=r"data set kitti is unknown; use one of re10k"):
        format_named("kitti")
