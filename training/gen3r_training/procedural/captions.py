"""Colour words, the parts of a scene, and the sentence that names them.

A caption is one lower-case sentence: "a red brick room with a grey tile floor, a white ceiling, two
white columns and a blue sphere". Every part that it names has a colour word of its own, so that a
part's colour can be swapped in the words alone (`swap_color`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

# sRGB in [0, 1]: what a fully lit surface of this colour shows.
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.15, 0.13),
    "orange": (0.95, 0.52, 0.10),
    "yellow": (0.95, 0.84, 0.25),
    "green": (0.22, 0.60, 0.26),
    "blue": (0.18, 0.36, 0.82),
    "purple": (0.55, 0.25, 0.70),
    "white": (0.94, 0.94, 0.92),
    "grey": (0.55, 0.55, 0.56),
    "black": (0.11, 0.11, 0.12),
    "brown": (0.48, 0.30, 0.16),
}
MATERIAL_WORDS = ("brick", "plank", "tile", "checkered", "striped", "marble")
_COUNTS = {1: "a", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_PLURALS = {"bench": "benches", "arch": "arches", "box": "boxes"}


@dataclass(frozen=True)
class Part:
    """What a caption names and one object id stands for.

    name : its noun in the caption ("sphere", "columns", "floor"; the walls are "room")
    color : its colour word, a key of `COLORS`
    kind : its form: wall, floor, ceiling, box, table, sphere, cylinder, column, arch, door, ...
    """

    name: str
    color: str
    kind: str


def noun(name: str, count: int) -> str:
    """The noun for so many: "column" and 2 give "columns"."""
    return name if count == 1 else _PLURALS.get(name, name + "s")


def phrase(part: Part, material: str = "", count: int = 1) -> str:
    """The part's words in a caption: "two white columns". `part.name` is in the plural already."""
    words = " ".join(word for word in (part.color, material, part.name) if word)
    article = "an" if count == 1 and words[0] in "aeiou" else _COUNTS[count]
    return f"{article} {words}"


def sentence(place: str, others: Sequence[str]) -> str:
    """One sentence from the place ("a red brick room") and the other parts' phrases."""
    if not others:
        return place
    if len(others) == 1:
        return f"{place} with {others[0]}"
    return f"{place} with {', '.join(others[:-1])} and {others[-1]}"


def swap_color(caption: str, part: Part, color: str) -> str:
    """The caption with that part's colour word replaced, and its article where that changes.

    Raises
    ------
    ValueError : an unknown colour, or a caption that does not name the part.
    """
    if color not in COLORS:
        raise ValueError(f"color '{color}' is unknown; use one of {', '.join(COLORS)}")
    material = rf"(?: (?:{'|'.join(MATERIAL_WORDS)}))?"
    pattern = re.compile(rf"\b(an? )?{part.color}({material} {re.escape(part.name)})\b")
    found = pattern.search(caption)
    if found is None:
        raise ValueError(f"the caption names no {part.color} {part.name}: {caption}")
    article = ("an " if color[0] in "aeiou" else "a ") if found[1] else ""
    return f"{caption[: found.start()]}{article}{color}{found[2]}{caption[found.end() :]}"
