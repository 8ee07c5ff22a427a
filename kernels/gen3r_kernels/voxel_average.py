# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""Points to one mean point, colour and normal for every occupied cell of a grid.

cell = floor((p - least corner) / voxel_size), key = (x * sides_y + y) * sides_z + z: a stable sort
by key brings the points of a cell together in their given order, and one lane adds them up in
float64 in that order, as numpy's bincount does (colours as whole numbers). Cells with more than
`PART` points are cut into parts, and the parts' sums added afterwards: one crowded cell delays
nobody, and the result does not depend on the run.

Bytes a point: 24 of coordinates, twice 8 of key, 8 of row, and 27 gathered (39 with normals); the
sort passes over keys and rows several times: 15.4 M points take about 10 ms on an H100, the sums 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.dispatch import INTERPRETED, CompileCase

PART = 64  # points that one lane adds up
MAX_CELLS = 2.0**62  # of the bounding box: keys are signed 64-bit numbers


@triton.jit
def _add(sums, values, row, inside):
    """The three sums plus the rows of values [N, 3], in the sums' type."""
    at = values + row * 3
    return (
        sums[0] + tl.load(at, mask=inside, other=0).to(sums[0].dtype),
        sums[1] + tl.load(at + 1, mask=inside, other=0).to(sums[1].dtype),
        sums[2] + tl.load(at + 2, mask=inside, other=0).to(sums[2].dtype),
    )


# One kernel for all clouds: compiling it anew for counts divisible by 16 would take seconds.
@triton.jit(do_not_specialize=["parts"])
def _sums_kernel(
    points,  # [N, 3] float64
    colors,  # [N, 3] bytes
    normals,  # [N, 3] float32, or anything without NORMALS
    order,  # [N] int64: rows sorted by cell
    begin,  # [P] first place in order of each part
    length,  # [P]
    sums,  # [C, P] float64, C = 6, or 9 with normals
    parts,
    NORMALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(begin + p, mask=p < parts, other=0)
    count = tl.load(length + p, mask=p < parts, other=0)
    zero, none = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.int32)
    xyz, rgb, direction = (zero, zero, zero), (none, none, none), (zero, zero, zero)
    for i in range(tl.max(count)):
        row = tl.load(order + first + i, mask=i < count, other=0)
        xyz = _add(xyz, points, row, i < count)
        rgb = _add(rgb, colors, row, i < count)
        if NORMALS:
            direction = _add(direction, normals, row, i < count)
    out = sums + p
    for axis in tl.static_range(3):
        tl.store(out + axis * parts.to(tl.int64), xyz[axis], mask=p < parts)
        tl.store(out + (3 + axis) * parts.to(tl.int64), rgb[axis], mask=p < parts)
        if NORMALS:
            tl.store(out + (6 + axis) * parts.to(tl.int64), direction[axis], mask=p < parts)


@dataclass(frozen=True)
class Config:
    """Parts (a lane each) and warps of one program."""

    block: int
    warps: int

    @classmethod
    def for_parts(cls, interpreted: bool = INTERPRETED) -> Config:
        """One warp: a program lasts as long as its longest part. The interpreter wants few."""
        return cls(1024 if interpreted else 32, 1)


@torch.library.custom_op("gen3r::voxel_sums", mutates_args=())
def _voxel_sums(
    points: Tensor,  # [N, 3] float64, contiguous as all
    colors: Tensor,  # [N, 3] uint8
    normals: Tensor | None,  # [N, 3] float32
    order: Tensor,  # [N] int64
    begin: Tensor,  # [P] int64
    length: Tensor,  # [P] int64
) -> Tensor:  # [6 or 9, P] float64
    given = (points, colors) if normals is None else (points, colors, normals)
    dtypes = (torch.float64, torch.uint8, torch.float32)
    for tensor, dtype in zip(given, dtypes, strict=False):
        if tensor.shape != points.shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"voxel_average: {tuple(tensor.shape)} of {tensor.dtype}; expected contiguous "
                f"{tuple(points.shape)} of {dtype}"
            )
    sums = torch.empty(3 * len(given), len(begin), dtype=torch.float64, device=points.device)
    config = Config.for_parts()
    _sums_kernel[(triton.cdiv(len(begin), config.block),)](
        *(points, colors, points if normals is None else normals, order, begin, length, sums),
        *(len(begin), normals is not None, config.block),
        num_warps=config.warps,
    )
    return sums


@_voxel_sums.register_fake
def _(
    points: Tensor,
    colors: Tensor,
    normals: Tensor | None,
    order: Tensor,
    begin: Tensor,
    length: Tensor,
) -> Tensor:
    return points.new_empty(6 if normals is None else 9, len(begin))


