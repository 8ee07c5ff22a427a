"""What surfaces are made of: textures, their sizes and the colours they mix."""

from __future__ import annotations

from gen3r_training.procedural.captions import COLORS, MATERIAL_WORDS
from gen3r_training.procedural.draws import Draws
from gen3r_training.procedural.table import TEXTURES

# Metres of one repeat, low and high: about 5 pixels at the far end of a room at 112 x 112.
_PERIODS = {
    **{"plain": (0.9, 1.6), "brick": (0.50, 0.75), "plank": (0.35, 0.55), "tile": (0.55, 0.9)},
    **{"checkered": (0.6, 1.0), "striped": (0.45, 0.8), "marble": (1.0, 1.8), "panel": (1.0, 1.0)},
}
_STRENGTHS = {
    **{"plain": (0.06, 0.11), "brick": (0.10, 0.16), "plank": (0.10, 0.18), "tile": (0.04, 0.10)},
    **{"checkered": (0.16, 0.24), "striped": (0.12, 0.20), "marble": (0.12, 0.2)},
    "panel": (0.15, 0.2),
}
WALLS = {"plain": 0.40, "brick": 0.27, "striped": 0.12, "plank": 0.13, "tile": 0.08}
FLOORS = {"plain": 0.15, "plank": 0.25, "tile": 0.25, "checkered": 0.22, "marble": 0.13}
CEILINGS = {"plain": 0.8, "plank": 0.2}
COURTYARD_WALLS = {"plain": 0.45, "brick": 0.45, "tile": 0.1}
COURTYARD_FLOORS = {"plain": 0.25, "brick": 0.2, "tile": 0.35, "checkered": 0.2}
SOLIDS = {"plain": 0.62, "striped": 0.14, "marble": 0.12, "checkered": 0.12}
WOODEN = {"plain": 0.6, "plank": 0.4}


def linear(value: float) -> float:
    """Linear light of an sRGB value in [0, 1] (IEC 61966-2-1)."""
    return value / 12.92 if value <= 0.04045 else float(((value + 0.055) / 1.055) ** 2.4)


def material(draws: Draws, color: str, texture: str, size: float = 1.0) -> list[float]:
    """The table's columns from COLOR on: colours (linear), texture, period, phase, strength.

    size : factor on the texture's period (small objects have small patterns)
    """
    shift = draws.uniform(-0.03, 0.03)
    base = [
        linear(min(max(c + shift + draws.uniform(-0.02, 0.02), 0.02), 0.97)) for c in COLORS[color]
    ]
    # Joints are a greyed, darker or lighter version of the colour, so that it stays the colour.
    grey = sum(base) / 3
    level = 0.75 if grey > 0.3 else 1.5
    second = [(0.6 * b + 0.4 * grey) * level for b in base]
    low, high = _PERIODS[texture]
    period = size * draws.uniform(low, high)
    strength = draws.uniform(*_STRENGTHS[texture])
    # Scenes are functions of the order of draws; these are of a gloss, which nothing shows.
    if texture == "marble" or draws.chance(0.4):
        draws.uniform(0.1, 0.3)
    kind = float(TEXTURES.index(texture))
    return [*base, *second, kind, period, draws.uniform(0, 6.28), strength]


def word(texture: str) -> str:
    """The material's word in a caption; plain surfaces have none."""
    return texture if texture in MATERIAL_WORDS else ""
