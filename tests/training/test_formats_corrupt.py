"""``gen3r-engine prepare`` on corrupt scenes, Ctrl-C and a full disk: counted, no half scenes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen3r_engine.cli import main
from gen3r_training.formats import FORMATS, PrepareOptions, Scene, SceneEntry, prepare_scenes
from gen3r_training.formats.scene import Frame
from tests.training import published
from tests.training.published import known_scene

KNOWN = known_scene()
CENTRED = known_scene(centred=True)


@pytest.fixture
def wild(tmp_path: Path) -> Path:
    """A WildRGB-D folder with one good scene."""
    published.write_wildrgbd(tmp_path / "src", KNOWN)
    return tmp_path / "src"


def scenes_in(folder: Path) -> list[str]:
    """Everything in the folder, hidden entries too."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def _without_frame(folder: Path) -> None:
    (folder / "rgb" / "00001.png").unlink()


def _too_many(folder: Path) -> None:
    shutil.copy(folder / "rgb" / "00001.png", folder / "rgb" / "00004.png")


def _no_image(folder: Path) -> None:
    (folder / "rgb" / "00001.png").write_bytes(b"0" * 400)


def _empty_poses(folder: Path) -> None:
    (folder / "cam_poses.txt").write_text("\n")


def _truncated(folder: Path) -> None:
    file = folder / "rgb" / "00002.png"
    file.write_bytes(file.read_bytes()[:400])


def _not_a_number(folder: Path) -> None:
    file = folder / "cam_poses.txt"
    lines = file.read_text().splitlines()
    lines[1] = " ".join(["1", *["nan"] * 16])
    file.write_text("\n".join(lines))


def _no_rotation(folder: Path) -> None:
    rows = np.loadtxt(folder / "cam_poses.txt")
    rows[3, 1:13] *= 1.5
    np.savetxt(folder / "cam_poses.txt", rows)


def _mirrored(folder: Path) -> None:
    rows = np.loadtxt(folder / "cam_poses.txt")
    rows[:, [1, 5, 9]] *= -1
    np.savetxt(folder / "cam_poses.txt", rows)


def _other_size(folder: Path) -> None:
    Image.new("RGB", (50, 38)).save(folder / "rgb" / "00001.png")


def _no_poses(folder: Path) -> None:
    (folder / "cam_poses.txt").unlink()


def _not_json(folder: Path) -> None:
    (folder / "metadata").write_text("{")


def _no_depth(folder: Path) -> None:
    (folder / "depth" / "00003.png").unlink()


def _negative_focal(folder: Path) -> None:
    k = np.diag([-1.0, 1.0, 1.0]) @ KNOWN.intrinsics
    metadata = {"w": KNOWN.size[0], "h": KNOWN.size[1], "K": k.T.ravel().tolist()}
    (folder / "metadata").write_text(json.dumps(metadata))


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (_without_frame, "3 images for 4 poses: frame 1 has only one of the two"),
    (_too_many, "5 images for 4 poses: frame 4 has only one of the two"),
    (_no_image, "00001.png: no image, or a damaged one"),
    (_empty_poses, "cam_poses.txt: no line with a camera"),
    (_truncated, "00002.png: "),
    (_not_a_number, "the pose of frame 1 is not finite (1 such frames)"),
    (_no_rotation, "the pose of frame 3 is no rotation"),
    (_mirrored, "the pose of frame 0 is no rotation"),
    (_other_size, "frame 1 has (50, 38) pixels, the first has (200, 152)"),
    (_no_poses, "no cameras: cam_poses.txt is missing"),
    (_not_json, "metadata: "),
    (_no_depth, "1 depth maps are missing, first 00003"),
    (_negative_focal, "the focal length -172 x 184 of frame 0 is not above 0"),
]


