"""Renders the example inputs: held-out scenes of gen3r_training.procedural.

    python examples/render.py       # rewrites the files beside this script (about half a minute)

The embedded model is trained on scenes of this kind, never on these: the split "held_out" shares
no random number with "train". Cameras are in the unit that the model is trained in: the mean
distance of the first view's points is 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from gen3r.writers import save_video, write_cameras
from gen3r_training.procedural import Clips, make_clips

SEED = 1
SCENES = {"1view": 53, "2view": 8, "allview": 46}  # clip numbers, chosen by eye
PHOTO, VIDEO = 448, 224  # pixels
FRAMES = 17
CAMERA_SIZE = 112  # cameras.json is in pixels of this square


def scene(task: str, size: int, frames: int, move: str) -> Clips:
    """The clip of one task, `frames` pictures along a camera move."""
    return make_clips(
        [SCENES[task]], seed=SEED, split="held_out", frames=frames, size=size, move=move
    )


def save_photo(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W, 3] as JPEG."""
    Image.fromarray(pixels).save(path, quality=88)


def save_cameras(clip: Clips, size: int, path: Path) -> None:
    """Write the clip's cameras, which are in pixels of `size`, in those of CAMERA_SIZE."""
    extrinsics = np.linalg.inv(clip.c2w[0].double().numpy())
    intrinsics = clip.intrinsics[0].double().numpy()
    intrinsics[:2] *= CAMERA_SIZE / size
    every = np.repeat(intrinsics[None], len(extrinsics), axis=0)
    write_cameras(path, extrinsics.round(6), every.round(4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    out: Path = parser.parse_args().out
    one = scene("1view", PHOTO, 1, "free")
    two = scene("2view", PHOTO, FRAMES, "random")
    every = scene("allview", VIDEO, FRAMES, "random")
    for task, clip in (("1view", one), ("2view", two), ("allview", every)):
        (out / task).mkdir(parents=True, exist_ok=True)
        (out / task / "prompts.txt").write_text(clip.captions[0] + "\n", encoding="utf-8")
    save_photo(one.rgb[0, 0].numpy(), out / "1view" / "photo.jpg")
    save_photo(two.rgb[0, 0].numpy(), out / "2view" / "first.jpg")
    save_photo(two.rgb[0, -1].numpy(), out / "2view" / "last.jpg")
    save_cameras(two, PHOTO, out / "2view" / "cameras.json")
    save_video(every.rgb[0].numpy(), out / "allview" / "room.mp4", crf=24)


if __name__ == "__main__":
    main()
