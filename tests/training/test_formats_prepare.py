"""``gen3r-engine prepare``: which scenes, splits, captions, links; wrong input; latents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gen3r_engine.cli import main
from gen3r_engine.cli.prepare import NAMES
from gen3r_training.data import CacheReport, LatentCacheConfig
from gen3r_training.formats import FORMATS, PrepareOptions, prepare_scenes, read_captions
from tests.training import published
from tests.training.published import known_scene, worst_miss

KNOWN = known_scene()


@pytest.fixture
def wild(tmp_path: Path) -> Path:
    """A WildRGB-D folder with one good scene."""
    published.write_wildrgbd(tmp_path / "src", KNOWN)
    return tmp_path / "src"


def scenes_in(folder: Path) -> list[str]:
    """Everything in the folder, hidden entries too."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def _copies(wild: Path, count: int) -> None:
    scenes = wild / "apple" / "scenes"
    for number in range(1, count):
        shutil.copytree(scenes / "scenes_000", scenes / f"scenes_{number:03d}")


def test_published_split_and_share(wild: Path, tmp_path: Path) -> None:
    _copies(wild, 4)
    lists = {"train": ["scenes/scenes_000", "scenes/scenes_001"], "val": ["scenes/scenes_002"]}
    (wild / "apple" / "nvs_list.json").write_text(json.dumps(lists))
    find = FORMATS["wildrgbd"].find

    def written(**options: Any) -> list[str]:
        report = prepare_scenes(find(wild), PrepareOptions(tmp_path / "dst", workers=2, **options))
        names = sorted(name[-3:] for name in report.written)
        shutil.rmtree(tmp_path / "dst")
        return names

    assert written() == ["000", "001", "003"]  # 003 is in no list
    assert written(split="val") == ["002", "003"]
    prepare_scenes(find(wild), PrepareOptions(tmp_path / "dst", val_share=0.5))
    val, train = (scenes_in(tmp_path / "dst" / split) for split in ("val", "train"))
    assert len(val) + len(train) == 4 and "apple_scenes_002" in val and train
    # The same scene is never in both splits, whatever the share is next time.
    again = prepare_scenes(find(wild), PrepareOptions(tmp_path / "dst", val_share=1.0))
    assert set(again.skipped) == set(train) and sorted(again.existing) == val
    assert written(val_share=0.0) == []


def test_max_scenes_counts_good_ones_and_a_second_run_goes_on(wild: Path, tmp_path: Path) -> None:
    _copies(wild, 4)
    poses = wild / "apple" / "scenes" / "scenes_001" / "cam_poses.txt"
    np.savetxt(poses, 1.5 * np.loadtxt(poses))  # no rotations
    command = ["prepare", "wildrgbd", str(wild), str(tmp_path / "dst"), "--workers", "2"]
    assert main([*command, "--max_scenes", "2"]) == 0
    train = tmp_path / "dst" / "train"
    assert scenes_in(train) == ["apple_scenes_000", "apple_scenes_002"]
    before = (train / "apple_scenes_000" / "cameras.json").stat().st_mtime_ns
    assert main(command) == 0
    assert scenes_in(train)[1:] == ["apple_scenes_002", "apple_scenes_003"]
    assert (train / "apple_scenes_000" / "cameras.json").stat().st_mtime_ns == before
    assert main([*command, "--overwrite"]) == 0  # nothing but the scenes is left
    assert len(scenes_in(train)) == 3
    assert (train / "apple_scenes_000" / "cameras.json").stat().st_mtime_ns > before