def cell_keys(
    points: Tensor,  # [N, 3] float64
    voxel_size: float,
) -> Tensor:  # [N] int64
    """The number of each point's cell, x before y before z.

    Raises
    ------
    ValueError : more than 2^62 cells in the bounding box.
    """
    low, high = points.amin(0), points.amax(0)
    extent = ((high - low) / voxel_size).floor() + 1
    if not float(extent.prod()) < MAX_CELLS:
        raise ValueError(
            f"voxel_size {voxel_size} cuts a cloud of extent {(extent * voxel_size).tolist()} into "
            "more than 2^62 cells; remove far points or use larger voxels"
        )
    key = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for axis, side in enumerate(extent.long()):
        key = key * side + ((points[:, axis] - low[axis]) / voxel_size).floor().long()
    return key


def _sums(
    points: Tensor, colors: Tensor, normals: Tensor | None, order: Tensor, counts: Tensor
) -> Tensor:  # [6 or 9, M]
    """The kernel's sums of parts, added up for cells that have more than one."""
    first = counts.cumsum(0) - counts
    pieces = (counts + (PART - 1)) // PART
    total = int(pieces.sum())
    if total == len(counts):
        result: Tensor = torch.ops.gen3r.voxel_sums(points, colors, normals, order, first, counts)
        return result
    cell = torch.arange(len(counts), device=counts.device).repeat_interleave(pieces)
    number = torch.arange(total, device=counts.device) - (pieces.cumsum(0) - pieces)[cell]
    begin = first[cell] + PART * number
    length = (counts[cell] - PART * number).clamp(max=PART)
    parts = torch.ops.gen3r.voxel_sums(points, colors, normals, order, begin, length)
    sums = parts[:, number == 0]
    crowded = pieces > 1
    inside = crowded[cell]
    for row, part in zip(sums, parts, strict=True):
        row[crowded] = torch.segment_reduce(part[inside], "sum", lengths=pieces[crowded])
    return sums


def _sums_reference(
    points: Tensor, colors: Tensor, normals: Tensor | None, order: Tensor, counts: Tensor
) -> Tensor:  # [6 or 9, M]
    columns = [points, colors.double(), *([] if normals is None else [normals.double()])]
    cell = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    values = torch.cat(columns, dim=1)[order]
    return values.new_zeros(len(counts), values.shape[1]).index_add_(0, cell, values).T


def voxel_average_reference(
    points: Tensor,  # [N, 3] float64
    colors: Tensor,  # [N, 3] uint8
    voxel_size: float,
    normals: Tensor | None = None,  # [N, 3] float32
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`voxel_average` by torch's index_add."""
    return voxel_average(
        points, colors, voxel_size, normals, backends=Backends(operators="reference")
    )


def voxel_average(
    points: Tensor,  # [N, 3] float64, finite
    colors: Tensor,  # [N, 3] uint8
    voxel_size: float,
    normals: Tensor | None = None,  # [N, 3] float32
    *,
    backends: Backends = DEFAULT_BACKENDS,
) -> tuple[Tensor, Tensor, Tensor | None]:  # [M, 3] float64, [M, 3] uint8, [M, 3] float32
    """The means of every occupied cell, ordered by cell (x, y, z).

    Cell edges start at the least corner of the points' bounding box. Mean colours are rounded, mean
    normals brought to length 1 (0 stays 0).

    Raises
    ------
    ValueError : more than 2^62 cells in the bounding box; `operators="triton"` for CPU tensors.
    """
    if backends.operators == "triton" and not (points.is_cuda or INTERPRETED):
        raise ValueError(
            f"voxel_average: operators='triton' needs CUDA tensors, got one on {points.device}; "
            "use operators='auto'"
        )
    if len(points) == 0:
        return points, colors, normals
    kernel = backends.operators == "triton" or (backends.operators == "auto" and points.is_cuda)
    keys, order = torch.sort(cell_keys(points, voxel_size), stable=True)
    _, counts = torch.unique_consecutive(keys, return_counts=True)
    del keys
    sums = (_sums if kernel else _sums_reference)(points, colors, normals, order, counts)
    means = sums / counts
    mean_colors = means[3:6].round().to(torch.uint8).T.contiguous()
    if normals is None:
        return means[:3].T.contiguous(), mean_colors, None
    length = means[6:].norm(dim=0)
    directions = torch.where(length > 0, means[6:] / length, 0.0)
    return means[:3].T.contiguous(), mean_colors, directions.T.contiguous().float()


def compile_cases() -> list[CompileCase]:
    """Without and with normals."""
    config = Config.for_parts(interpreted=False)
    pointers = {"points": "*fp64", "colors": "*u8", "normals": "*fp32", "order": "*i64"}
    pointers |= {"begin": "*i64", "length": "*i64", "sums": "*fp64"}
    return [
        CompileCase(
            "normals" if normals else "points",
            _sums_kernel,
            pointers | {"parts": "i32"},
            {"NORMALS": normals, "BLOCK": config.block},
            {"num_warps": config.warps},
            tuple(pointers),
        )
        for normals in (False, True)
    ]
