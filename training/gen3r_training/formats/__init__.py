"""Published data sets, read as they are on disk and written in the layout that training reads.

One module a format: `find(source)` yields a `SceneEntry` for every scene, which `prepare_scenes`
reads and writes. The modules' docstrings describe the formats and their conventions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gen3r_training.formats import co3d, dl3dv, re10k, tartanair, wildrgbd
from gen3r_training.formats.captions import Captions, read_captions
from gen3r_training.formats.prepare import PrepareOptions, PrepareReport, prepare_scenes
from gen3r_training.formats.scene import BadScene, Scene, SceneEntry
from gen3r_training.formats.writer import LINKS

__all__ = [
    "FORMATS",
    "LINKS",
    "BadScene",
    "Captions",
    "Format",
    "PrepareOptions",
    "PrepareReport",
    "Scene",
    "SceneEntry",
    "format_named",
    "prepare_scenes",
    "read_captions",
]


@dataclass(frozen=True)
class Format:
    """A data set: its short name, its published one, what a scene looks like, and how to find."""

    name: str
    title: str
    looks_for: str
    find: Callable[[Path], Iterator[SceneEntry]]


FORMATS = {
    f.name: f
    for f in (
        Format("re10k", "RealEstate10K", "camera files ID.txt (SRC/train/ID.txt)", re10k.find),
        Format("dl3dv", "DL3DV-10K", "folders with transforms.json and images_4", dl3dv.find),
        Format("co3d", "Co3Dv2", "categories with frame_annotations.jgz", co3d.find),
        Format("wildrgbd", "WildRGB-D", "folders with cam_poses.txt and rgb", wildrgbd.find),
        Format(
            "tartanair", "TartanAir", "folders with pose_left.txt and image_left", tartanair.find
        ),
    )
}


def format_named(text: str) -> Format:
    """The format of a short or published name, whatever its case. ValueError lists the names."""
    wanted = _plain(text)
    for known in FORMATS.values():
        if wanted in (known.name, _plain(known.title)):
            return known
    names = ", ".join(f"{f.name} ({f.title})" for f in FORMATS.values())
    raise ValueError(f"data set {text} is unknown; use one of {names}")


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())
