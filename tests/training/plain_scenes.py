"""Scenes of the layout as small as they come: flat frames, a camera that moves along x."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def cameras(frames: int, size: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    """Contents of cameras.json: frame i stands at x = i."""
    height, width = size
    poses = np.tile(np.eye(4), (frames, 1, 1))
    poses[:, 0, 3] = -np.arange(frames)
    k = [[float(width), 0, width / 2], [0, float(width), height / 2], [0, 0, 1]]
    return {"extrinsics": poses.tolist(), "intrinsics": [k] * frames}


def write_plain(
    folder: Path, frames: int = 5, size: tuple[int, int] = (8, 8), prompt: str | None = "A chair."
) -> Path:
    """Frame i has the grey level 10 i + 5. Returns `folder`."""
    (folder / "frames").mkdir(parents=True)
    for i in range(frames):
        Image.new("L", size[::-1], 10 * i + 5).save(folder / "frames" / f"{i:03}.png")
    (folder / "cameras.json").write_text(json.dumps(cameras(frames, size)))
    if prompt is not None:
        (folder / "prompt.txt").write_text(prompt)
    return folder


def write_root(root: Path, scenes: int, frames: int = 5, split: str = "train") -> Path:
    """ROOT/SPLIT/s0, s1, ...; returns `root`."""
    for i in range(scenes):
        write_plain(root / split / f"s{i}", frames)
    return root
