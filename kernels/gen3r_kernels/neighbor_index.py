"""Points sorted along a space-filling curve, in leaves of 32 with a tree of bounding boxes above.

What `neighbor_distance` searches. The sort brings neighbours together; 32 points in a row make a
leaf, 32 leaves a node, 32 nodes a top node, each with its box. Nothing is linked: child `c` of node
`n` is number `32 n + c` of the level below.

Coordinates are moved to the median of the cloud, scaled by a power of two into [-1, 1] and kept as
two float32 numbers, high and low part: differences of two such points are right to 2^-47 of their
distance from the median, so that distances are as good as float32 is wherever the cloud is not
dense beyond that, without the float64 units that most GPUs lack.

The first grid has 2^21 cells an edge. One far point makes all other points share a few cells, and
so does a dense cluster in a wide cloud: runs of more than `RUN` points in one cell are sorted anew
in grids of their own, 2^13 cells around the points of each run, until no such run is left or its
points coincide.

Costs at 15.4 M points: the sort of 64-bit keys, about 10 ms, and the gathers; 28 bytes a point are
kept, about 90 are needed while it is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gen3r_kernels.hilbert_key import MAX_BITS, hilbert_key

FAN = 32  # points of a leaf, children of a node: one a lane of a warp
RUN = 64  # points that may share a cell
FINER_BITS = 13
ROUNDS = 12  # of refinement: 21 + 12 * 13 bits are more than float64 coordinates tell apart
MAX_POINTS = 2**28
SAMPLE = 4096  # points whose median is taken for the middle
FAR = 1e18  # where padding lies; its square is finite


@dataclass(frozen=True)
class Level:
    """The boxes of one level of the tree, in tiles of 32, the last padded.

    boxes : [B / 32, 9, 32] float32: centre high parts x, y, z, centre low parts, half edges
        (rounded up)
    count : boxes without the padding
    """

    boxes: Tensor
    count: int


@dataclass(frozen=True)
class NeighborIndex:
    """A cloud ready to be searched.

    order : [N] int32, the input row of each sorted point
    points : [L, 6, 32] float32: high parts x, y, z and low parts of the sorted points of each leaf,
        the last padded with points far away
    levels : leaves, nodes and top nodes
    scale : unit of length of the input per unit here, a power of two
    """

    order: Tensor
    points: Tensor
    levels: tuple[Level, Level, Level]
    scale: float

    def __len__(self) -> int:
        return len(self.order)


def build_index(
    points: Tensor,  # [N, 3] float32 or float64, finite, N >= 1
) -> NeighborIndex:
    """Sort the points and box them. CUDA tensors, or CPU ones under Triton's interpreter.

    Raises
    ------
    ValueError : no points, another shape or dtype, coordinates that are not finite.
    """
    if points.dim() != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"build_index: points {tuple(points.shape)}; expected [N, 3] with N >= 1")
    if points.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"build_index: {points.dtype} points; expected float32 or float64")
    if len(points) > MAX_POINTS:
        raise ValueError(
            f"build_index: {len(points)} points; at most {MAX_POINTS} fit 32-bit offsets: give the "
            "cloud in parts"
        )
    points = points.double().contiguous()
    low, high = points.amin(0), points.amax(0)
    # Not the middle of the corners: one far point would take the others' last digits.
    middle = points[:: -(-len(points) // SAMPLE)].median(0).values
    reach = float(torch.maximum(high - middle, middle - low).max())
    if not math.isfinite(reach):
        raise ValueError(
            f"build_index: corners {low.tolist()} and {high.tolist()}; drop points that are not "
            "finite or too far to subtract first"
        )
    # A cloud of one place has no size: any scale does.
    exponent = math.frexp(reach)[1] if reach > 0 else 0
    order = curve_order(points, low, high)
    coordinates, levels = _boxed(points, order, middle, math.ldexp(1.0, -exponent))
    return NeighborIndex(order.int(), coordinates, levels, math.ldexp(1.0, exponent))


def curve_order(
    points: Tensor,  # [N, 3] float64
    low: Tensor,  # [3] least corner
    high: Tensor,  # [3] greatest corner
) -> Tensor:  # [N] int64
    """The rows in the order of the curve; runs of points in one cell are refined."""
    rows = torch.arange(len(points), device=points.device)
    groups = torch.zeros(len(points), dtype=torch.int32, device=points.device)
    corner = low[None].contiguous()
    keys = hilbert_key(points, rows, groups, corner, _cells(high - low, MAX_BITS)[None], MAX_BITS)
    del groups
    keys, order = torch.sort(keys)
    where = rows  # sorted positions that `keys` belongs to
    for _ in range(ROUNDS):
        if len(keys) <= RUN or not bool((keys[RUN:] == keys[:-RUN]).any()):
            break
        where, groups, corner, cells = _long_runs(points, order, where, keys)
        if len(where) == 0:
            break
        wanted = order[where]
        keys = hilbert_key(points, wanted, groups, corner, cells, FINER_BITS)
        keys, permutation = torch.sort(keys)
        order[where] = wanted[permutation]
    return order


def _cells(extent: Tensor, bits: int) -> Tensor:
    """Cells a unit of length of grids [..., 3] around the extents; 0 for extents of 0."""
    longest = extent.amax(-1)
    return torch.where(longest > 0, 2**bits / longest, torch.zeros_like(longest))


def _long_runs(
    points: Tensor,  # [N, 3]
    order: Tensor,  # [N]
    where: Tensor,  # [n] positions in order
    keys: Tensor,  # [n] sorted
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions in runs of more than RUN equal keys that do not coincide; run, corner, cells."""
    _, run, lengths = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    long = lengths > RUN
    kept = long[run]
    where, lengths = where[kept], lengths[long]
    corners = []
    for column in points.T:  # one at a time: the clouds are large
        run_points = column[order[where]]
        corners.append(
            [torch.segment_reduce(run_points, r, lengths=lengths) for r in ("min", "max")]
        )
    low, high = (torch.stack(c, dim=1) for c in zip(*corners, strict=True))
    cells = _cells(high - low, FINER_BITS)
    wide = cells > 0
    group = torch.arange(len(lengths), device=keys.device).repeat_interleave(lengths)
    kept = wide[group]
    number = (wide.cumsum(0) - 1).int()
    return where[kept], number[group[kept]], low[wide].contiguous(), cells[wide]


