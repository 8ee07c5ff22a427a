"""The colour of a surface point: texture, lamp or sun with shadows, light from all around.

Textures are soft and fade where a pixel covers much of their period, so that a clip survives an
autoencoder and does not flicker: brightness changes by 10 to 25 %, joints mix in a second colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gen3r_training.procedural import table as t
from gen3r_training.procedural.trace import Vector, along, column, dot, is_blocked

SKY_ZENITH, SKY_HORIZON = (0.22, 0.42, 0.80), (0.62, 0.76, 0.92)  # linear light
_CORNER, _DARKENING = 0.45, 0.3  # metres around the room's edges, and how much darker they are
_CONTACT = 0.55  # share of the light from around that an object takes where it touches the floor
_SKIRTING = 0.11  # metres of the walls above the floor that are darker


def shade(
    rows: Tensor,  # [K, ROWS, COLUMNS]
    bounds: Tensor,  # [K, 2, 3]
    light: Tensor,  # [K, LIGHT_COLUMNS]
    origin: Vector,  # [K, 1, 1]
    direction: Vector,  # [K, S, R]
    distance: Tensor,  # [K, S, R]
    row: Tensor,  # uint8 [K, S, R]
    pixel: Tensor,  # [K, 1, 1] metres that a sample covers at distance 1
    used: Sequence[int],
) -> Tensor:  # [3, K, S, R] linear light
    """Light that comes back along every ray."""
    frames = torch.arange(len(rows), device=rows.device)[:, None, None] * t.ROWS
    # Columns first: what is read for one ray's neighbours lies side by side.
    surface = rows.flatten(0, 1).T.contiguous()[:, frames + row.int()].unbind(0)
    point = along(origin, direction, distance)
    local = _local(surface, point)
    normal, u, v = _normal_and_map(surface, local)
    facing = dot(normal, direction).abs()
    # Metres that a sample covers on the surface; the limit keeps floors from fading too early.
    slant = facing * torch.rsqrt(dot(direction, direction))
    width = distance * pixel / slant.clamp(min=0.3)
    tone, joint = _texture(surface, local, u, v, width)
    lit = _lamp(rows, bounds, light, point, normal, used)
    level = 0.5 - 0.5 * normal[1]  # 1 for what faces up
    reach = _corners(bounds, point, normal)
    reach = torch.where(row == t.FLOOR, reach * _contact(rows, point, used), reach)
    wall = (row < t.FACES) & (row != t.FLOOR) & (row != t.CEILING)
    tone = torch.where(wall & (point[1] > -_SKIRTING), 0.72 * tone, tone)
    colors = []
    for i in range(3):
        base = surface[t.COLOR + i]
        albedo = tone * (base + joint * (surface[t.SECOND + i] - base))
        above, below = (light[:, first + i, None, None] for first in (t.ABOVE, t.BELOW))
        around = (below + level * (above - below)) * reach
        colors.append(albedo * (around + lit * light[:, t.INTENSITY + i, None, None]))
    return torch.stack(colors)


def sky(direction: Vector) -> Tensor:  # [3, K, S, R] linear light
    """The sky by a ray's height."""
    up = (-direction[1] * torch.rsqrt(dot(direction, direction))).clamp(0, 1).sqrt()
    return torch.stack([h + up * (z - h) for z, h in zip(SKY_ZENITH, SKY_HORIZON, strict=True)])


def to_srgb(linear: Tensor) -> Tensor:
    """sRGB in [0, 1] of linear light (IEC 61966-2-1); above 0.7 it bends softly towards 1."""
    over = (linear - 0.7).clamp(min=0)
    linear = linear.clamp(0, 0.7) + 0.3 * (1 - torch.exp(-over / 0.3))
    return torch.where(
        linear <= 0.0031308,
        12.92 * linear,
        1.055 * linear.clamp(min=0.0031308).pow(1 / 2.4) - 0.055,
    )


def _local(surface: tuple[Tensor, ...], point: Vector) -> Vector:
    """The point in the axes of its primitive."""
    x, y, z = (p - surface[t.CENTER + i] for i, p in enumerate(point))
    cosine, sine = surface[t.COSINE], surface[t.SINE]
    return cosine * x - sine * z, y, sine * x + cosine * z


