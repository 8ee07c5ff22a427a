"""Scene reading: choice of frames, captions, errors."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from gen3r_training.data import clean_prompt, frame_indices, list_images, load_clip, read_transforms


def test_random_start_fits_and_follows_the_generator() -> None:
    starts = set()
    for seed in range(50):
        chosen = frame_indices(20, 5, stride=3, rng=random.Random(seed))
        assert chosen == frame_indices(20, 5, stride=3, rng=random.Random(seed))
        assert chosen[-1] < 20 and [b - a for a, b in pairwise(chosen)] == [3] * 4
        starts.add(chosen[0])
    assert starts == set(range(8))


def test_short_scenes() -> None:
    assert frame_indices(5, 5, stride=2) == [0, 1, 2, 3, 4]
    assert frame_indices(3, 5, start=1) == [1, 2, 2, 2, 2]
    assert frame_indices(3, 5, start=0, repeat_last=False) == [0, 1, 2]
    assert frame_indices(11, 6, stride=2, start=0) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("bad", [{"total": 0}, {"count": 0}, {"stride": 0}, {"start": 9}])
def test_frame_numbers_outside_their_limits(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        frame_indices(**({"total": 9, "count": 4, "stride": 1} | bad))


def test_caption_without_article_keeps_its_opening() -> None:
    text = "The image shows two dogs.\n"
    assert clean_prompt(text, lambda: 0.5) == text.strip()
    assert clean_prompt(text, lambda: 0.0) == text


def frame(**changes: object) -> dict[str, object]:
    eye = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    values = {"w": 4, "h": 4, "fl_x": 4.0, "fl_y": 4.0, "cx": 2.0, "cy": 2.0}
    return values | {"file_path": "images/a.png", "transform_matrix": eye} | changes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "every frame needs"),
        ("[]", "every frame needs"),
        (json.dumps({"frames": []}), "lists no frames"),
        (json.dumps({"frames": [{"w": 4}]}), "every frame needs"),
        (json.dumps({"frames": [frame(transform_matrix=[[1.0]])]}), "not 4 x 4"),
        (json.dumps({"frames": [frame(fl_x="far")]}), "far"),
    ],
)
def test_bad_transforms(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "transforms.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_transforms(path)


def test_no_readable_image(tmp_path: Path) -> None:
    (tmp_path / "transforms.json").write_text(json.dumps({"frames": [frame()]}))
    with pytest.raises(ValueError, match="can be read"):
        load_clip(tmp_path, 1, 28)
    with pytest.raises(ValueError, match="no images"):
        list_images(tmp_path)
