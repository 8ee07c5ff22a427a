"""Requests and cameras: every limit raises with the value, the limit and the mend."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from gen3r.scene import Cameras, SceneRequest, trajectory_name

IMAGE = np.zeros((56, 56, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "no images"),
        ({"task": "3view"}, "task '3view' is unknown"),
        ({"task": "2view"}, "2view takes 2 image"),
        ({"images": [IMAGE] * 2, "task": "allview"}, "at least 3 frames, 2 given"),
        ({"num_frames": 7}, "use 5 or 9"),
        ({"num_frames": 0}, "use 1 or 5"),
        ({"images": [IMAGE] * 2, "num_frames": 1}, "at least 5 frames"),
        ({"height": 100}, "height 100 is not a multiple of 56; use 112"),
        ({"width": -56}, "width -56"),
        ({"cameras": "zoom_inn"}, "did you mean 'zoom_in'"),
    ],
)
def test_limits(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneRequest(**{"images": [IMAGE], **changes})


def test_task_follows_from_the_images() -> None:
    assert [SceneRequest([IMAGE] * n).task for n in (1, 2, 49)] == ["1view", "2view", "allview"]


@pytest.mark.parametrize(("given", "used"), [(48, 45), (49, 49), (60, 49), (17, 17), (20, 17)])
def test_allview_uses_the_largest_4k_plus_1(given: int, used: int) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert SceneRequest([IMAGE] * given).num_frames == used
    assert [f"{used} will be made" in str(w.message) for w in said] == [True] * (given < 49)


def test_trajectory_names() -> None:
    assert trajectory_name("translate down") == "translate_down"
    assert trajectory_name(" Arc-Left ") == "arc_left"


def cameras(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.eye(4).repeat(frames, 1, 1), torch.eye(3).repeat(frames, 1, 1)


def test_cameras_are_checked() -> None:
    extrinsics, intrinsics = cameras(5)
    with pytest.raises(ValueError, match=r"extrinsics must be \[F, 4, 4\], got \[5, 3, 4\]"):
        Cameras(extrinsics[:, :3], intrinsics)
    with pytest.raises(ValueError, match="5 extrinsics and 4 intrinsics"):
        Cameras(extrinsics, intrinsics[:4])
    broken = extrinsics.clone()
    broken[3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="frame 3 hold NaN"):
        Cameras(broken, intrinsics)
    singular = extrinsics.clone()
    singular[2, 0] = 0
    with pytest.raises(ValueError, match="extrinsics of frame 2 have no inverse"):
        Cameras(singular, intrinsics)
    with pytest.raises(ValueError, match="5 cameras given, 9 frames asked"):
        SceneRequest([IMAGE], cameras=Cameras(extrinsics, intrinsics), num_frames=9)