def test_corrupt_scenes_are_told_and_counted(
    wild: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line each, the rest is written, and nothing of a corrupt scene is left."""
    scenes = wild / "apple" / "scenes"
    for number, (damage, _) in enumerate(DAMAGE, 1):
        shutil.copytree(scenes / "scenes_000", scenes / f"scenes_{number:03d}")
        damage(scenes / f"scenes_{number:03d}")
    assert main(["prepare", "wildrgbd", str(wild), str(tmp_path / "dst"), "--workers", "2"]) == 0
    lines = sorted(x for x in capsys.readouterr().out.splitlines() if x.startswith("skipped"))
    assert len(lines) == len(DAMAGE)
    for line, (number, (_, reason)) in zip(lines, enumerate(DAMAGE, 1), strict=True):
        assert line.startswith(f"skipped apple_scenes_{number:03d}: {reason}"), line
    assert scenes_in(tmp_path / "dst" / "train") == ["apple_scenes_000"]


def test_none_left_is_exit_code_1(
    wild: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _no_rotation(wild / "apple" / "scenes" / "scenes_000")
    assert main(["prepare", "WildRGB-D", str(wild), str(tmp_path / "dst")]) == 1
    assert "0 scenes written (0 frames), 0 there already, 1 skipped" in capsys.readouterr().out
    assert not (tmp_path / "dst").exists()


def test_corrupt_scenes_of_the_other_formats(tmp_path: Path) -> None:
    published.write_re10k(tmp_path / "re10k", KNOWN, "1" * 16)
    file = tmp_path / "re10k" / "RealEstate10K" / "train" / ("1" * 16 + ".txt")
    text = file.read_text()
    (tmp_path / "re10k" / "frames" / "train" / ("1" * 16) / "1000000.png").unlink()
    folder = published.write_dl3dv(tmp_path / "dl3dv", KNOWN)
    (folder / "images_4" / "frame_00003.png").unlink()
    tartan = published.write_tartanair(tmp_path / "tartanair", CENTRED)
    (tartan / "pose_left.txt").write_text("1 2 3 0 0 0 1\n")
    co3d = published.write_co3d(
        tmp_path / "co3d", KNOWN, {"1_1_1": {}, "2_2_2": {}}, "ndc_isotropic"
    )
    (co3d / "1_1_1" / "images" / "frame000001.jpg").unlink()
    (co3d / "sequence_annotations.jgz").rename(co3d / "kept")
    reasons = {
        "re10k": "1 of 4 frames are missing, first 1000000",
        "dl3dv": "1 of 4 frames are missing in images_4, first frame_00003",
        "tartanair": "4 images for 1 poses",
        "co3d": "sequence_annotations.jgz: No such file or directory",
    }
    for name, reason in reasons.items():
        options = PrepareOptions(tmp_path / "dst", workers=1)
        report = prepare_scenes(FORMATS[name].find(tmp_path / name), options)
        assert list(report.skipped.values()) == [reason] and not report.written
    (co3d / "kept").rename(co3d / "sequence_annotations.jgz")
    report = prepare_scenes(
        FORMATS["co3d"].find(tmp_path / "co3d"), PrepareOptions(tmp_path / "dst")
    )
    missing = "1 of 4 frames are missing, first frame000001.jpg"
    assert report.skipped == {"apple_1_1_1": missing} and list(report.written) == ["apple_2_2_2"]
    lines = text.splitlines()
    for damaged, reason in (
        ("\n".join([lines[0], lines[2], lines[1]]), "the timestamps do not ascend"),
        ("\n".join([*lines[:2], lines[2][:-9] + "x"]), "could not convert string to float"),
        ("\n".join([*lines[:2], "1 2 3"]), "row 2 has 3 columns, not 19"),
        (lines[0], "no line with a camera"),
    ):
        file.write_text(damaged)
        report = prepare_scenes(
            FORMATS["re10k"].find(tmp_path / "re10k"), PrepareOptions(tmp_path / "r")
        )
        assert reason in report.skipped["1" * 16]


def test_what_was_not_downloaded_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Annotations of whole data sets come with parts of their frames: one line for all."""
    category = published.write_co3d(
        tmp_path / "src", KNOWN, {"1_1_1": {}, "2_2_2": {}, "3_3_3": {}}, "ndc_isotropic"
    )
    shutil.rmtree(category / "2_2_2")
    shutil.rmtree(category / "3_3_3")
    assert main(["prepare", "co3d", str(tmp_path / "src"), str(tmp_path / "dst")]) == 0
    shown = capsys.readouterr()
    assert "2 scenes are listed and not there, the first apple_2_2_2" in shown.err
    assert "0 skipped as corrupt, 2 absent" in shown.out


# --------------------------------------------------------------------- interruption, full disk


class _Frames:
    """Frames that call something when the third is read."""

    def __init__(self, third: Callable[[], None]) -> None:
        self.third = third

    def __len__(self) -> int:
        return 4

    def size(self) -> tuple[int, int]:
        return (8, 6)

    def __iter__(self) -> Iterator[Frame]:
        for number in range(4):
            if number == 2:
                self.third()
            yield Frame(Image.new("RGB", self.size()))


def _scene(third: Callable[[], None]) -> Scene:
    k = np.array([[8.0, 0.0, 4.0], [0.0, 8.0, 3.0], [0.0, 0.0, 1.0]])
    return Scene(_Frames(third), np.tile(np.eye(4), (4, 1, 1)), np.tile(k, (4, 1, 1)))


def _nothing() -> None:
    pass


def test_ctrl_c_leaves_no_half_scene(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    entries = [SceneEntry("first", lambda: _scene(_nothing))]
    entries += [SceneEntry(f"s{n}", lambda: _scene(interrupt)) for n in range(3)]
    with pytest.raises(KeyboardInterrupt):
        prepare_scenes(entries, PrepareOptions(tmp_path / "dst", workers=1))
    assert scenes_in(tmp_path / "dst" / "train") == ["first"]


def test_a_full_disk_ends_the_command_and_keeps_what_is_whole(
    wild: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes = wild / "apple" / "scenes"
    shutil.copytree(scenes / "scenes_000", scenes / "scenes_001")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "scenes_001" in str(path) and path.name == "000002.png":
            raise OSError(28, os.strerror(28), str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    command = ["prepare", "wildrgbd", str(wild), str(tmp_path / "dst"), "--workers", "1"]
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: DST can not be written") and "No space left" in line
    assert scenes_in(tmp_path / "dst" / "train") == ["apple_scenes_000"]


def test_overwriting_keeps_the_old_scene_when_it_fails(tmp_path: Path) -> None:
    def damaged() -> None:
        raise OSError(5, "Input/output error")

    options = PrepareOptions(tmp_path / "dst", workers=1, overwrite=True)
    prepare_scenes([SceneEntry("s", lambda: _scene(_nothing))], options)
    with pytest.raises(OSError, match="Input/output"):
        prepare_scenes([SceneEntry("s", lambda: _scene(damaged))], options)
    assert scenes_in(tmp_path / "dst" / "train") == ["s"]
    assert len(scenes_in(tmp_path / "dst" / "train" / "s" / "frames")) == 4
