"""Descriptions of scenes: a room or a courtyard, its camera and light, and what stands in it.

A description is a pure function of (seed, split, number). The layout keeps free what the built-in
moves need: a corridor along the view's axis, as far ahead and behind as `zoom_in` and `zoom_out`
can go (0.8 x the median depth of the first view, which no wall's depth exceeds by much).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gen3r_training.procedural import table as t
from gen3r_training.procedural.captions import Part, phrase, sentence
from gen3r_training.procedural.clips import NO_OBJECT
from gen3r_training.procedural.draws import Draws
from gen3r_training.procedural.materials import (
    CEILINGS,
    COURTYARD_FLOORS,
    COURTYARD_WALLS,
    FLOORS,
    WALLS,
    material,
    word,
)

Floats = NDArray[np.float64]
CLEARANCE = 0.4  # metres between the axis of the view and what is tall
_LIGHT_COLORS = ("white", "grey", "yellow", "orange", "green", "blue", "red", "purple", "brown")
# Every colour occurs, those of real walls and floors more often; black ones show little.
_WALL_COLORS = {
    **{"white": 0.19, "grey": 0.1, "yellow": 0.13, "green": 0.12, "blue": 0.12, "red": 0.1},
    **{"orange": 0.1, "purple": 0.07, "brown": 0.08, "black": 0.02},
}
_FLOOR_COLORS = {
    **{"brown": 0.22, "grey": 0.18, "white": 0.11, "green": 0.1, "blue": 0.1, "red": 0.1},
    **{"yellow": 0.06, "orange": 0.06, "purple": 0.05, "black": 0.03},
}


@dataclass
class Layout:
    """One scene in metres. The camera stands above the origin and looks along z.

    rows : [ROWS, COLUMNS], owners : [ROWS] part of each row, bounds : [2, 3] low and high corner
    light : [LIGHT_COLUMNS]; eye : height of the camera; yaw, pitch (down), fov : radians
    """

    draws: Draws
    courtyard: bool
    bounds: Floats
    eye: float
    yaw: float
    pitch: float
    fov: float
    rows: Floats = field(default_factory=lambda: _empty_rows())
    owners: NDArray[np.uint8] = field(default_factory=lambda: np.full(t.ROWS, NO_OBJECT, np.uint8))
    light: Floats = field(default_factory=lambda: np.zeros(t.LIGHT_COLUMNS))
    parts: list[Part] = field(default_factory=list)
    phrases: list[str] = field(default_factory=list)
    used: dict[str, int] = field(default_factory=dict)
    footprints: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def depth(self) -> float:
        """Metres from the camera to the far wall."""
        return float(self.bounds[1, 2])

    @property
    def height(self) -> float:
        """Metres from the floor to the ceiling or the top of the walls."""
        return float(-self.bounds[0, 1])

    @property
    def caption(self) -> str:
        """The sentence that names every part."""
        return sentence(self.phrases[0], self.phrases[1:])

    def add_part(self, name: str, kind: str, color: str, texture: str, count: int = 1) -> int:
        """Name a part; its index."""
        part = Part(name, color, kind)
        self.parts.append(part)
        self.phrases.append(phrase(part, word(texture), count))
        return len(self.parts) - 1

    def room_for(self, kind: str, count: int = 1) -> bool:
        """Whether `count` more rows of this kind are left."""
        return self.used.get(kind, 0) + count <= t.FIRST[kind][1]

    def add_row(self, kind: str, part: int, geometry: list[float], surface: list[float]) -> None:
        """Take the next row of a kind: columns from CENTER to KIND, then the material's."""
        row = t.FIRST[kind][0] + self.used.get(kind, 0)
        self.used[kind] = self.used.get(kind, 0) + 1
        self.rows[row, : t.COLOR] = geometry
        self.rows[row, t.COLOR :] = surface
        self.owners[row] = part

    def path_height(self, along: float) -> float:
        """Height of the view's axis at so many metres ahead of the camera."""
        return self.eye - math.tan(self.pitch) * along

    def free(self, x: float, z: float, radius: float, top: float) -> bool:
        """Whether something round of this footprint and height may stand at (x, z)."""
        low, high = self.bounds[0], self.bounds[1]
        if not (low[0] + radius < x < high[0] - radius and low[2] + radius < z < high[2] - radius):
            return False
        if math.hypot(x, z) < radius + 0.9:
            return False
        lateral = abs(x * math.cos(self.yaw) - z * math.sin(self.yaw))
        along = x * math.sin(self.yaw) + z * math.cos(self.yaw)
        lowest = min(self.path_height(along - radius), self.path_height(along + radius))
        if lateral < radius + CLEARANCE and top > lowest - CLEARANCE:
            return False
        return all(
            math.hypot(x - a, z - b) > radius + other + 0.08 for a, b, other in self.footprints
        )

    def pose(self) -> Floats:  # [4, 4]
        """The first camera to world."""
        cy, sy, cp, sp = (f(a) for a in (self.yaw, self.pitch) for f in (math.cos, math.sin))
        yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        pitch = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
        pose = np.eye(4)
        pose[:3, :3] = yaw @ pitch
        pose[1, 3] = -self.eye
        return pose