@pytest.mark.parametrize("kind", ["json", "json list", "csv", "folder"])
def test_captions(
    kind: str, wild: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _copies(wild, 2)
    path = tmp_path / ("c" if kind == "folder" else f"c.{kind.split()[0]}")
    if kind == "json":
        path.write_text(json.dumps({"apple_scenes_000": ["a red\napple", " ", "fruit"]}))
    elif kind == "json list":
        rows = [{"scene": "apple/scenes_000", "prompt": p} for p in ("a red apple", "fruit")]
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        path.write_text('scene,prompt\nscenes_000,"a red\napple"\nscenes_000,fruit\n')
    else:
        path.mkdir()
        (path / "scenes_000.txt").write_text("a red apple\n\nfruit\n")
    command = ["prepare", "wildrgbd", str(wild), str(tmp_path / "dst"), "--captions", str(path)]
    assert main(command) == 0
    train = tmp_path / "dst" / "train"
    assert (train / "apple_scenes_000" / "prompt.txt").read_text() == "a red apple\nfruit\n"
    assert not (train / "apple_scenes_001" / "prompt.txt").exists()
    assert "1 of 2 scenes have no caption" in capsys.readouterr().err


def test_captions_of_another_form(tmp_path: Path) -> None:
    for name, text, reason in (
        ("a.json", "[1]", "must hold"),
        ("b.json", "{", "is not JSON"),
        ("c.json", '{"s": 3}', "neither a text nor a list"),
        ("d.json", "{}", "holds no caption"),
        ("e.csv", "one,two\n1,2\n", "row 1 has no scene and prompt"),
        ("f.xml", "", "neither a .json or .csv file nor a folder"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_captions(tmp_path / name)


@pytest.mark.parametrize("link", ["symlink", "hardlink"])
def test_links(link: str, wild: Path, tmp_path: Path) -> None:
    command = ["prepare", "wildrgbd", str(wild), str(tmp_path / "dst"), "--link", link]
    assert main(command) == 0
    folder = tmp_path / "dst" / "train" / "apple_scenes_000"
    source = wild / "apple" / "scenes" / "scenes_000" / "rgb" / "00001.png"
    frame = folder / "frames" / "000001.png"
    assert frame.samefile(source) and frame.is_symlink() == (link == "symlink")
    assert worst_miss(folder, KNOWN) < 0.2


def test_undistorted_frames_are_not_linked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.write_dl3dv(tmp_path / "src", KNOWN, distortion=(0.09, -0.04, 0.0, 0.0))
    command = ["prepare", "dl3dv", str(tmp_path / "src"), str(tmp_path / "dst")]
    assert main([*command, "--link", "symlink"]) == 0
    frame = tmp_path / "dst" / "train" / "0a1b2c" / "frames" / "000000.png"
    assert frame.is_file() and not frame.is_symlink()
    shown = capsys.readouterr().err
    assert "the frames of 1 scenes could not be linked" in shown
    assert "1 scenes were undistorted" in shown


def test_wrong_input_is_one_line_and_exit_code_2(
    wild: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(wild), str(tmp_path / "dst")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for arguments, reason in (
        (["kitti", source, out], "invalid choice: 'kitti'"),
        (["re10k", source], "the following arguments are required: DST"),
        (["re10k", str(tmp_path / "none"), out], "is no folder"),
        (["wildrgbd", source, source], "is inside SRC"),
        (["wildrgbd", source, f"{source}/deep/er"], "is inside SRC"),
        (["wildrgbd", f"{out}/train/x", out], "is no folder"),
        (["wildrgbd", source, str(tmp_path / "file")], "it is a file, not a folder"),
        (["wildrgbd", str(tmp_path / "empty"), out], "holds no scene of WildRGB-D; expected"),
        (["wildrgbd", source, out, "--size", "0"], "size 0 is below 1"),
        (["wildrgbd", source, out, "--workers", "0"], "workers 0 is below 1"),
        (["wildrgbd", source, out, "--max_scenes", "0"], "max_scenes 0 is below 1"),
        (["wildrgbd", source, out, "--val_share", "2"], "val_share 2.0 is outside 0 to 1"),
        (["wildrgbd", source, out, "--val_share", "0.1", "--split", "val"], "leave --split out"),
        (["wildrgbd", source, out, "--size", "9", "--link", "symlink"], "use one of the two"),
        (["wildrgbd", source, out, "--captions", "none.json"], "--captions: "),
        (["wildrgbd", source, out, "--min_quality", "1"], "unrecognized arguments"),
        (["latents", "--data_root", out], "required: --pretrained_path, --cache_dir"),
    ):
        assert main(["prepare", *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and reason in line, line
    assert not (tmp_path / "dst").exists()


def test_names_agree_with_the_formats() -> None:
    """The command line keeps its own table, so that --help does not import torch."""
    assert {name: known.title for name, known in FORMATS.items()} == NAMES


def test_latents_reach_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[LatentCacheConfig] = []

    def encode(config: LatentCacheConfig, progress: Callable[[str, int, int], None]) -> CacheReport:
        asked.append(config)
        progress("encode clips", 1, 1)
        if config.clips_per_scene == 9:
            raise ValueError("--data_root has no folder 'train'")
        return CacheReport(encoded=0, reused=3 if len(asked) == 1 else 0, skipped={"s": "damaged"})

    monkeypatch.setattr("gen3r_training.data.encode_dataset.encode_dataset", encode)
    command = ["prepare", "latents", "--data_root", "a", "b", "--pretrained_path", "P"]
    command += ["--cache_dir", str(tmp_path), "--num_frames", "5", "--resolution", "112"]
    assert main([*command, "--tokens", "--device", "cpu", "--geo_adapter", "g"]) == 0
    (config,) = asked
    assert config == LatentCacheConfig(
        data_root=(Path("a"), Path("b")),
        pretrained_path="P",
        cache_dir=tmp_path,
        **{"num_frames": 5, "resolution": 112, "tokens": True, "device": "cpu"},  # type: ignore[arg-type]
        geo_adapter=Path("g"),
    )
    shown = capsys.readouterr().out
    assert "skipped s: damaged" in shown and "3 clips there already, 1 scenes skipped" in shown
    assert main(command) == 1
    assert main([*command, "--num_frames", "6"]) == 2
    assert main([*command, "--clips_per_scene", "9"]) == 2
    assert "error: --data_root has no folder 'train'" in capsys.readouterr().err
