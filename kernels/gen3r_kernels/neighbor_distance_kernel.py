# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code=assignment
# (Triton kernels take pointers and numbers that no Python type describes; tuples grow in them.)
"""The kernel of `neighbor_distance`: one leaf of an index searches the tree for its 32 points.

neighbor_distance.py has the maths and the work, neighbor_index.py the tree.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INFINITY = tl.constexpr(0x7F800000)  # float32's, as bits: distances are compared as integers
# A box distance is off by a few roundings: what is nearer by less is visited.
_SHRINK = tl.constexpr(1.0 - 2.0**-18)


@triton.jit
def _insert(best, d, K: tl.constexpr):
    """The K least of K ordered values and one more, in order."""
    new = (tl.minimum(best[0], d),)
    for i in tl.static_range(1, K):
        new += (tl.minimum(best[i], tl.maximum(best[i - 1], d)),)
    return new


@triton.jit
def _load6(at, FAN: tl.constexpr):
    """High parts x, y, z and low parts of one entry of a tile [6 or 9, FAN]."""
    return (
        tl.load(at),
        tl.load(at + FAN),
        tl.load(at + 2 * FAN),
        tl.load(at + 3 * FAN),
        tl.load(at + 4 * FAN),
        tl.load(at + 5 * FAN),
    )


@triton.jit
def _squared(a, b):
    """Squared distance of points in two parts."""
    x = (a[0] - b[0]) + (a[3] - b[3])
    y = (a[1] - b[1]) + (a[4] - b[4])
    z = (a[2] - b[2]) + (a[5] - b[5])
    return x * x + y * y + z * z


@triton.jit
def _gap(a, b, half, axis: tl.constexpr):
    """Distance along an axis of a point from the slab of a box."""
    centre = (a[axis] - b[axis]) + (a[axis + 3] - b[axis + 3])
    return tl.maximum(tl.abs(centre) - half, 0.0)


@triton.jit
def _box_squared(a, half, at, FAN: tl.constexpr):
    """Squared distance of a point or box (centre a, half edges) from the boxes `at`, or less."""
    b = _load6(at, FAN)
    x = _gap(a, b, half[0] + tl.load(at + 6 * FAN), 0)
    y = _gap(a, b, half[1] + tl.load(at + 7 * FAN), 1)
    z = _gap(a, b, half[2] + tl.load(at + 8 * FAN), 2)
    return (x * x + y * y + z * z) * _SHRINK


@triton.jit
def _boxes(a, half, tiles, first, count, WIDTH: tl.constexpr, FAN: tl.constexpr):
    """Squared distances of WIDTH boxes from the own one, as bits; infinite past the last."""
    i = first + tl.arange(0, WIDTH)
    i = tl.minimum(i, count - 1)
    squared = _box_squared(a, half, tiles + i // FAN * (9 * FAN) + i % FAN, FAN)
    squared = squared.to(tl.int32, bitcast=True)
    return tl.where(first + tl.arange(0, WIDTH) < count, squared, _INFINITY)


@triton.jit
def _pop(bits, least, WIDTH: tl.constexpr):
    """A lane that holds `least`, and the values without it."""
    lane = tl.arange(0, WIDTH)
    child = tl.min(tl.where(bits == least, lane, WIDTH))
    return child, tl.where(lane == child, _INFINITY, bits)


@triton.jit
def _wanted(q, best, at, K: tl.constexpr, FAN: tl.constexpr):
    """Whether the box `at` is nearer to any query than its K-th neighbour."""
    near = _box_squared(q, (0.0, 0.0, 0.0), at, FAN) < best[K - 1]
    return tl.max(near.to(tl.int32)) > 0


@triton.jit
def _visit(q, best, at, K: tl.constexpr, FAN: tl.constexpr, STEP: tl.constexpr):
    """Insert the points of a leaf, STEP at a time."""
    for start in range(0, FAN, STEP):
        near = ()
        least = tl.full([FAN], float("inf"), tl.float32)
        for i in tl.static_range(STEP):
            d = _squared(q, _load6(at + start + i, FAN))
            least = tl.minimum(least, d)
            near += (d,)
        if tl.max((least < best[K - 1]).to(tl.int32)) > 0:
            for i in tl.static_range(STEP):
                if tl.max((near[i] < best[K - 1]).to(tl.int32)) > 0:
                    best = _insert(best, near[i], K)
    return best


# One kernel for all clouds: compiling it anew for counts divisible by 16 would take seconds.
@triton.jit(do_not_specialize=["count", "leaf_count", "node_count", "top_count"])
def neighbor_kernel(
    points,  # [leaves, 6, FAN]
    leaves,  # [leaf_count / FAN, 9, FAN] boxes
    nodes,  # [node_count / FAN, 9, FAN]
    tops,  # [top_count / FAN, 9, FAN]
    order,  # [N]
    mean,  # [N] float64
    farthest,  # [N] float64
    count,
    leaf_count,
    node_count,
    top_count,
    scale,
    K: tl.constexpr,
    FAN: tl.constexpr,
    TOP: tl.constexpr,
    STEP: tl.constexpr,
):
    own = tl.program_id(0)
    n = own * FAN + tl.arange(0, FAN)
    # Lanes past the last point repeat it.
    q = _load6(points + own * (6 * FAN) + tl.minimum(n, count - 1) % FAN, FAN)
    best = (tl.full([FAN], float("inf"), tl.float32),)
    for _ in tl.static_range(1, K):
        best += (tl.full([FAN], float("inf"), tl.float32),)
    best = _visit(q, best, points + own * (6 * FAN), K, FAN, STEP)
    limit = tl.max(best[K - 1].to(tl.int32, bitcast=True))

    at = leaves + own // FAN * (9 * FAN) + own % FAN
    centre = _load6(at, FAN)
    half = (tl.load(at + 6 * FAN), tl.load(at + 7 * FAN), tl.load(at + 8 * FAN))
    for first in range(0, top_count, TOP):
        top_bits = _boxes(centre, half, tops, first, top_count, TOP, FAN)
        top_least = tl.min(top_bits)
        while top_least < limit:
            child, top_bits = _pop(top_bits, top_least, TOP)
            top = first + child
            node_bits = _boxes(centre, half, nodes, top * FAN, node_count, FAN, FAN)
            node_least = tl.min(node_bits)
            while node_least < limit:
                child, node_bits = _pop(node_bits, node_least, FAN)
                node = top * FAN + child
                if _wanted(q, best, nodes + top * (9 * FAN) + child, K, FAN):
                    bits = _boxes(centre, half, leaves, node * FAN, leaf_count, FAN, FAN)
                    least = tl.min(bits)
                    while least < limit:
                        child, bits = _pop(bits, least, FAN)
                        leaf = node * FAN + child
                        wanted = _wanted(q, best, leaves + node * (9 * FAN) + child, K, FAN)
                        if (leaf != own) & wanted:
                            best = _visit(q, best, points + leaf * (6 * FAN), K, FAN, STEP)
                            limit = tl.max(best[K - 1].to(tl.int32, bitcast=True))
                        least = tl.min(bits)
                node_least = tl.min(node_bits)
            top_least = tl.min(top_bits)

    total = tl.zeros([FAN], tl.float64)
    for i in tl.static_range(K):
        total += tl.sqrt_rn(best[i]).to(tl.float64)
    row = tl.load(order + n, mask=n < count, other=0)
    tl.store(mean + row, total / K * scale, mask=n < count)
    last = tl.sqrt_rn(best[K - 1]).to(tl.float64)
    tl.store(farthest + row, last * scale, mask=n < count)