def _empty_rows() -> Floats:
    rows = np.zeros((t.ROWS, t.COLUMNS))
    rows[:, t.HALF : t.HALF + 3] = -1.0
    rows[:, t.COSINE] = 1.0
    rows[:, t.PERIOD] = 1.0
    for kind, number in (("box", t.BOX), ("sphere", t.SPHERE), ("cylinder", t.CYLINDER)):
        first, count = t.FIRST[kind]
        rows[first : first + count, t.KIND] = number
    rows[t.FIRST_ARCH :, t.KIND] = t.ARCH
    return rows


def empty_place(draws: Draws) -> Layout:
    """Walls, floor, light and camera; nothing stands there yet."""
    courtyard = draws.chance(0.35)
    depth = draws.uniform(5.5, 8.0) if courtyard else draws.uniform(4.5, 7.5)
    width = draws.uniform(4.6, 6.6) if courtyard else draws.uniform(3.7, 5.4)
    height = 0.0 if courtyard else draws.uniform(2.7, 3.4)
    shift = draws.uniform(-0.12, 0.12) * width
    back = depth * draws.uniform(0.95, 1.1) + 0.7
    bounds = np.array([[shift - width / 2, -height, -back], [shift + width / 2, 0.0, depth]])
    eye = draws.uniform(1.35, 1.7)
    reach = 0.95 * depth  # the longest zoom
    side = width / 2 - abs(shift) - 0.6
    yaw = draws.uniform(-1, 1) * min(math.radians(13), math.atan(side / reach))
    pitch = math.radians(draws.uniform(-3, 7))
    pitch = min(pitch, math.atan((eye - 0.55) / reach))
    if not courtyard:
        rise = math.atan((height - 0.5 - eye) / reach)
        pitch = max(min(pitch, rise), -rise)
    fov = math.radians(draws.uniform(50, 70))
    layout = Layout(draws, courtyard, bounds, eye, yaw, pitch, fov)
    if courtyard:
        bounds[0, 1] = -max(_highest_wall_in_view(layout) + 0.1, draws.uniform(3.0, 6.0))
    _shell(layout)
    _light(layout)
    return layout


def _highest_wall_in_view(layout: Layout) -> float:
    """Height of the walls that hides the sky in the first view."""
    half = math.tan(layout.fov / 2)
    pose = layout.pose()
    highest = 0.0
    for across in (-1.0, -0.5, 0.0, 0.5, 1.0):
        x, y, z = pose[:3, :3] @ np.array([across * half, -half, 1.0])
        wall = layout.bounds[1 if x > 0 else 0, 0]
        distance = min(wall / x if x else math.inf, layout.depth / z)
        highest = max(highest, layout.eye - y * distance)
    # Between the five columns the meeting with the far wall's ends can be a little higher.
    return highest + 0.15