def _normal_and_map(
    surface: tuple[Tensor, ...], local: Vector
) -> tuple[Vector, Tensor, Tensor]:  # world normal, u and v in metres
    """Unit normals, and two coordinates along the surface."""
    x, y, z = local
    kind = surface[t.KIND]
    ratio = [(p / h).abs() for p, h in zip(local, surface[t.HALF : t.HALF + 3], strict=True)]
    plane, sphere, arch = kind == t.PLANE, kind == t.SPHERE, kind == t.ARCH
    round_ = (kind == t.CYLINDER) & ((x.square() + z.square()) > (0.999 * surface[t.HALF]).square())
    # Boxes, a cylinder's ends and an arch's outside: the axis along which the point is outermost.
    across = (ratio[0] >= ratio[1]) & (ratio[0] >= ratio[2])
    upright = (ratio[1] > ratio[0]) & (ratio[1] >= ratio[2])
    upright = torch.where(kind == t.CYLINDER, ~round_, upright)
    across = across & (kind != t.CYLINDER)
    nx = torch.where(across, x.sign(), 0.0)
    ny = torch.where(upright, y.sign(), 0.0)
    nz = torch.where(across | upright, 0.0, z.sign())
    # Inside an arch's hole: towards its axis.
    above = (y + surface[t.CENTER + 1] - surface[t.SPRING]).clamp(max=0)
    hole = arch & (torch.maximum(torch.maximum(ratio[0], ratio[1]), ratio[2]) < 0.999)
    bend = torch.rsqrt((x.square() + above.square()).clamp(min=1e-12))
    nx, ny, nz = (
        torch.where(hole, value, n)
        for value, n in ((-x * bend, nx), (-above * bend, ny), (torch.zeros_like(z), nz))
    )
    radial = torch.rsqrt((x.square() + z.square() + sphere * y.square()).clamp(min=1e-12))
    bent = sphere | round_
    nx, nz = torch.where(bent, x * radial, nx), torch.where(bent, z * radial, nz)
    ny = torch.where(bent, sphere * y * radial, ny)
    angle = torch.atan2(x, z) * surface[t.HALF]
    cosine, sine = surface[t.COSINE], surface[t.SINE]
    normal = (
        torch.where(plane, surface[t.NORMAL], cosine * nx + sine * nz),
        torch.where(plane, surface[t.NORMAL + 1], ny),
        torch.where(plane, surface[t.NORMAL + 2], cosine * nz - sine * nx),
    )
    steep = torch.where(plane, normal[1], ny).abs() > 0.7
    sideways = torch.where(plane, normal[0], nx).abs() > 0.7
    u = torch.where(bent, angle, torch.where(sideways & ~steep, z, x))
    v = torch.where(steep & ~bent, z, y)
    return normal, u, v


def _texture(
    surface: tuple[Tensor, ...], local: Vector, u: Tensor, v: Tensor, width: Tensor
) -> tuple[Tensor, Tensor]:  # factor on the colour, share of the second colour
    """Brightness and joints of every material, and the point's own chosen."""
    period, phase, strength = surface[t.PERIOD], surface[t.PHASE], surface[t.STRENGTH]
    kind = surface[t.TEXTURE]
    fade = (1.5 - 3 * width / period).clamp(0, 1) * strength
    cloud = _cloud(local, period, phase)

    def is_(name: str) -> Tensor:
        return kind == t.TEXTURES.index(name)

    brick, plank, tile, checkered = (is_(n) for n in ("brick", "plank", "tile", "checkered"))
    # One grid for all: bricks are half as high as wide and every second row is shifted, planks run
    # without end, tiles and checks are square, stripes are upright.
    rows = torch.where(brick, 2 * v / period, torch.where(plank, v / (8 * period), v / period))
    row = torch.floor(rows)
    columns = u / period + torch.where(brick, 0.5 * (row % 2), torch.where(plank, 0.37 * row, 0.0))
    cell = torch.floor(columns)
    across, down = columns - cell, rows - row
    edge_u = (0.5 - (across - 0.5).abs()) * period
    edge_v = (0.5 - (down - 0.5).abs()) * torch.where(brick, 0.5 * period, period)
    edge = torch.where(plank, edge_u, torch.minimum(edge_u, edge_v))
    gap = torch.where(plank, 0.012, torch.where(brick, 0.03, 0.022))
    line = ((gap - edge) / width + 0.5).clamp(0, 1) * (gap / width).clamp(max=1)
    joint = torch.where(brick | plank | tile, 0.8 * line, torch.zeros_like(line))
    random = torch.sin(12.9898 * cell + 78.233 * row * (~plank) + phase)
    even = 1 - 2 * ((cell + row) % 2)
    stripe = (6 * torch.sin(2 * math.pi * columns)).clamp(-1, 1)
    vein = 1 - (torch.sin(2.2 * (local[0] + local[1] + local[2]) / period * 2 + 2.5 * cloud)).abs()
    tone = torch.where(brick | plank | tile, random, cloud)
    tone = torch.where(checkered, even, tone)
    tone = torch.where(is_("striped"), stripe, tone)
    tone = torch.where(is_("marble"), 0.6 - 2.2 * vein.square(), tone)
    half = [h - p.abs() for p, h in zip(local, surface[t.HALF : t.HALF + 3], strict=True)]
    frame = torch.minimum(torch.where(surface[t.NORMAL].abs() > 0.5, half[2], half[0]), half[1])
    tone = torch.where(is_("panel"), (12 * (0.10 - frame)).clamp(-1, 1), tone)
    return 1 + fade * tone, joint


