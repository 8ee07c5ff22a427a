"""The distances of every point of a cloud to its k nearest: their mean and the farthest of them.

mean[i] = 1/k sum over the k least |p_i - p_j|, farthest[i] = the greatest of these, j = i included
(distance 0), as Open3D's and scipy's k-d trees count.

One program is one leaf of the index (neighbor_index.py): 32 points that lie close together, one a
lane of one warp. A lane holds its k least squared distances in order, in registers; a candidate is
the same point for all lanes. It is compared with the k-th distance of each, and where any lane
wants it all lanes insert it: new[i] = min(old[i], max(old[i - 1], d)), two operations a place and
none waits for another. The own leaf comes first; then the tree is descended, at each level the
nearest child first, by vectors of 32 box distances (32 lanes, 32 children), until the nearest child
left is farther than the farthest k-th distance of the leaf. Nodes and leaves that pass are tested
once more with the 32 points in place of their box: one stray point among 31 neighbours does not
make all of them visit what only the stray one needs.

Everything is exact, up to the rounding of float32 distances (2^-22 of each), whatever the density;
coinciding points end the search at once (nothing is nearer than 0). A query far from everything
finds the nearest leaf first and prunes by it. Points on a sphere around a query are the worst case:
all of them are compared once.

Work at 25 neighbours, counted on 49 frames of a synthetic room (15.0 M points, 470 k leaves): a
leaf visits 25 leaves (99 of 100: below 78, at most 343), compares 794 candidates at about 19
instructions a warp, inserts 212 at 50 (which issue every other cycle) and tests 75 boxes or vectors
of boxes at 35: 4e4 issue slots, 20 ms at the 9e11 a second of an H100. Measured: 29 ms. Reads stay
in the caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.dispatch import INTERPRETED, CompileCase
from gen3r_kernels.neighbor_distance_kernel import neighbor_kernel
from gen3r_kernels.neighbor_index import FAN, NeighborIndex, build_index

MAX_NEIGHBORS = 64  # distances that a lane keeps in registers
REFERENCE_PAIRS = 4_000_000  # pairs that the reference holds at a time


@dataclass(frozen=True)
class Config:
    """Boxes of the top level tested at once, candidates compared at once, warps, registers."""

    top: int
    step: int
    warps: int
    registers: int

    @classmethod
    def for_neighbors(cls, k: int) -> Config:
        """One warp: its lanes are the queries, and nothing waits for another warp.

        Steps of 2 and 8 cost 10 % and 5 % more on an H100. At 25 neighbours the compiler takes 114
        registers where 72 do without a spill: 33.1 and 29.0 ms at 15.0 M points.
        """
        registers = 64 if k <= 16 else 72 if k <= 32 else 168
        return cls(128, 4 if k <= 32 else 2, 1, registers)


@torch.library.custom_op("gen3r::neighbor_distance", mutates_args=())
def _neighbor_distance(
    points: Tensor,  # [L, 6, 32] float32, of a NeighborIndex as the rest
    leaves: Tensor,  # [L / 32, 9, 32] float32
    nodes: Tensor,  # [L / 32^2, 9, 32] float32
    tops: Tensor,  # [L / 32^3, 9, 32] float32
    order: Tensor,  # [N] int32
    counts: list[int],  # boxes of the three levels without padding
    scale: float,
    k: int,
) -> tuple[Tensor, Tensor]:  # mean, farthest [N] float64
    mean = torch.empty(len(order), dtype=torch.float64, device=points.device)
    farthest = torch.empty_like(mean)
    config = Config.for_neighbors(k)
    neighbor_kernel[(counts[0],)](
        *(points, leaves, nodes, tops, order, mean, farthest, len(order), *counts, scale),
        *(k, FAN, config.top, config.step),
        num_warps=config.warps,
        num_stages=1,
        maxnreg=config.registers,
    )
    return mean, farthest


@_neighbor_distance.register_fake
def _(
    points: Tensor,
    leaves: Tensor,
    nodes: Tensor,
    tops: Tensor,
    order: Tensor,
    counts: list[int],
    scale: float,
    k: int,
) -> tuple[Tensor, Tensor]:
    mean = points.new_empty(len(order), dtype=torch.float64)
    return mean, torch.empty_like(mean)


def neighbor_distance_reference(
    points: Tensor,  # [N, 3]
    k: int,
) -> tuple[Tensor, Tensor]:  # mean, farthest [N] float64
    """All pairs in float64, some rows at a time."""
    points = points.double()
    rows = max(1, REFERENCE_PAIRS // max(1, len(points)))
    nearest = [
        torch.cdist(part, points, compute_mode="donot_use_mm_for_euclid_dist")
        .topk(k, dim=1, largest=False)
        .values
        for part in points.split(rows)
    ]
    distances = torch.cat(nearest) if nearest else points.new_empty(0, k)
    return distances.mean(1), distances[:, -1]


def neighbor_distance(
    points: Tensor | NeighborIndex,  # [N, 3] float32 or float64, finite
    k: int,
    *,
    backends: Backends = DEFAULT_BACKENDS,
) -> tuple[Tensor, Tensor]:  # mean, farthest [N] float64
    """Mean of the distances to the k nearest points, itself included, and the farthest of them.

    CUDA tensors take the kernel, CPU tensors the reference, whose time grows with N^2. An index
    made by `build_index` serves several calls; it always takes the kernel.

    Raises
    ------
    ValueError : k below 1 or above N, above 64 on the Triton path, points not [N, 3].
    """
    if isinstance(points, Tensor) and (points.dim() != 2 or points.shape[1] != 3):
        raise ValueError(
            f"neighbor_distance: points of shape {tuple(points.shape)}; expected [N, 3]"
        )
    if not 1 <= k <= len(points):
        raise ValueError(f"neighbor_distance: k {k} must be in 1..{len(points)}, the points given")
    if isinstance(points, Tensor):
        if not _use_kernel(points, backends):
            return neighbor_distance_reference(points, k)
        points = build_index(points)
    if k > MAX_NEIGHBORS:
        raise ValueError(
            f"neighbor_distance: the kernel keeps at most {MAX_NEIGHBORS} neighbours, asked for "
            f"{k}; use operators='reference'"
        )
    leaves, nodes, tops = points.levels
    result: tuple[Tensor, Tensor] = torch.ops.gen3r.neighbor_distance(
        points.points,
        leaves.boxes,
        nodes.boxes,
        tops.boxes,
        points.order,
        [level.count for level in points.levels],
        points.scale,
        k,
    )
    return result


def _use_kernel(points: Tensor, backends: Backends) -> bool:
    if backends.operators == "triton" and not (points.is_cuda or INTERPRETED):
        raise ValueError(
            f"neighbor_distance: operators='triton' needs CUDA tensors, got one on "
            f"{points.device}; use operators='auto'"
        )
    return backends.operators == "triton" or (backends.operators == "auto" and points.is_cuda)


def compile_cases() -> list[CompileCase]:
    """Upstream's 25 neighbours, the nearest one and the most that registers hold."""
    pointers = {n: "*fp32" for n in ("points", "leaves", "nodes", "tops")}
    pointers |= {"order": "*i32", "mean": "*fp64", "farthest": "*fp64"}
    counts = ("count", "leaf_count", "node_count", "top_count")
    numbers = {name: "i32" for name in counts}
    cases = []
    for k in (2, 25, MAX_NEIGHBORS):
        config = Config.for_neighbors(k)
        cases.append(
            CompileCase(
                f"{k}-neighbours",
                neighbor_kernel,
                pointers | numbers | {"scale": "fp32"},
                {"K": k, "FAN": FAN, "TOP": config.top, "STEP": config.step},
                {
                    "num_warps": config.warps,
                    "num_stages": 1,
                    "maxnreg": config.registers,
                },
                tuple(pointers),
            )
        )
    return cases
