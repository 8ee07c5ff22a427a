"""Samples: frames, cameras that belong to them, captions, and scenes that cannot be used."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gen3r_training.data import SampleOrder, SceneDataset, Ticket, clean_prompt, open_dataset
from gen3r_training.data.captions import possible_prompts
from gen3r_training.data.dataset import choose_frames
from tests.training.plain_scenes import cameras, write_plain, write_root

SEED = 12345


def opened(root: Path, num_frames: int = 5, max_stride: int = 2, size: int = 56) -> SceneDataset:
    return open_dataset(
        [root], "train", num_frames=num_frames, resolution=size, max_stride=max_stride
    )


def levels(dataset: SceneDataset, seed: int = SEED, scene: int = 0) -> list[int]:
    """Which frames of a `write_plain` scene a sample shows, by their grey level."""
    frames = dataset.fetch(Ticket(0, scene, seed, 0)).frames
    assert torch.equal(frames, frames[:, :1, :1, :1].expand_as(frames))
    return [round((255 * float(v) - 5) / 10) for v in frames[:, 0, 0, 0]]


def test_frames_and_cameras_belong_together(tmp_path: Path) -> None:
    dataset = opened(write_root(tmp_path, 1, frames=20))
    strides = set()
    for seed in range(40):
        sample = dataset.fetch(Ticket(0, 0, seed, 7))
        chosen = levels(dataset, seed)
        (stride,) = {b - a for a, b in pairwise(chosen)}
        strides.add(stride)
        # Frame i stands at x = i, so relative positions are frames since the first.
        assert sample.c2w[:, 0, 3].tolist() == [i - chosen[0] for i in chosen]
        assert torch.equal(sample.c2w[0], torch.eye(4))
    assert strides == {1, 2}
    assert sample.frames.shape == (5, 3, 56, 56) and sample.frames.dtype == torch.float32
    assert sample.c2w.dtype == sample.intrinsics.dtype == torch.float32
    assert (sample.scene, sample.seed, sample.index) == (f"{tmp_path.name}/train/s0", 39, 7)
    assert sample.cached is None


@pytest.mark.parametrize("size", [(150, 210), (210, 150), (90, 90)])
def test_a_point_is_where_the_cameras_say(tmp_path: Path, size: tuple[int, int]) -> None:
    """A bright spot, drawn into every stored frame where its cameras see one point."""
    height, width = size
    rng = np.random.default_rng(0)
    point = np.array([0.1, -0.05, 4.0, 1.0])
    values = cameras(5, size)
    scene = tmp_path / "train" / "spot"
    (scene / "frames").mkdir(parents=True)
    v, u = np.mgrid[:height, :width] + 0.5
    for i, pose in enumerate(values["extrinsics"]):
        angle = rng.uniform(-0.1, 0.1)
        turn = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        values["extrinsics"][i] = np.array(pose)
        values["extrinsics"][i][:3, :3] = turn
        values["extrinsics"][i][0, 3] *= 0.1
        x, y, z = (np.array(values["intrinsics"][i]) @ (values["extrinsics"][i] @ point)[:3]).T
        spot = np.exp(-((u - x / z) ** 2 + (v - y / z) ** 2) / (2 * 3.0**2))
        Image.fromarray((255 * spot).astype(np.uint8)).save(scene / "frames" / f"{i}.png")
    first = values["extrinsics"][0]
    values["extrinsics"] = [pose.tolist() for pose in values["extrinsics"]]
    (scene / "cameras.json").write_text(json.dumps(values))

    sample = opened(tmp_path, max_stride=1, size=112).fetch(Ticket(0, 0, SEED, 0))
    in_first = torch.from_numpy(first @ point).float()
    grid = torch.arange(112) + 0.5
    for image, c2w, k in zip(sample.frames[:, 0], sample.c2w, sample.intrinsics, strict=True):
        seen = k @ (torch.linalg.inv(c2w) @ in_first)[:3]
        expected = seen[:2] / seen[2]
        found = torch.stack([image.sum(0) @ grid, image.sum(1) @ grid]) / image.sum()
        # Sizes are truncated in the intrinsics and rounded in the resize (`crop_intrinsics`):
        # half a pixel here, one at most.
        assert (found - expected).abs().max() < 0.6


def test_short_scenes_repeat_their_last_frame(tmp_path: Path) -> None:
    write_plain(tmp_path / "train" / "a", 3)
    write_plain(tmp_path / "train" / "b", 7)
    dataset = opened(tmp_path, max_stride=3)
    for seed in range(10):
        assert levels(dataset, seed) == [0, 1, 2, 2, 2]
        chosen = levels(dataset, seed, scene=1)
        assert [b - a for a, b in pairwise(chosen)] == [1] * 4
    assert choose_frames(1, 5, 2, 0) == [0] * 5


def test_unreadable_frames_are_left_out_and_told_once(tmp_path: Path) -> None:
    scene = write_root(tmp_path, 1) / "train" / "s0"
    (scene / "frames" / "001.png").write_bytes(b"no image")
    raw = bytearray((scene / "frames" / "003.png").read_bytes())
    raw[33:41] = bytes(8)  # a chunk without a name: PIL raises SyntaxError
    (scene / "frames" / "003.png").write_bytes(bytes(raw))
    dataset = opened(tmp_path)
    with pytest.warns(UserWarning, match=r"s0: 2 unreadable .*001.png, 003.png"):
        sample = dataset.fetch(Ticket(0, 0, SEED, 0))
    assert sample.c2w[:, 0, 3].tolist() == [0, 2, 4, 4, 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert levels(dataset) == [0, 2, 4, 4, 4]


def test_unusable_scenes_are_replaced(tmp_path: Path) -> None:
    write_root(tmp_path, 4)
    dataset, other = opened(tmp_path), opened(tmp_path)
    (tmp_path / "train" / "s1" / "cameras.json").write_text("{")
    for frame in (tmp_path / "train" / "s2" / "frames").iterdir():
        frame.write_bytes(b"")
    scenes = set()
    for seed in range(20):
        for scene, reason in ((1, "not JSON"), (2, "can be read")):
            sample, notices = dataset.fetch_noticed(Ticket(0, scene, seed, 0))
            assert notices[0].kind == "replaced" and notices[0].scene.endswith(f"s{scene}")
            assert reason in notices[0].reason and "takes its place" in str(notices[0])
            scenes.add(sample.scene.rsplit("/")[-1])
    again, same = other.fetch_noticed(Ticket(0, 2, 19, 0))  # whatever was read before
    assert again.scene == sample.scene and same == notices
    assert scenes == {"s0", "s3"}
    assert dataset.fetch_noticed(Ticket(0, 0, 0, 0))[1] == ()
    for scene in ("s0", "s3"):
        (tmp_path / "train" / scene / "cameras.json").unlink()
    with pytest.raises(ValueError, match="sample 9: none of 4 scenes can be used") as caught:
        dataset.fetch(Ticket(0, 0, SEED, 9))
    assert "\n" not in str(caught.value)


def test_what_nobody_foresaw_names_the_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(write_root(tmp_path, 1))
    monkeypatch.setattr("gen3r_training.data.dataset.read_clip", lambda *_: 1 // 0)
    with pytest.raises(RuntimeError, match=r"train/s0 \(sample 3\): ZeroDivisionError"):
        dataset.fetch(Ticket(0, 0, SEED, 3))


def test_captions(tmp_path: Path) -> None:
    lines = ["The image shows a red car.", "A chair."]
    write_plain(tmp_path / "train" / "a", prompt="\n".join(lines))
    write_plain(tmp_path / "train" / "b", prompt=None)
    dataset = opened(tmp_path)
    found = {dataset.fetch(Ticket(0, 0, seed, 0)).prompt for seed in range(60)}
    possible = {prompt for line in lines for prompt in possible_prompts(line)}
    assert found == possible == {lines[0], "A red car.", "It is a red car.", "A chair."}
    assert dataset.fetch(Ticket(0, 1, SEED, 0)).prompt == ""


@pytest.mark.parametrize("text", ["The image shows a red car.", " spaces ", "x" * 1001, ""])
def test_possible_prompts_are_all_of_them(text: str) -> None:
    rng = np.random.default_rng(0)
    assert {clean_prompt(text, rng.random) for _ in range(99)} == set(possible_prompts(text))


def test_several_data_sets(tmp_path: Path) -> None:
    roots = [write_root(tmp_path / "a", 2), write_root(tmp_path / "b", 3)]
    dataset = open_dataset(roots, "train", num_frames=1, resolution=56, max_stride=1)
    assert dataset.counts == (2, 3)
    order = SampleOrder(dataset.counts, (), 0)
    scenes = {dataset.fetch(order.ticket(g)).scene for g in range(5)}
    assert scenes == {f"a/train/s{i}" for i in range(2)} | {f"b/train/s{i}" for i in range(3)}
