"""Does the text matter? Captions with one colour word swapped, and the colour that comes of it.

A scene counts where a named part is hardly seen in the first view and well seen in the last one
(the camera moves back), so that only the caption says what colour it has. Both captions are given
with the same noise. Inside the part's true outline in the last frames the mean colour of both
results is compared in the plane (a, b) of CIE Lab, which leaves brightness out: light and shadow
change it, a colour word's hue they do not. The scene is a hit where the colour of the swapped
caption lies further in the direction from the true word's albedo to the named word's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from gen3r_training.procedural import COLORS, Part, make_clips, swap_color

if TYPE_CHECKING:
    from gen3r_training.procedural import Clips

HIDDEN = 0.005  # share of the first view's pixels: below it the part is hardly seen
SEEN = 0.03  # share of the last view's pixels: above it the part is well seen
LAST = 4  # frames in which the colour is measured: one latent frame
APART = 50.0  # distance in (a, b) from which a hue is clearly another
COLORFUL = 25.0  # distance from grey in (a, b): words that name a hue
MOVE = "zoom_out"
FEWEST, MOST = 8, 64  # clips looked at together

# Linear sRGB (IEC 61966-2-1) to XYZ, relative to the white point D65.
_TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
_WHITE = _TO_XYZ.sum(1)


def lab(
    rgb: np.ndarray,  # [..., 3] sRGB in [0, 1]
) -> np.ndarray:  # [..., 3] CIE L*, a*, b* (D65)
    """CIE 1976 L*a*b* of sRGB colours."""
    rgb = np.asarray(rgb, dtype=np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _TO_XYZ.T / _WHITE
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def hue_plane(name: str) -> np.ndarray:  # [2]
    """a* and b* of a colour word's albedo."""
    return lab(np.asarray(COLORS[name]))[1:]


def other_color(name: str, number: int) -> str:
    """A word for a hue that is clearly another (`APART`), by turns with the clip's number."""
    own, planes = hue_plane(name), {color: hue_plane(color) for color in COLORS}
    hues = [c for c, plane in planes.items() if float(np.linalg.norm(plane)) >= COLORFUL]
    far = [c for c in hues if float(np.linalg.norm(planes[c] - own)) >= APART]
    return far[number % len(far)]


@dataclass(frozen=True)
class Case:
    """One scene of the test: the clip's number, the part, and the word that takes its colour's
    place."""

    number: int
    index: int  # of the part, as `Clips.objects` has it
    part: Part
    color: str


@dataclass(frozen=True)
class Shift:
    """What came of a case.

    shift : way of the mean colour in the outline towards the named colour, in units of (a, b).
    whole : the same over all pixels of the frames. full : distance of the two albedos.
    """

    case: Case
    shift: float
    whole: float
    full: float


def find_cases(
    count: int, *, seed: int, size: int, device: str | torch.device, most: int = 4096
) -> list[Case]:
    """The first `count` cases among the held-out clips, at most one a clip, `most` looked at.

    size : pixels; the outlines that count are those of this size. Fewer may be found.
    """
    found: list[Case] = []
    together = min(max(4 * count, FEWEST), MOST)  # about every third clip has a case
    for start in range(0, most, together):
        numbers = range(start, min(start + together, most))
        clips = make_clips(
            numbers,
            seed=seed,
            split="held_out",
            frames=2,
            size=size,
            device=device,
            supersample=1,
            move=MOVE,
        )
        found += _cases(numbers, clips)
        if len(found) >= count:
            break
    return found[:count]


def _cases(numbers: Sequence[int], clips: Clips) -> list[Case]:
    ends = clips.objects[:, [0, -1]].flatten(2).long()  # [N, 2, pixels]
    parts = max(len(own) for own in clips.parts)
    shares = torch.stack([(ends == i).float().mean(-1) for i in range(parts)], dim=-1).tolist()
    found = []
    for number, own, (first, last) in zip(numbers, clips.parts, shares, strict=True):
        fitting = [i for i in range(len(own)) if first[i] < HIDDEN and last[i] > SEEN]
        # Two parts of one name share the word in the caption: neither can be told apart.
        names = [(part.name, part.color) for part in own]
        fitting = [i for i in fitting if names.count(names[i]) == 1]
        if fitting:
            index = max(fitting, key=lambda i: last[i])
            part = own[index]
            found.append(Case(number, index, part, other_color(part.color, number)))
    return found


def swapped(captions: Sequence[str], cases: Sequence[Case]) -> list[str]:
    """The captions of the cases with the part's colour word replaced."""
    return [swap_color(t, c.part, c.color) for t, c in zip(captions, cases, strict=True)]


def measure(
    cases: Sequence[Case],
    true_text: Tensor,  # [N, F, H, W, 3] uint8, made with the true captions
    other_text: Tensor,  # the same, made with the swapped ones
    objects: Tensor,  # [N, F, H, W] uint8, which part a pixel shows
) -> list[Shift]:
    """The shift of every case whose part is seen in the last frames."""
    found = []
    for n, case in enumerate(cases):
        mask = objects[n, -LAST:] == case.index
        if not bool(mask.any()):
            continue
        direction = hue_plane(case.color) - hue_plane(case.part.color)
        full = float(np.linalg.norm(direction))
        before, after = (video[n, -LAST:].cpu() for video in (true_text, other_text))
        ways = []
        for kept in (mask.cpu(), torch.ones_like(mask, device="cpu")):
            way = _mean_hue(after[kept]) - _mean_hue(before[kept])
            ways.append(float(way @ direction) / full)
        found.append(Shift(case, ways[0], ways[1], full))
    return found


def _mean_hue(
    pixels: Tensor,  # [n, 3] uint8 sRGB
) -> np.ndarray:  # [2]
    """a* and b* of the mean colour."""
    return lab(pixels.double().mean(0).numpy() / 255)[1:]


def p_value(hits: float, cases: int) -> float:
    """Probability of at least so many hits if a fair coin decided (binomial, one-sided)."""
    return float(binomtest(int(hits), cases, 0.5, alternative="greater").pvalue)
