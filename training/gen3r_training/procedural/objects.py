"""What stands in a room or hangs on its walls.

About half of the objects are placed where the first view does not reach, so that the camera's move
finds them: beside the view, behind the camera, above or below the picture's edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from gen3r_training.procedural import table as t
from gen3r_training.procedural.captions import COLORS, noun
from gen3r_training.procedural.draws import Draws
from gen3r_training.procedural.layout import Layout, empty_place
from gen3r_training.procedural.materials import SOLIDS, WOODEN, material

_TRIES = 10
_SPLITS = {"train": 0, "held_out": 1}
SPLITS = tuple(_SPLITS)


def sample_layout(number: int, seed: int, split: str) -> Layout:
    """The scene of clip `number`: a pure function of the three arguments.

    Raises
    ------
    ValueError : an unknown split, a negative number or seed.
    """
    layout = empty_place(clip_draws(number, seed, split, stream=0))
    draws = layout.draws
    wanted = draws.weighted({2: 0.15, 3: 0.35, 4: 0.35, 5: 0.15})
    kinds = dict(_INDOORS if not layout.courtyard else _OUTDOORS)
    placed = 0
    for _ in range(3 * wanted):
        if placed == wanted:
            break
        kind = draws.weighted(kinds)
        if _PLACERS[kind](layout):
            placed += 1
            kinds[kind] *= 0.15 if kind in ("sphere", "box") else 0.0
    return layout


def clip_draws(number: int, seed: int, split: str, stream: int) -> Draws:
    """Random values of one clip; the streams (layout, path) are independent."""
    if split not in _SPLITS:
        raise ValueError(f"split '{split}' is unknown; use {' or '.join(_SPLITS)}")
    if number < 0 or seed < 0:
        raise ValueError(f"clip {number} of seed {seed}: both must be at least 0")
    return Draws(seed, _SPLITS[split], number, stream)


def _color(layout: Layout) -> str:
    """A colour that the walls, the floor and the other objects do not have."""
    taken = {part.color for part in layout.parts if part.kind != "ceiling"}
    return layout.draws.pick([color for color in COLORS if color not in taken] or list(COLORS))


def _spot(layout: Layout, radius: float, top: float) -> tuple[float, float] | None:
    """A free place on the floor: within the first view, beside it or behind the camera."""
    draws = layout.draws
    low, high = layout.bounds
    zone = draws.weighted({"seen": 0.6, "beside": 0.2, "behind": 0.2})
    for _ in range(_TRIES):
        if zone == "seen":
            angle = layout.yaw + 0.9 * draws.uniform(-0.5, 0.5) * layout.fov
            z = draws.uniform(1.6, layout.depth - radius - 0.05)
            x = z * math.tan(angle)
        else:
            sign = draws.sign()
            wall = high[0] if sign > 0 else -low[0]
            x = sign * (wall - radius) * draws.uniform(0.6, 1.0)
            z = draws.uniform(-0.75 * layout.depth, 0.2)
            if zone == "beside":
                angle = sign * layout.yaw + layout.fov / 2 + math.radians(draws.uniform(4, 16))
                z = abs(x) / math.tan(angle)
        if layout.free(x, z, radius, top):
            layout.footprints.append((x, z, radius))
            return x, z
    return None


def _solid(
    x: float, base: float, z: float, half: tuple[float, float, float], turn: float, kind: int
) -> list[float]:
    """A row's geometry; `base` is the height of the lower side above the floor."""
    cosine, sine = math.cos(turn), math.sin(turn)
    return [x, -base - half[1], z, *half, cosine, sine, 0.0, 0.0, 0.0, kind]


def _box(layout: Layout) -> bool:
    draws = layout.draws
    if not layout.room_for("box"):
        return False
    half = (draws.uniform(0.25, 0.5), draws.uniform(0.2, 0.5), draws.uniform(0.25, 0.5))
    radius = math.hypot(half[0], half[2])
    spot = _spot(layout, radius, 2 * half[1])
    if spot is None:
        return False
    color, texture = _color(layout), draws.weighted({**SOLIDS, "plank": 0.15})
    part = layout.add_part("box", "box", color, texture)
    geometry = _solid(spot[0], 0, spot[1], half, draws.uniform(-0.7, 0.7), t.BOX)
    layout.add_row("box", part, geometry, material(draws, color, texture, 0.6))
    return True


