"""The layout on disk: what is read, and what is refused with which line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gen3r_training.data import open_dataset, read_scene, roots_with
from tests.training.plain_scenes import cameras, write_plain, write_root

CLIP = {"num_frames": 5, "resolution": 56, "max_stride": 2}


def test_a_scene_as_it_is_written(tmp_path: Path) -> None:
    scene = read_scene(write_plain(tmp_path, 3, prompt="A chair.\n\n Two chairs. \n"))
    assert scene.frames == ("000.png", "001.png", "002.png")
    assert scene.captions == ("A chair.", " Two chairs. ")
    assert scene.depth is None
    assert torch.equal(scene.extrinsics[:, 0, 3], -torch.arange(3, dtype=torch.float64))
    assert scene.intrinsics.dtype == torch.float64
    assert scene.frame_paths([1]) == [tmp_path / "frames" / "001.png"]


def test_short_forms_and_other_keys(tmp_path: Path) -> None:
    write_plain(tmp_path, 3, prompt=None)
    (tmp_path / "depth").mkdir()
    whole = cameras(3)
    short = {
        "extrinsics": [pose[:3] for pose in whole["extrinsics"]],
        "intrinsics": whole["intrinsics"][0],
        "frames": ["000.png", "001.png", "002.png"],
        "source": "elsewhere",
    }
    (tmp_path / "cameras.json").write_text(json.dumps(short))
    scene = read_scene(tmp_path)
    assert torch.equal(scene.extrinsics, torch.tensor(whole["extrinsics"], dtype=torch.float64))
    assert scene.intrinsics.shape == (3, 3, 3)
    assert scene.captions == () and scene.depth == tmp_path / "depth"


def changed(**values: Any) -> str:
    return json.dumps(cameras(3) | values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "object"),
        ("{}", "lacks 'extrinsics'"),
        (changed(extrinsics=cameras(2)["extrinsics"]), "3 frames but 2 extrinsics"),
        (changed(intrinsics=cameras(4)["intrinsics"]), "3 frames but 4 intrinsics"),
        (changed(extrinsics=[[1, 2]] * 3), "give F x 4 x 4"),
        (changed(extrinsics=[[1], [1, 2]]), "no array of numbers"),
        (changed(extrinsics="far"), "no array of numbers"),
        (changed(extrinsics=[[[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]]] * 3), "no rigid motion"),
        (changed(extrinsics=[[[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, 0]]] * 3), "no rigid"),
        (changed(intrinsics=[[[0.0] * 3] * 3] * 3), "focal lengths"),
        (changed(intrinsics=[[float("nan")] * 3] * 3), "not finite"),
        (changed(intrinsics=[1.0]), "give F x 3 x 3"),
        (changed(frames=["000.png", "001.png", "009.png"]), "009.png"),
        (changed(frames=["000.png"]), "their number"),
        (changed(frames=3), "no list"),
    ],
)
def test_bad_cameras(tmp_path: Path, text: str, message: str) -> None:
    write_plain(tmp_path, 3)
    (tmp_path / "cameras.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_scene(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        read_scene(tmp_path)
    (tmp_path / "frames").mkdir()
    with pytest.raises(ValueError, match="no images"):
        read_scene(tmp_path)
    write_plain(tmp_path / "other", 1)
    (tmp_path / "other" / "cameras.json").unlink()
    with pytest.raises(ValueError, match="no cameras"):
        read_scene(tmp_path / "other")


def refusal(roots: list[Path], split: str = "train", **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        open_dataset(roots, split, **(CLIP | options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_roots(tmp_path: Path) -> None:
    assert "at least one folder" in refusal([])
    assert "no such folder" in refusal([tmp_path / "nowhere"])
    assert "no folder 'train'" in refusal([tmp_path])
    (tmp_path / "train" / ".unfinished").mkdir(parents=True)
    assert "holds no scenes" in refusal([tmp_path])
    write_root(tmp_path, 1)
    assert f"its parent {tmp_path}" in refusal([tmp_path / "train"])
    assert "no folder 'val'" in refusal([tmp_path], "val")
    assert "'test' is unknown" in refusal([tmp_path], "test")
    assert roots_with([tmp_path, tmp_path / "train"], "train") == (tmp_path,)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("resolution", 100, "--resolution 100 is not a multiple of 56; use 112"),
        ("resolution", 0, "use 56"),
        ("num_frames", 48, "--num_frames 48: clips have 4k + 1 frames; use 45 or 49"),
        ("num_frames", 0, "use 1 or 5"),
        ("max_stride", 0, "--max_stride 0 must be at least 1"),
    ],
)
def test_bad_numbers_come_before_the_data(option: str, value: int, message: str) -> None:
    assert message in refusal([Path("nowhere")], **{option: value})


def test_a_bad_scene_is_an_error_or_counted(tmp_path: Path) -> None:
    write_root(tmp_path, 3)
    (tmp_path / "train" / "s0" / "frames" / "000.png").unlink()
    (tmp_path / "train" / "s2" / "cameras.json").unlink()
    message = refusal([tmp_path])
    assert "4 frames but 5 extrinsics" in message and "1 more bad" in message
    assert "--skip_bad_scenes" in message
    dataset = open_dataset([tmp_path], "train", skip_bad_scenes=True, **CLIP)
    assert dataset.counts == (1,)
    root = tmp_path.name
    assert set(dataset.skipped) == {f"{root}/train/s0", f"{root}/train/s2"}
    assert "no cameras.json" in dataset.skipped[f"{root}/train/s2"]
    (tmp_path / "train" / "s1" / "cameras.json").unlink()
    message = refusal([tmp_path], skip_bad_scenes=True)
    assert "none of the 3 scenes" in message and "4 frames but 5" in message