def _boxed(
    points: Tensor,  # [N, 3] float64
    order: Tensor,  # [N]
    middle: Tensor,  # [3]
    scale: float,
) -> tuple[Tensor, tuple[Level, Level, Level]]:
    """The sorted points in two parts, and the boxes of the three levels."""
    count = len(order)
    leaves = -(-count // FAN)
    padded = torch.full((leaves * FAN,), int(order[-1]), device=order.device)
    padded[:count] = order
    coordinates = torch.empty(leaves, 6, FAN, device=points.device)
    corners: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
    for axis in range(3):
        x = ((points[:, axis][padded] - middle[axis]) * scale).view(leaves, FAN)
        coordinates[:, axis] = x
        coordinates[:, axis + 3] = x - coordinates[:, axis]
        x = coordinates[:, axis].double() + coordinates[:, axis + 3]  # as the search sees it
        low = high = x.flatten()
        for level in corners:
            low, high = _by_32(low).amin(1), _by_32(high).amax(1)
            level.append((low, high))
    coordinates[-1, :3, count - (leaves - 1) * FAN :] = FAR
    first, second, third = (_level(level) for level in corners)
    return coordinates, (first, second, third)


def _by_32(x: Tensor) -> Tensor:
    """[n] as [n / 32, 32], the last value repeated to fill the last row."""
    missing = -len(x) % FAN
    return (torch.cat([x, x[-1:].expand(missing)]) if missing else x).view(-1, FAN)


def _level(corners: list[tuple[Tensor, Tensor]]) -> Level:
    count = len(corners[0][0])
    boxes = torch.zeros(9, count + -count % FAN, device=corners[0][0].device)
    for axis, (low, high) in enumerate(corners):
        centre = (low + high) / 2
        boxes[axis, :count] = centre
        boxes[axis + 3, :count] = centre - boxes[axis, :count]
        centre = boxes[axis, :count].double() + boxes[axis + 3, :count]
        # Rounding to float32 and the search's own differences are off by less than 2^-21 of it.
        boxes[axis + 6, :count] = torch.maximum(high - centre, centre - low) * (1 + 2.0**-20)
    return Level(boxes.view(9, -1, FAN).transpose(0, 1).contiguous(), count)