def _cabinet(layout: Layout) -> bool:
    """A tall one with its back to a side wall."""
    draws = layout.draws
    deep, wide, high = draws.uniform(0.2, 0.3), draws.uniform(0.4, 0.65), draws.uniform(0.7, 1.05)
    if not layout.room_for("box"):
        return False
    for _ in range(_TRIES):
        sign = draws.sign()
        x = (layout.bounds[1, 0] if sign > 0 else layout.bounds[0, 0]) - sign * (deep + 0.02)
        z = draws.uniform(-0.7, 0.9) * (layout.depth - wide)
        # Its footprint is no circle: it may stand closer to the wall than its radius.
        if layout.free(x - sign * wide, z, wide, 2 * high):
            layout.footprints.append((x, z, wide))
            color, texture = _color(layout), draws.weighted(WOODEN)
            part = layout.add_part("cabinet", "box", color, texture)
            geometry = _solid(x, 0, z, (deep, high, wide), 0.0, t.BOX)
            layout.add_row("box", part, geometry, material(draws, color, texture))
            return True
    return False


def _table(layout: Layout) -> bool:
    draws = layout.draws
    if not layout.room_for("box", 3):
        return False
    wide, deep, high = draws.uniform(0.5, 0.75), draws.uniform(0.3, 0.45), draws.uniform(0.6, 0.8)
    spot = _spot(layout, math.hypot(wide, deep), high)
    if spot is None:
        return False
    color, texture = _color(layout), draws.weighted(WOODEN)
    part = layout.add_part("table", "table", color, texture)
    surface = material(draws, color, texture, 0.8)
    turn = draws.uniform(-0.8, 0.8)
    cosine, sine = math.cos(turn), math.sin(turn)
    layout.add_row(
        "box",
        part,
        _solid(spot[0], high - 0.09, spot[1], (wide, 0.045, deep), turn, t.BOX),
        surface,
    )
    for side in (-1, 1):
        along = side * (wide - 0.1)
        x, z = spot[0] + cosine * along, spot[1] - sine * along
        leg = _solid(x, 0, z, (0.05, (high - 0.09) / 2, 0.85 * deep), turn, t.BOX)
        layout.add_row("box", part, leg, surface)
    return True


def _sphere(layout: Layout) -> bool:
    draws = layout.draws
    if not layout.room_for("sphere"):
        return False
    radius = draws.uniform(0.25, 0.5)
    spot = _spot(layout, radius, 2 * radius)
    if spot is None:
        return False
    color, texture = _color(layout), draws.weighted({"plain": 0.7, "striped": 0.2, "marble": 0.1})
    part = layout.add_part("sphere", "sphere", color, texture)
    geometry = _solid(spot[0], 0, spot[1], (radius,) * 3, 0.0, t.SPHERE)
    layout.add_row("sphere", part, geometry, material(draws, color, texture, 0.7))
    return True


def _lamp(layout: Layout) -> bool:
    """A globe under the ceiling on a rod, beside or above the view's axis."""
    draws = layout.draws
    radius = draws.uniform(0.16, 0.26)
    drop = draws.uniform(0.15, 0.35)
    bottom = layout.height - drop - 2 * radius
    x = draws.uniform(0.8, 1.0) * draws.sign() * (layout.bounds[1, 0] - layout.bounds[0, 0]) / 4
    x += (layout.bounds[1, 0] + layout.bounds[0, 0]) / 2
    z = draws.uniform(-0.3, 0.75) * layout.depth
    lateral = abs(x * math.cos(layout.yaw) - z * math.sin(layout.yaw))
    crowded = any(math.hypot(x - a, z - b) < c + radius for a, b, c in layout.footprints)
    if lateral < radius + 0.4 or crowded or not layout.room_for("cylinder"):
        return False
    layout.footprints.append((x, z, radius))
    color = _color(layout)
    part = layout.add_part("lamp", "sphere", color, "plain")
    surface = material(draws, color, "plain")
    globe = _solid(x, bottom, z, (radius,) * 3, 0.0, t.SPHERE)
    rod = _solid(
        x, bottom + 1.9 * radius, z, (0.03, (drop + 0.1 * radius) / 2, 0.03), 0.0, t.CYLINDER
    )
    layout.add_row("sphere", part, globe, surface)
    layout.add_row("cylinder", part, rod, surface)
    return True


