"""Rays against the primitives of a scene table, batched over frames: exact distances.

Every ray meets every primitive in closed form (slabs, quadrics; the arch is a box less a convex
hole). Rays are three tensors (x, y, z) of shape [K, ...] for K frames, which elementwise operations
join with the K rows of a primitive's numbers, so that no operation is smaller than the chunk and no
result depends on what else is in it. A direction need not have length one: distances are in its
lengths, hence depth itself for directions with one unit along the optical axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gen3r_training.procedural import table as t

Vector = tuple[Tensor, Tensor, Tensor]
NEAREST = 1e-3  # of a direction's length: what is closer is the surface that the ray comes from
_TINY = 1e-20
_FLAT = 1e-18  # least squared length of a direction across an axis


def first_hits(
    rows: Tensor,  # [K, ROWS, COLUMNS]
    bounds: Tensor,  # [K, 2, 3]
    origin: Vector,  # [K, 1, 1] or as the directions
    direction: Vector,  # [K, S, R]
    used: Sequence[int],
) -> tuple[Tensor, Tensor]:  # distance [K, S, R], row [K, S, R] uint8
    """The nearest surface along every ray; origins are inside the room.

    used : the rows that any of the scenes uses; the others are not tried
    """
    distance, row = _shell(bounds, origin, direction)
    for index, reach in _solids(rows, origin, direction, used):
        nearer = reach < distance
        distance = torch.where(nearer, reach, distance)
        row.masked_fill_(nearer, index)
    return distance, _decals(rows, origin, direction, distance, row, used)


def is_blocked(
    rows: Tensor,  # [K, ROWS, COLUMNS]
    origin: Vector,  # [K, S, R]
    direction: Vector,  # [K, S, R]
    reach: Tensor | float,
    used: Sequence[int],
) -> Tensor:  # bool [K, S, R]
    """Whether anything inside the room is met before `reach` lengths of the direction."""
    blocked = torch.zeros_like(direction[0], dtype=torch.bool)
    for _, distance in _solids(rows, origin, direction, used):
        blocked |= distance < reach
    return blocked


def column(rows: Tensor, row: int, index: int) -> Tensor:
    """A primitive's number for every frame, [K, 1, 1]."""
    return rows[:, row, index, None, None]


def along(origin: Vector, direction: Vector, distance: Tensor) -> Vector:
    """The points at these distances."""
    x, y, z = (o + distance * d for o, d in zip(origin, direction, strict=True))
    return x, y, z


def dot(a: Vector, b: Vector) -> Tensor:
    """The scalar product."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _shell(bounds: Tensor, origin: Vector, direction: Vector) -> tuple[Tensor, Tensor]:
    """The room from inside: the first of three walls ahead."""
    distance = torch.full_like(direction[0], math.inf)
    row = torch.zeros_like(direction[0], dtype=torch.uint8)
    for axis, (o, d) in enumerate(zip(origin, direction, strict=True)):
        low, high = (bounds[:, end, axis, None, None] for end in (0, 1))
        ahead = d > 0
        reach = (torch.where(ahead, high, low) - o) / _not_zero(d)
        nearer = reach < distance
        distance = torch.where(nearer, reach, distance)
        row = torch.where(nearer, ahead.to(torch.uint8) + 2 * axis, row)
    return distance, row


def _not_zero(d: Tensor) -> Tensor:
    """Zero becomes tiny; what is not tiny keeps every bit."""
    return d + _TINY


def _solids(
    rows: Tensor, origin: Vector, direction: Vector, used: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Row and distance (infinite where it is not met) of every box, sphere, cylinder and arch.

    Sides are entered from outside only: no camera and no lit point is inside of one.
    """
    inverse = tuple(1.0 / _not_zero(d) for d in direction)
    flat = direction[0].square() + direction[2].square()
    length = flat + direction[1].square()
    flat = flat.clamp(min=_FLAT)
    for row in used:
        if t.FIRST_BOX <= row < t.FIRST_SPHERE:
            yield row, _box(rows, row, origin, direction, inverse[1])
        elif t.FIRST_SPHERE <= row < t.FIRST_CYLINDER:
            yield row, _sphere(rows, row, origin, direction, length)
        elif t.FIRST_CYLINDER <= row < t.FIRST_ARCH:
            yield row, _cylinder(rows, row, origin, direction, flat, inverse[1])
        elif row >= t.FIRST_ARCH:
            yield row, _arch(rows, row, origin, direction, inverse)


