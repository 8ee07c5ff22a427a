"""Procedural clips on disk: packed shards, folders that training reads, the command; captions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gen3r_engine.cli import main
from gen3r_training.data import SampleOrder, open_dataset
from gen3r_training.procedural import (
    Clips,
    Part,
    load_clips,
    make_clips,
    save_clips,
    storage,
    swap_color,
)


@pytest.fixture(scope="module")
def clips() -> Clips:
    return make_clips(range(3), seed=1, split="train", frames=5, size=56, supersample=1)


def assert_same(one: Clips, other: Clips) -> None:
    for name, value in one.tensors().items():
        assert torch.equal(value, getattr(other, name)), name
    assert (one.captions, one.parts, one.moves) == (other.captions, other.parts, other.moves)


def assert_depth_of_folder(folder: Path, depth: Tensor, frame: int) -> None:
    scale = json.loads((folder / "depth" / "scale.json").read_text())["scale"]
    stored = np.asarray(Image.open(folder / "depth" / f"{frame:06d}.png")).astype(np.float64)
    np.testing.assert_allclose(scale * stored, depth.double().numpy(), atol=0.51 * scale)


def test_packed_round_trip(clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SHARD_BYTES", 6 * 5 * 56 * 56 * 2)  # two clips a shard
    save_clips(clips, tmp_path, "train")
    assert [path.name[-18:] for path in storage.shard_paths(tmp_path, "train")] == [
        "-00000.safetensors",
        "-00001.safetensors",
    ]
    assert_same(load_clips(tmp_path, "train"), clips)
    assert_same(load_clips(tmp_path, "train", limit=1), clips.take([0]))
    assert_same(Clips.cat([clips.take([0]), clips.take([1, 2])]), clips)
    # A shorter set leaves nothing of the longer one, and nothing unfinished stays.
    save_clips(clips.take([2]), tmp_path, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.safetensors"]
    assert_same(load_clips(tmp_path, "train"), clips.take([2]))


def test_wrong_shards(clips: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="prepare procedural"):
        load_clips(tmp_path, "held_out")
    monkeypatch.setattr(storage, "SHARD_BYTES", 1)  # a clip a shard
    save_clips(clips, tmp_path, "train")
    (tmp_path / "train-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks train-00001"):
        load_clips(tmp_path, "train")
    (tmp_path / "train-00000.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match="damaged"):
        load_clips(tmp_path, "train", limit=1)
    with pytest.raises(ValueError, match="limit 0"):
        load_clips(tmp_path, "train", limit=0)


def test_command_writes_shards_and_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", "procedural", str(tmp_path), "--scenes", "2", "--held_out", "1"]
    command += ["--seed", "1", "--frames", "5", "--size", "56", "--supersample", "1"]
    command += ["--device", "cpu"]
    assert main([*command, "--form", "both"]) == 0
    assert "3 clips rendered" in capsys.readouterr().out
    packed = load_clips(tmp_path, "train")
    fresh = make_clips([0, 1], seed=1, split="train", frames=5, size=56, supersample=1)
    assert_same(packed, fresh)
    dataset = open_dataset([tmp_path], "train", num_frames=5, resolution=56, max_stride=1)
    order = SampleOrder(dataset.counts, (), seed=0)
    found = set()
    for position in range(2):
        sample = dataset.fetch(order.ticket(position))
        number = int(sample.scene[-6:])
        found.add(number)
        rgb = packed.rgb[number].movedim(-1, 1).float() / 255
        torch.testing.assert_close(sample.frames, rgb, atol=1e-6, rtol=0)
        torch.testing.assert_close(sample.c2w, packed.c2w[number], atol=1e-5, rtol=0)
        intrinsics = packed.intrinsics[number].expand(5, 3, 3)
        torch.testing.assert_close(sample.intrinsics, intrinsics, atol=1e-3, rtol=0)
        assert sample.prompt.rstrip(".").lower() == packed.captions[number]
    assert found == {0, 1}
    assert_depth_of_folder(tmp_path / "train" / "train_seed1_5x56_000001", packed.depth[1, 3], 3)
    # A second run has nothing to do; another recipe does not replace these unasked.
    assert main([*command, "--form", "both"]) == 0
    assert "0 clips rendered" in capsys.readouterr().out
    command[4] = "1"
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert len(load_clips(tmp_path, "train")) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scenes", "0"], "at least one scene"),
        (["--scenes", "1", "--size", "4"], "size 4 is below 8"),
        (["--scenes", "1", "--device", "tpu"], "--device tpu"),
    ],
)
def test_wrong_flags(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "procedural", str(tmp_path / "data"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_swap_color() -> None:
    text = "a red brick room with an orange floor, a red sphere and two white marble columns"
    room, sphere = Part("room", "red", "wall"), Part("sphere", "red", "sphere")
    columns, floor = Part("columns", "white", "column"), Part("floor", "orange", "floor")
    assert swap_color(text, room, "orange").startswith("an orange brick room with an orange floor")
    assert "a red brick room" in swap_color(text, sphere, "blue")
    assert "a blue sphere" in swap_color(text, sphere, "blue")
    assert "two green marble columns" in swap_color(text, columns, "green")
    assert " a grey floor" in swap_color(text, floor, "grey")
    with pytest.raises(ValueError, match="color 'pink'"):
        swap_color(text, room, "pink")
    with pytest.raises(ValueError, match="names no blue sphere"):
        swap_color(text, Part("sphere", "blue", "sphere"), "red")


def test_every_part_of_a_clip_can_be_swapped(clips: Clips) -> None:
    for text, parts in zip(clips.captions, clips.parts, strict=True):
        for part in parts:
            swapped = swap_color(text, part, "black" if part.color != "black" else "white")
            assert swapped != text