def _barrel(layout: Layout) -> bool:
    draws = layout.draws
    if not layout.room_for("cylinder"):
        return False
    radius, high = draws.uniform(0.22, 0.4), draws.uniform(0.25, 0.5)
    spot = _spot(layout, radius, 2 * high)
    if spot is None:
        return False
    color, texture = _color(layout), draws.weighted(SOLIDS)
    name = draws.pick(("barrel", "cylinder"))
    part = layout.add_part(name, "cylinder", color, texture)
    geometry = _solid(spot[0], 0, spot[1], (radius, high, radius), 0.0, t.CYLINDER)
    layout.add_row("cylinder", part, geometry, material(draws, color, texture, 0.6))
    return True


def _columns(layout: Layout) -> bool:
    """One to four columns: alone, or in pairs on both sides of the way."""
    draws = layout.draws
    count = draws.weighted({1: 0.3, 2: 0.45, 4: 0.25})
    if not layout.room_for("cylinder", count):
        return False
    radius = draws.uniform(0.16, 0.28)
    low, high = layout.bounds[0, 0] + radius, layout.bounds[1, 0] - radius
    for _ in range(_TRIES):
        inset = draws.uniform(0.05, 0.8)
        first = draws.uniform(-0.5, 0.8) * layout.depth
        rows = (first, first - draws.uniform(1.4, 2.4))[: max(1, count // 2)]
        sides = (
            (low + inset, high - inset) if count > 1 else (draws.pick((low + inset, high - inset)),)
        )
        spots = [(x, z) for z in rows for x in sides]
        if all(layout.free(x, z, radius, layout.height) for x, z in spots):
            layout.footprints.extend((x, z, radius) for x, z in spots)
            break
    else:
        return False
    tall = layout.height if not layout.courtyard else min(layout.height, draws.uniform(2.6, 3.6))
    color, texture = _color(layout), draws.weighted({"plain": 0.6, "marble": 0.25, "striped": 0.15})
    part = layout.add_part(noun("column", count), "column", color, texture, count)
    surface = material(draws, color, texture, 0.8)
    for x, z in spots:
        layout.add_row(
            "cylinder", part, _solid(x, 0, z, (radius, tall / 2, radius), 0.0, t.CYLINDER), surface
        )
    return True


def _arch(layout: Layout) -> bool:
    """An arch across the way; the view's axis goes through its opening."""
    draws = layout.draws
    hole, wall = draws.uniform(0.8, 1.1), draws.uniform(0.22, 0.4)
    z = draws.uniform(0.4, 0.75) * layout.depth * (1 if draws.chance(0.6) else -1)
    x = z * math.tan(layout.yaw)
    low, high = layout.bounds[0, 0], layout.bounds[1, 0]
    spring = max(draws.uniform(1.2, 1.5), layout.path_height(z / math.cos(layout.yaw)) + 0.1)
    tall = spring + hole + draws.uniform(0.15, 0.35)
    half, thick = hole + wall, draws.uniform(0.12, 0.25)
    feet = [(x + side * (hole + wall / 2), z, max(wall, thick)) for side in (-1, 1)]
    crowded = any(
        math.hypot(a - c, b - d) < e + f for a, b, e in feet for c, d, f in layout.footprints
    )
    outside = tall > layout.height or x - half < low or x + half > high
    if outside or crowded or not layout.room_for("arch"):
        return False
    layout.footprints.extend(feet)
    color, texture = _color(layout), draws.weighted({"plain": 0.55, "brick": 0.25, "marble": 0.2})
    part = layout.add_part("arch", "arch", color, texture)
    geometry = _solid(x, 0, z, (half, tall / 2, thick), 0.0, t.ARCH)
    geometry[t.HOLE], geometry[t.SPRING] = hole, -spring
    layout.add_row("arch", part, geometry, material(draws, color, texture, 0.8))
    return True


def _decal(layout: Layout, name: str, texture: str, wide: float, high: float, base: float) -> bool:
    """A rectangle painted on a wall, at a height above the floor where nothing stands before it."""
    draws = layout.draws
    if not layout.room_for("decal"):
        return False
    face = draws.weighted({t.LEFT: 0.3, t.RIGHT: 0.3, t.FRONT: 0.4})
    low, high_corner = layout.bounds
    if face == t.FRONT:
        along = draws.uniform(low[0] + wide, high_corner[0] - wide)
        center, half = [along, layout.depth], (wide, high, 0.01)
    else:
        along = draws.uniform(-0.6 * layout.depth, layout.depth - wide - 0.1)
        center = [float(low[0] if face == t.LEFT else high_corner[0]), along]
        half = (0.01, high, wide)
    if any(math.hypot(center[0] - a, center[1] - b) < wide + c for a, b, c in layout.footprints):
        return False
    layout.footprints.append((center[0], center[1], wide))
    color = _color(layout)
    part = layout.add_part(name, name, color, texture)
    geometry = _solid(center[0], base, center[1], half, 0.0, t.PLANE)
    geometry[t.NORMAL : t.NORMAL + 3] = layout.rows[face, t.NORMAL : t.NORMAL + 3].tolist()
    layout.add_row("decal", part, geometry, material(draws, color, texture))
    return True


def _door(layout: Layout) -> bool:
    draws = layout.draws
    return _decal(layout, "door", "panel", draws.uniform(0.42, 0.55), draws.uniform(0.98, 1.1), 0.0)


def _picture(layout: Layout) -> bool:
    draws = layout.draws
    wide, high = draws.uniform(0.4, 0.75), draws.uniform(0.3, 0.5)
    name = "shutter" if layout.courtyard else "picture"
    return _decal(layout, name, "panel", wide, high, draws.uniform(1.1, 1.4))


def _rug(layout: Layout) -> bool:
    draws = layout.draws
    if not layout.room_for("decal"):
        return False
    wide, deep = draws.uniform(0.7, 1.2), draws.uniform(0.8, 1.5)
    middle = (layout.bounds[0, 0] + layout.bounds[1, 0]) / 2
    z = draws.uniform(-0.4, 0.6) * layout.depth
    color, texture = _color(layout), draws.weighted({"plain": 0.5, "striped": 0.5})
    part = layout.add_part("rug", "rug", color, texture)
    geometry = _solid(middle + draws.uniform(-0.3, 0.3), -0.01, z, (wide, 0.01, deep), 0.0, t.PLANE)
    geometry[t.NORMAL : t.NORMAL + 3] = [0.0, -1.0, 0.0]
    layout.add_row("decal", part, geometry, material(draws, color, texture, 0.7))
    return True


_PLACERS: dict[str, Callable[[Layout], bool]] = {
    **{"box": _box, "cabinet": _cabinet, "table": _table, "sphere": _sphere, "lamp": _lamp},
    **{"barrel": _barrel, "columns": _columns, "arch": _arch, "door": _door},
    **{"picture": _picture, "rug": _rug},
}
_INDOORS = {
    **{"box": 1.0, "cabinet": 0.8, "table": 1.0, "sphere": 1.3, "lamp": 0.5, "barrel": 0.6},
    **{"columns": 1.0, "arch": 0.5, "door": 0.7, "picture": 0.7, "rug": 0.5},
}
_OUTDOORS = {
    **{"box": 1.0, "table": 0.4, "sphere": 1.3, "barrel": 1.0, "columns": 1.3, "arch": 0.8},
    **{"door": 0.9, "picture": 0.7},
}
