"""Golden fixture `dataset`: frames and cameras of a scene on disk, captions with scripted
randomness.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gen3r_training.data import (
    clean_prompt,
    frame_indices,
    list_images,
    load_clip,
    load_frames,
)
from tests.golden_fixtures.golden import COMPONENT_TOLERANCE, Golden, relative_error

KIND = "dataset"


@pytest.fixture
def scene(golden: Golden, tmp_path: Path) -> Path:
    """The fixture's scene written as a folder."""
    transforms = golden.meta["transforms"]
    (tmp_path / "transforms.json").write_text(json.dumps(transforms))
    (tmp_path / "images").mkdir()
    for pixels, frame in zip(golden["in/images_u8"], transforms["frames"], strict=True):
        Image.fromarray(pixels.numpy()).save(tmp_path / frame["file_path"])
    return tmp_path


def sampling_cases(golden: Golden) -> dict[str, Any]:
    """The cases of the metadata whose tensors are there."""
    return {n: o for n, o in golden.meta["cases"].items() if f"{n}/frames_0_255" in golden}


def test_every_sampling_case(golden: Golden, scene: Path) -> None:
    for case, options in sampling_cases(golden).items():
        limit = options["total_frames"]
        clip = load_clip(
            scene,
            count=options["max_num_frames"],
            size=options["size"][0],
            stride=options["interval"],
            start=options["fix_start_frame"],
            limit=limit if limit > 0 else None,
            repeat_last=options["repeat_last"],
        )
        assert list(clip.names) == options["frame_names"]
        golden.check(f"{case}/frames_0_255", clip.frames * 255)
        golden.check(f"{case}/c2ws", clip.c2w)
        golden.check(f"{case}/Ks", clip.intrinsics)


def test_folder_without_cameras(golden: Golden, scene: Path) -> None:
    for name in golden.cases(r"(dir_mode\w*/frames_0_255)"):
        reference = golden[name]
        # The file does not name this case's options: those of the case with as many frames.
        count = len(reference)
        options = next(o for o in golden.meta["cases"].values() if o["max_num_frames"] == count)
        names = list_images(scene / "images")
        start, stride = options["fix_start_frame"], options["interval"]
        chosen = frame_indices(len(names), count, stride, start)
        paths = [scene / "images" / names[i] for i in chosen]
        frames, unreadable = load_frames(paths, *reference.shape[-2:])
        assert not unreadable
        golden.check(name, frames)


def test_unreadable_frame_is_left_out(golden: Golden, scene: Path) -> None:
    for case in golden.cases(r"(broken_frame\d+)/"):
        reference = golden[f"{case}/frames_0_255"]
        broken = list_images(scene / "images")[int(re.findall(r"\d+", case)[0])]
        (scene / "images" / broken).write_bytes(b"not an image")
        clip = load_clip(scene, count=len(reference), size=reference.shape[-1], start=0)
        assert clip.unreadable == (broken,)
        assert len(clip.c2w) == len(clip.intrinsics) == len(clip.frames)
        golden.check(f"{case}/frames_0_255", clip.frames * 255)


def test_clean_prompt(golden: Golden) -> None:
    for row in golden.meta["clean_prompt"]:
        draws = iter(row["random_sequence"])
        prompt = row["prompt"]
        if repeated := re.fullmatch(r"(\w)\*(\d+)", prompt):
            prompt = repeated.group(1) * int(repeated.group(2))
        assert clean_prompt(prompt, lambda draws=draws: next(draws)) == row["out"]


def test_poses_that_are_not_relative_are_wrong(golden: Golden) -> None:
    poses = {
        f["file_path"].rsplit("/")[-1]: f["transform_matrix"]
        for f in golden.meta["transforms"]["frames"]
    }
    for case, options in sampling_cases(golden).items():
        raw = torch.tensor([poses[name] for name in options["frame_names"]])
        assert relative_error(raw, golden[f"{case}/c2ws"]) > 100 * COMPONENT_TOLERANCE