def _slab(offset: Tensor, half: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Where a ray enters and leaves |x| <= half; offset: of its origin. Empty for half < 0."""
    middle, width = inverse * offset, inverse.abs() * half
    return -middle - width, width - middle


def _entered(near: Tensor, far: Tensor) -> Tensor:
    """`near`, overwritten by infinity where nothing is met."""
    return near.masked_fill_((near >= far) | (near <= NEAREST), math.inf)


def _box(rows: Tensor, row: int, origin: Vector, direction: Vector, up: Tensor) -> Tensor:
    cosine, sine = column(rows, row, t.COSINE), column(rows, row, t.SINE)
    x, y, z = (origin[i] - column(rows, row, t.CENTER + i) for i in range(3))
    # Into the box's own axes: the transpose of a turn about y.
    dx = cosine * direction[0] - sine * direction[2]
    dz = sine * direction[0] + cosine * direction[2]
    half = [column(rows, row, t.HALF + i) for i in range(3)]
    near, far = _slab(y, half[1], up)
    for o, d, h in (
        (cosine * x - sine * z, dx, half[0]),
        (sine * x + cosine * z, dz, half[2]),
    ):
        enter, leave = _slab(o, h, 1.0 / _not_zero(d))
        near, far = torch.maximum(near, enter), torch.minimum(far, leave)
    return _entered(near, far)


def _sphere(rows: Tensor, row: int, origin: Vector, direction: Vector, length: Tensor) -> Tensor:
    x, y, z = (origin[i] - column(rows, row, t.CENTER + i) for i in range(3))
    radius = column(rows, row, t.HALF)
    b = direction[0] * x + direction[1] * y + direction[2] * z
    # radius |radius|: an unused row (radius -1) has no real root.
    inside = b.square() - length * (x.square() + y.square() + z.square() - radius * radius.abs())
    near = (-b - inside.clamp(min=0).sqrt()) / length
    return near.masked_fill_((inside <= 0) | (near <= NEAREST), math.inf)


def _circle(
    u: Tensor, v: Tensor, radius: Tensor, du: Tensor, dv: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # where a ray enters, leaves, and whether it does
    b = du * u + dv * v
    inside = b.square() - length * (u.square() + v.square() - radius * radius.abs())
    root = inside.clamp(min=0).sqrt()
    return (-b - root) / length, (root - b) / length, inside > 0


def _cylinder(
    rows: Tensor, row: int, origin: Vector, direction: Vector, flat: Tensor, up: Tensor
) -> Tensor:
    x, y, z = (origin[i] - column(rows, row, t.CENTER + i) for i in range(3))
    enter, leave, meets = _circle(x, z, column(rows, row, t.HALF), direction[0], direction[2], flat)
    near, far = _slab(y, column(rows, row, t.HALF + 1), up)
    near, far = torch.maximum(near, enter), torch.minimum(far, leave)
    return _entered(near, far).masked_fill_(~meets, math.inf)


def _arch(
    rows: Tensor,
    row: int,
    origin: Vector,
    direction: Vector,
    inverse: tuple[Tensor, ...],
) -> Tensor:
    """A box along the axes less a hole through z: below SPRING of straight sides, above round.

    Both pieces of the hole and their union are convex: a ray is in it from the first entry to the
    last exit.
    """
    x, y, z = (origin[i] - column(rows, row, t.CENTER + i) for i in range(3))
    near, far = _slab(x, column(rows, row, t.HALF), inverse[0])
    for i, o in ((1, y), (2, z)):
        enter, leave = _slab(o, column(rows, row, t.HALF + i), inverse[i])
        near, far = torch.maximum(near, enter), torch.minimum(far, leave)
    radius, spring = column(rows, row, t.HOLE), column(rows, row, t.SPRING)
    above = origin[1] - spring
    enter, leave = _slab(x, radius, inverse[0])
    crossing = -above * inverse[1]
    down = direction[1] > 0
    enter = torch.maximum(enter, torch.where(down, crossing, -math.inf))
    leave = torch.minimum(leave, torch.where(down, math.inf, crossing))
    length = (direction[0].square() + direction[1].square()).clamp(min=_FLAT)
    first, last, meets = _circle(x, above, radius, direction[0], direction[1], length)
    straight = enter < leave
    hole = torch.minimum(
        torch.where(straight, enter, math.inf), torch.where(meets, first, math.inf)
    )
    end = torch.maximum(
        torch.where(straight, leave, -math.inf), torch.where(meets, last, -math.inf)
    )
    outside = (near > NEAREST) & ((near < hole) | (near > end))
    within = torch.where((end > NEAREST) & (end >= near) & (end < far), end, math.inf)
    return torch.where(near < far, torch.where(outside, near, within), math.inf)


def _decals(
    rows: Tensor,
    origin: Vector,
    direction: Vector,
    distance: Tensor,
    row: Tensor,
    used: Sequence[int],
) -> Tensor:
    """Rows of rectangles painted on the walls, where the shell is hit inside of one."""
    point = along(origin, direction, distance)
    shell = row < t.FACES
    for index in (i for i in used if t.FIRST_DECAL <= i < t.FIRST_BOX):
        inside = shell
        for i, p in enumerate(point):
            offset = (p - column(rows, index, t.CENTER + i)).abs()
            inside = inside & (offset <= column(rows, index, t.HALF + i))
        row = row.masked_fill(inside, index)
    return row
