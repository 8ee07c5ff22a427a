"""The room of the examples: boxes with procedural textures, a window and a lamp.

Units are metres; x right, y down, z forward (OpenCV); floor at y = 0, ceiling at y = -2.6.
Deterministic: there are no random numbers, only hashes of positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]  # points, normals [N, 3] -> albedo [N, 3]

ROOM_LOW, ROOM_HIGH = np.array([-2.3, -2.6, -1.9]), np.array([2.3, 0.0, 3.6])
WINDOW = (-2.3, (-2.05, -0.85), (0.9, 2.5))  # x, y range, z range of the left wall's opening
LAMP = np.array([0.5, -2.25, 1.6])
SKY = np.array([1.15, 1.3, 1.5])


@dataclass(frozen=True)
class Box:
    """An axis-aligned box with a texture."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    texture: Texture


# ---------------------------------------------------------------------------------------- textures


def color(hexadecimal: str) -> np.ndarray:
    """Linear RGB of an sRGB "rrggbb"."""
    values = np.array([int(hexadecimal[i : i + 2], 16) for i in (0, 2, 4)]) / 255.0
    return values**2.2


def noise(*cells: np.ndarray) -> np.ndarray:
    """A hash of integer cells, uniform in [0, 1)."""
    total = sum(
        np.sin(np.floor(c) * k) * 43758.5453
        for c, k in zip(cells, (12.9898, 78.233, 37.719), strict=False)
    )
    return np.asarray(total) % 1.0


def smooth_noise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Value noise in [0, 1), one cell a unit."""
    fx, fy = x % 1.0, y % 1.0
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    top = noise(x, y) * (1 - fx) + noise(x + 1, y) * fx
    bottom = noise(x, y + 1) * (1 - fx) + noise(x + 1, y + 1) * fx
    return top * (1 - fy) + bottom * fy


def plain(hexadecimal: str) -> Texture:
    """One colour with a little mottling."""
    base = color(hexadecimal)

    def texture(p: np.ndarray, n: np.ndarray) -> np.ndarray:
        mottle = smooth_noise(9 * (p[:, 0] + p[:, 2]), 9 * p[:, 1])
        return base * (0.92 + 0.16 * mottle)[:, None]

    return texture


def planks(hexadecimal: str, width: float, length: float) -> Texture:
    """Boards along z with staggered joints and grain."""
    base = color(hexadecimal)

    def texture(p: np.ndarray, n: np.ndarray) -> np.ndarray:
        board = p[:, 0] / width
        along = p[:, 2] / length + 0.37 * np.floor(board)
        tone = 0.72 + 0.5 * noise(board, along)
        grain = smooth_noise(board * 14, p[:, 2] * 2.2) - 0.5
        seam = (np.abs(board % 1.0 - 0.5) > 0.485) | (np.abs(along % 1.0 - 0.5) > 0.497)
        shade = np.where(seam, 0.45, tone + 0.28 * grain)
        return base * shade[:, None]

    return texture


def walls(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Floor of oak, ceiling of plaster, walls of two colours with a skirting board."""
    out = np.broadcast_to(color("e9e3d6"), p.shape) * 1.0
    floor, side = n[:, 1] < -0.5, np.abs(n[:, 1]) < 0.5
    out[floor] = planks("b98553", 0.16, 1.3)(p[floor], n[floor])
    back = side & (n[:, 2] < -0.5)
    out[side] = color("dcd3c1")
    out[back] = color("6d8f8c")
    out[side] *= (0.96 + 0.08 * smooth_noise(6 * (p[side, 0] + p[side, 2]), 6 * p[side, 1]))[
        :, None
    ]
    out[side & (p[:, 1] > -0.11)] = color("f1ede4")
    return out