def _shell(layout: Layout) -> None:
    draws = layout.draws
    place = "courtyard" if layout.courtyard else "room"
    walls = draws.weighted(_WALL_COLORS)
    floor = draws.weighted({c: w for c, w in _FLOOR_COLORS.items() if c != walls})
    wall_texture = draws.weighted(COURTYARD_WALLS if layout.courtyard else WALLS)
    floor_texture = draws.weighted(COURTYARD_FLOORS if layout.courtyard else FLOORS)
    surface = {}
    part = layout.add_part(place, "wall", walls, wall_texture)
    side = material(draws, walls, wall_texture)
    surface = {face: (part, side) for face in (t.LEFT, t.RIGHT, t.BACK, t.FRONT)}
    part = layout.add_part("floor", "floor", floor, floor_texture)
    surface[t.FLOOR] = (part, material(draws, floor, floor_texture))
    surface[t.CEILING] = (NO_OBJECT, side)
    if not layout.courtyard:
        color = "white" if draws.chance(0.6) else draws.pick(_LIGHT_COLORS)
        texture = draws.weighted(CEILINGS)
        part = layout.add_part("ceiling", "ceiling", color, texture)
        surface[t.CEILING] = (part, material(draws, color, texture))
    if draws.chance(0.35):
        color = draws.weighted({c: w for c, w in _WALL_COLORS.items() if c not in (walls, floor)})
        texture = draws.weighted(WALLS)
        part = layout.add_part("far wall", "wall", color, texture)
        surface[t.FRONT] = (part, material(draws, color, texture))
    low, high = layout.bounds
    for face, (part, values) in surface.items():
        axis, end = face // 2, face % 2
        normal = [0.0, 0.0, 0.0]
        normal[axis] = -1.0 if end else 1.0
        center = ((low + high) / 2).tolist()
        half = ((high - low) / 2).tolist()
        center[axis], half[axis] = float(layout.bounds[end, axis]), 0.0
        layout.rows[face] = [*center, *half, 1.0, 0.0, *normal, t.PLANE, *values]
        layout.owners[face] = part


def _light(layout: Layout) -> None:
    """A lamp below the ceiling or the sun, and light from everywhere above and below."""
    draws, light = layout.draws, layout.light
    warmth = draws.uniform(-0.06, 0.06)
    tint = np.array([1 + warmth, 1.0, 1 - warmth])
    hard = draws.chance(0.4)
    if layout.courtyard:
        elevation, azimuth = math.radians(draws.uniform(45, 68)), draws.uniform(0, 2 * math.pi)
        level = math.cos(elevation)
        light[t.LIGHT : t.LIGHT + 3] = [
            *(level * math.cos(azimuth), -math.sin(elevation), level * math.sin(azimuth))
        ]
        light[t.RADIUS], light[t.SUN] = (0.01 if hard else 0.05), 1.0
        light[t.INTENSITY : t.INTENSITY + 3] = draws.uniform(0.65, 0.85) * tint
        light[t.ABOVE : t.ABOVE + 3] = draws.uniform(0.5, 0.6) * np.array([0.96, 1.0, 1.05])
        light[t.BELOW : t.BELOW + 3] = draws.uniform(0.32, 0.42)
        return
    low, high = layout.bounds
    middle, half = (low[0] + high[0]) / 2, (high[0] - low[0]) / 2
    light[t.LIGHT : t.LIGHT + 3] = [
        *(middle + draws.uniform(-0.55, 0.55) * half, 0.35 - layout.height),
        draws.uniform(0.1, 0.7) * layout.depth,
    ]
    light[t.RADIUS] = 0.03 if hard else 0.22
    light[t.INTENSITY : t.INTENSITY + 3] = draws.uniform(0.75, 1.05) * tint
    light[t.ABOVE : t.ABOVE + 3] = draws.uniform(0.40, 0.50)
    light[t.BELOW : t.BELOW + 3] = draws.uniform(0.36, 0.44)
