"""Held-out procedural clips, and what is asked of a model on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gen3r.cameras import invert_pose
from gen3r.conditioning import given_frames
from gen3r.scene import Cameras, SceneRequest
from gen3r_training.procedural import Clips, make_clips

SEED = 770_077  # of the clips: another one than training's
RENDERED = 8  # clips rendered together
BASELINE = 32  # training clips whose mean depth is the trivial answer
ANOTHER = 100_003  # between the noise seeds of two runs that shall not share noise
UNSEEN = {"1view": slice(1, None), "2view": slice(1, -1)}  # frames that the task does not give


def held_out(
    numbers: Sequence[int],
    *,
    seed: int,
    frames: int,
    size: int,
    device: torch.device,
    move: str | None = None,
) -> Clips:
    """The held-out clips of these numbers, on the device. move: the camera move they all take."""
    parts = [
        make_clips(
            numbers[start : start + RENDERED],
            seed=seed,
            split="held_out",
            frames=frames,
            size=size,
            device=device,
            move=move,
        )
        for start in range(0, len(numbers), RENDERED)
    ]
    return Clips.cat(parts)


def mean_depth(
    *, seed: int, size: int, device: torch.device
) -> Tensor:  # [H, W] float32, on the host
    """The mean depth of every pixel over `BASELINE` training clips: what a model could know that
    looks at no picture."""
    clips = make_clips(
        range(BASELINE),
        seed=seed,
        split="train",
        frames=2,
        size=size,
        device=device,
        supersample=1,
    )
    depth = clips.depth.float().flatten(0, 1)
    known = depth > 0
    return (depth.sum(0) / known.sum(0).clamp(min=1)).cpu()


def true_w2c(clips: Clips) -> Tensor:  # [N, F, 4, 4] float64, world to camera, on the host
    """The true cameras."""
    return invert_pose(clips.c2w.cpu().double())


def requests(
    clips: Clips,
    task: str,
    cameras: str = "true",
    captions: Sequence[str] | None = None,
    noise: int = 0,
) -> list[SceneRequest]:
    """One request a clip.

    Parameters
    ----------
    cameras : ``true`` (the clip's own path; not for allview) or a built-in move.
    captions : in place of the clips' own.
    noise : scene n draws its noise from seed noise + n.

    Raises
    ------
    ValueError : as `SceneRequest`.
    """
    frames, height, width = clips.rgb.shape[1:4]
    given = given_frames(task, frames)
    paths: Sequence[str | Cameras]
    if cameras == "true" and task != "allview":
        w2c = true_w2c(clips)
        k = clips.intrinsics.cpu().double()[:, None].expand(-1, frames, -1, -1)
        paths = [Cameras(pose, one) for pose, one in zip(w2c, k, strict=True)]
    else:
        paths = ["free" if cameras == "true" else cameras] * len(clips)
    texts = clips.captions if captions is None else captions
    return [
        SceneRequest(
            [clips.rgb[n, i] for i in given],
            texts[n],
            task=task,
            cameras=paths[n],
            num_frames=frames,
            height=height,
            width=width,
            seed=noise + n,
        )
        for n in range(len(clips))
    ]


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
