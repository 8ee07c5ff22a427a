"""Images of every kind, control videos: what is taken, and what is refused with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gen3r.conditioning import control_video, given_frames, image_tensor, prepare_views

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(RGB).permute(2, 0, 1) / 255
GREY = torch.from_numpy(RGB[..., 0]).expand(3, -1, -1) / 255
CLEAR = np.dstack([RGB, np.full((6, 8), 0, np.uint8)])  # fully transparent: white
OPAQUE = np.dstack([RGB, np.full((6, 8), 255, np.uint8)])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (RGB, EXPECTED),
        (torch.from_numpy(RGB), EXPECTED),
        (EXPECTED, EXPECTED),
        (Image.fromarray(RGB), EXPECTED),
        (OPAQUE, EXPECTED),
        (CLEAR, torch.ones(3, 6, 8)),
        (Image.fromarray(CLEAR), torch.ones(3, 6, 8)),
        (RGB[..., 0], GREY),
        (RGB[..., :1], GREY),
        (Image.fromarray(RGB[..., 0]), GREY),
        (Image.fromarray(RGB[..., 0].astype(np.uint16) * 257), GREY),
    ],
)
def test_images(image: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(image_tensor(image), expected, rtol=0, atol=1 / 510)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (RGB.astype(np.float32), r"must be uint8 \[H, W\].* got float32 \(6, 8, 3\)"),
        (RGB[..., :2], r"got uint8 \(6, 8, 2\)"),
        (torch.rand(6, 8, 3), r"must be \[3, H, W\] in \[0, 1\], got \[6, 8, 3\]"),
    ],
)
def test_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_tensor(image)


def test_views_may_differ_in_size() -> None:
    views = prepare_views([RGB, np.zeros((90, 60, 3), np.uint8)], 56, 112)
    assert views.shape == (2, 3, 56, 112) and not views[1].any()


def test_control_video() -> None:
    views = torch.rand(2, 3, 4, 4) + 0.1
    video = control_video(views, "2view", 9)
    assert [bool(frame.any()) for frame in video.transpose(0, 1)] == [True, *[False] * 7, True]
    assert control_video(torch.rand(7, 3, 4, 4), "allview", 5).shape == (3, 5, 4, 4)
    with pytest.raises(ValueError, match="1view takes 1 views, 2 given"):
        control_video(views, "1view", 9)
    with pytest.raises(ValueError, match="allview takes 5 views, 2 given"):
        control_video(views, "allview", 5)
    with pytest.raises(ValueError, match="task 'video' is unknown"):
        given_frames("video", 5)