def _cloud(local: Vector, period: Tensor, phase: Tensor) -> Tensor:
    """Smooth noise in about [-1, 1]: three plane waves, each bent by the one before."""
    x, y, z = (2 * math.pi / period * p for p in local)
    first = torch.sin(0.8 * x + 0.5 * y - 0.6 * z + phase)
    second = torch.sin(0.9 * z - 0.7 * x + 0.4 * y + 2 * phase + first)
    return 0.5 * second + 0.5 * torch.sin(1.1 * y + 0.6 * (z - x) + 3 * phase + second)


def _lamp(
    rows: Tensor,
    bounds: Tensor,
    light: Tensor,
    point: Vector,
    normal: Vector,
    used: Sequence[int],
) -> Tensor:  # [K, S, R]
    """Share of the lamp's or the sun's light that the point sends back, with its shadow.

    The samples of a pixel look at different points of the lamp: their mean is a soft shadow.
    """
    sun = light[:, t.SUN, None, None] > 0.5
    shifts = _shifts(point[0].shape[1], point[0])
    lamp = [
        light[:, t.LIGHT + i, None, None] + light[:, t.RADIUS, None, None] * shifts[i]
        for i in range(3)
    ]
    x, y, z = (torch.where(sun, at, at - p) for at, p in zip(lamp, point, strict=True))
    towards = (x, y, z)
    square = dot(towards, towards)
    cosine = dot(normal, towards) * torch.rsqrt(square)
    start = along(point, normal, torch.full_like(square, 2e-3))
    reach = torch.where(sun, math.inf, 0.999)
    blocked = is_blocked(rows, start, towards, reach, used)
    # The sun comes over the walls: where the ray is as high as they are it must be inside.
    rise = (bounds[:, 0, 1, None, None] - point[1]) / towards[1].clamp(max=-1e-3)
    for axis in (0, 2):
        at = point[axis] + rise * towards[axis]
        low, high = (bounds[:, end, axis, None, None] for end in (0, 1))
        blocked = blocked | (sun & ((at < low) | (at > high)))
    falling = torch.where(sun, 1.0, 1.0 / (1.0 + square / 12.0))
    return torch.where(blocked, 0.0, cosine.clamp(min=0) * falling)


def _shifts(samples: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [1, S, 1] each
    """Points of a ball's equator, one a sample; the middle for one sample."""
    angle = torch.arange(samples, device=like.device, dtype=like.dtype) * (2 * math.pi / samples)
    radius = 1.0 if samples > 1 else 0.0
    flat = (radius * angle.cos()[None, :, None], radius * angle.sin()[None, :, None])
    return flat[0], torch.zeros_like(flat[0]), flat[1]


def _contact(rows: Tensor, point: Vector, used: Sequence[int]) -> Tensor:
    """How much of the light from around reaches the floor beside and below what stands on it."""
    share = torch.ones_like(point[0])
    for row in (i for i in used if t.FIRST_BOX <= i < t.FIRST_ARCH):
        x = point[0] - column(rows, row, t.CENTER)
        z = point[2] - column(rows, row, t.CENTER + 2)
        half = [column(rows, row, t.HALF + i) for i in range(3)]
        if row < t.FIRST_SPHERE:
            cosine, sine = column(rows, row, t.COSINE), column(rows, row, t.SINE)
            across = ((cosine * x - sine * z).abs() - half[0]).clamp(min=0)
            along = ((sine * x + cosine * z).abs() - half[2]).clamp(min=0)
            away = (across.square() + along.square()).sqrt()
        else:
            stands = 1.0 if row >= t.FIRST_CYLINDER else 0.4  # a ball touches in one point
            away = ((x.square() + z.square()).sqrt() - stands * half[0]).clamp(min=0)
        gap = -(column(rows, row, t.CENTER + 1) + half[1]).clamp(max=0)  # below its lower side
        dark = torch.where(half[0] > 0, _CONTACT * torch.exp(-gap / 0.4), 0.0)
        share = share * (1 - dark * torch.exp(-away / 0.16))
    return share


def _corners(bounds: Tensor, point: Vector, normal: Vector) -> Tensor:
    """How much of the light from around reaches a point near the room's edges."""
    share = torch.ones_like(point[0])
    for i, p in enumerate(point):
        near = torch.minimum(p - bounds[:, 0, i, None, None], bounds[:, 1, i, None, None] - p)
        dark = _DARKENING * torch.exp(-near.clamp(min=0) / _CORNER) * (1 - normal[i].abs())
        share = share * (1 - dark)
    return share
