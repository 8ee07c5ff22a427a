"""Synthetic scenes on disk in the training layout: a room of known geometry (`benchmarks.room`)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.room import room

PROMPT = "a small bedroom with a wooden floor, a green bed and a large window"


def write_scene(
    folder: Path,
    frames: int = 7,
    height: int = 56,
    width: int = 56,
    *,
    seed: int = 0,
    prompt: str | None = PROMPT,
    depth: bool = False,
) -> Path:
    """frames/00000.png ..., cameras.json, prompt.txt and, with `depth`, depth/*.png and scale.json.

    The depth is exact: no noise, no flying pixels. Returns `folder`.
    """
    scene = room(frames, height, width, seed=seed, noise=0.0, flying=0.0)
    names = [f"{index:05}.png" for index in range(frames)]
    (folder / "frames").mkdir(parents=True)
    for name, pixels in zip(names, scene.rgb.numpy(), strict=True):
        Image.fromarray(pixels).save(folder / "frames" / name)
    cameras = {
        "extrinsics": scene.extrinsics.tolist(),
        "intrinsics": scene.intrinsics.tolist(),
    }
    (folder / "cameras.json").write_text(json.dumps(cameras))
    if prompt is not None:
        (folder / "prompt.txt").write_text(prompt + "\n")
    if depth:
        (folder / "depth").mkdir()
        scale = float(scene.depth.max()) / 65535
        for name, plane in zip(names, scene.depth.numpy(), strict=True):
            steps = np.rint(plane / scale).astype(np.uint16)
            Image.fromarray(steps).save(folder / "depth" / name)
        (folder / "depth" / "scale.json").write_text(json.dumps({"scale": scale}))
    return folder


def write_data_root(
    root: Path, train: int = 1, val: int = 1, frames: int = 7, size: int = 56
) -> Path:
    """A data set of `train` and `val` scenes with seeds 0, 1, ...; returns `root`.

    The first validation scene is the first training scene.
    """
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            write_scene(root / split / f"scene_{index}", frames, size, size, seed=index)
    return root
