"""Scenes that the project renders itself: rooms and courtyards with exact depth and cameras.

`make_clips` renders clips, each a pure function of (seed, split, number); `save_clips` and
`load_clips` keep them packed, `prepare.prepare_procedural` also writes `gen3r_training.data`'s
layout.
"""

from gen3r_training.procedural.captions import COLORS, Part, swap_color
from gen3r_training.procedural.clips import NO_OBJECT, Clips
from gen3r_training.procedural.make import SPLITS, caption_corpus, make_clips
from gen3r_training.procedural.storage import load_clips, save_clips

__all__ = [
    "COLORS",
    "NO_OBJECT",
    "SPLITS",
    "Clips",
    "Part",
    "caption_corpus",
    "load_clips",
    "make_clips",
    "save_clips",
    "swap_color",
]