def rug(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """A woven rug: border, stripes and diamonds."""
    x, z = p[:, 0], p[:, 2] - 1.35
    edge = np.maximum(np.abs(x - 0.1) / 1.15, np.abs(z) / 0.85)
    diamond = (np.abs((x * 2.5) % 1 - 0.5) + np.abs((z * 2.5) % 1 - 0.5)) < 0.33
    out = np.where(diamond[:, None], color("e6d3ac"), color("a8483f"))
    out = np.where((edge > 0.80)[:, None], color("2f4560"), out)
    out = np.where(((edge > 0.86) & (edge < 0.91))[:, None], color("e6d3ac"), out)
    weave = 0.9 + 0.2 * noise(x * 70, z * 70)
    return out * weave[:, None]


def books(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Shelves of book spines on the front, wood elsewhere."""
    palette = np.stack(
        [color(c) for c in ("8c2f39", "1f4e5f", "d9a441", "3f6b4b", "e8e0cf", "5b4a72", "c4622d")]
    )
    shelf = (p[:, 1] + 2.0) / 0.4
    across = p[:, 0] / 0.052 + 17.3 * np.floor(shelf)
    index = (noise(across, shelf) * len(palette)).astype(int)
    height = 0.68 + 0.24 * noise(across + 3, shelf)
    inside = 1 - shelf % 1.0
    spine = palette[index] * (0.75 + 0.25 * np.sin(np.pi * (across % 1.0)))[:, None]
    band = (np.abs(inside - 0.5 * height) < 0.05) & (noise(across + 9, shelf) > 0.5)
    spine = np.where(band[:, None], color("efe3c4"), spine)
    wood = color("7a5230")
    out = np.where((inside < height)[:, None], spine, 0.18 * wood)
    board = (shelf % 1.0 > 0.91) | (np.abs(p[:, 0] - 1.5) > 0.56)
    out = np.where(board[:, None], wood, out)
    return np.where((n[:, 2] < -0.5)[:, None], out, wood)


def painting(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Hills under a low sun, in a dark frame."""
    u, v = (p[:, 0] + 0.55) / 1.1, (p[:, 1] + 1.95) / 0.8
    sky = color("f2b880") * (1 - v)[:, None] + color("f7e3c0") * v[:, None]
    out = np.where((np.hypot((u - 0.66) * 1.375, v - 0.42) < 0.11)[:, None], color("fff4d0"), sky)
    for base, wave, shade in ((0.55, 5.0, "7f8fa6"), (0.66, 8.0, "4d6a6d"), (0.8, 4.0, "2c4a3e")):
        hill = base + 0.06 * np.sin(wave * u + 9 * base) + 0.02 * np.sin(3.1 * wave * u)
        out = np.where((v > hill)[:, None], color(shade), out)
    frame = (np.abs(u - 0.5) > 0.46) | (np.abs(v - 0.5) > 0.45)
    return np.where(frame[:, None], color("2a211b"), out)


def blanket(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Broad stripes of wool."""
    stripe = (p[:, 0] / 0.22) % 1.0
    out = np.where((stripe < 0.18)[:, None], color("e9dcc0"), color("c9772f"))
    out = np.where(((stripe > 0.5) & (stripe < 0.6))[:, None], color("35556b"), out)
    return out * (0.85 + 0.3 * noise(p[:, 0] * 60, p[:, 1] * 60, p[:, 2] * 60))[:, None]


OAK, DARK = planks("9a6a3c", 0.09, 0.9), planks("5d3d26", 0.09, 0.9)
BOXES = (
    Box((-1.05, -0.015, 0.5), (1.25, 0.0, 2.2), rug),
    Box((0.92, -2.02, 3.2), (2.08, 0.0, 3.6), books),
    Box((-0.55, -1.95, 3.55), (0.55, -1.15, 3.6), painting),
    # The sofa under the painting: seat, back, arms, cushions.
    Box((-1.0, -0.42, 2.62), (0.7, -0.1, 3.45), plain("48617a")),
    Box((-1.0, -0.86, 3.25), (0.7, -0.1, 3.52), plain("41586f")),
    Box((-1.2, -0.62, 2.62), (-1.0, -0.02, 3.52), plain("3c5268")),
    Box((0.7, -0.62, 2.62), (0.9, -0.02, 3.52), plain("3c5268")),
    Box((-0.95, -0.76, 3.02), (-0.5, -0.42, 3.25), plain("d8a24a")),
    Box((0.25, -0.74, 3.04), (0.66, -0.42, 3.25), plain("b5483f")),
    Box((-0.35, -0.45, 2.6), (0.15, -0.12, 3.2), blanket),
    # A low table with a bowl-like box and two books on it.
    Box((-0.45, -0.42, 1.2), (0.6, -0.37, 1.8), OAK),
    *(
        Box((x, -0.37, z), (x + 0.05, -0.015, z + 0.05), DARK)
        for x in (-0.42, 0.52)
        for z in (1.23, 1.72)
    ),
    Box((-0.3, -0.46, 1.35), (0.0, -0.42, 1.58), plain("24506b")),
    Box((-0.27, -0.49, 1.38), (-0.04, -0.46, 1.56), plain("c94f3d")),
    Box((0.28, -0.52, 1.42), (0.42, -0.42, 1.56), plain("f0e9da")),
    # A cabinet at the right wall with a plant on it.
    Box((1.75, -0.8, 0.9), (2.3, -0.06, 2.3), DARK),
    Box((1.85, -0.98, 1.45), (2.1, -0.8, 1.7), plain("c7d0cf")),
    *(
        Box((x, y, z), (x + 0.15, y + 0.24, z + 0.15), plain(tone))
        for x, y, z, tone in (
            *((1.82, -1.28, 1.42, "4f7f45"), (1.98, -1.36, 1.55, "5f9150")),
            *((1.90, -1.50, 1.48, "74a65c"), (2.05, -1.22, 1.44, "457339")),
        )
    ),
    # The lamp's cord and shade.
    Box((0.49, -2.6, 1.59), (0.51, -2.2, 1.61), plain("1c1a18")),
    Box((0.3, -2.2, 1.4), (0.7, -2.0, 1.8), plain("f3d9a0")),
)
ROOM = Box(tuple(ROOM_LOW), tuple(ROOM_HIGH), walls)
