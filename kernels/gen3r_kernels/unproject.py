# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""Depth maps to world points: X = R^T (K^-1 [u, v, 1] d - t), with a validity mask.

Cameras are OpenCV, extrinsics map world to camera, intrinsics are in pixels; u, v are pixel indices
without the half-pixel offset, as upstream. A pixel is valid when near < d < far, strictly.

Bytes a pixel: 4 of depth in, 24 of float64 or 12 of float32 points out, 1 of mask. The real
[49, 560, 560] has 15.4 M pixels: 446 MB or 261 MB, 156 us or 91 us at the 2.86 TB/s that a copy
reaches on an H100. The arithmetic, 20 operations a coordinate, is 0.9 GFLOP: 30 us of the float64
units, in the shadow of the writes.

Measured on an H100 (copy 2.97 TB/s in that run): float64 168 us, 2.65 TB/s, 89 % of the copy;
float32 128 us, 2.04 TB/s, 69 %; the reference in float64 3.6 ms. Float32 is probably bound by
instructions: every coordinate finds its pixel, row and column of the rotation anew.

The kernel computes in the dtype of the points. It multiplies by 1 / f where the reference divides
by f and groups the sums otherwise: float64 points differ in their last bits, float32 points are
within 4 roundings (2^-24) of the largest of the terms |x d / f|, |y d / f|, |d| and |t|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.dispatch import CompileCase, use_triton

POINT_DTYPES = (torch.float64, torch.float32)


@triton.jit
def _column(pose, coordinate, row: tl.constexpr, dtype: tl.constexpr):
    """R[row, coordinate] of the pose [3, 4], for a tile of coordinates 0, 1, 2."""
    x = tl.load(pose + row * 4).to(dtype)
    y = tl.load(pose + row * 4 + 1).to(dtype)
    z = tl.load(pose + row * 4 + 2).to(dtype)
    return tl.where(coordinate == 0, x, tl.where(coordinate == 1, y, z))


@triton.jit
def _unproject_kernel(
    depth,  # [N, H, W]
    poses,  # [N, 3, 4] world to camera
    intrinsics,  # [N, 3, 3]
    near,  # [N]
    far,  # [N]
    points,  # [N, H, W, 3]
    valid,  # [N, H, W] bytes 0 and 1
    pixels,  # H * W
    width,
    BLOCK: tl.constexpr,
):
    frame = tl.program_id(1)
    dtype: tl.constexpr = points.dtype.element_ty
    start = tl.program_id(0) * BLOCK
    depth += frame.to(tl.int64) * pixels
    valid += frame.to(tl.int64) * pixels
    points += frame.to(tl.int64) * pixels * 3
    pose = poses + frame * 12
    k = intrinsics + frame * 9
    one = tl.full([], 1.0, dtype)
    scale_x = one / tl.load(k).to(dtype)
    scale_y = one / tl.load(k + 4).to(dtype)
    centre_x = tl.load(k + 2).to(dtype)
    centre_y = tl.load(k + 5).to(dtype)
    t_x = tl.load(pose + 3).to(dtype)
    t_y = tl.load(pose + 7).to(dtype)
    t_z = tl.load(pose + 11).to(dtype)

    p = start + tl.arange(0, BLOCK)
    d = tl.load(depth + p, mask=p < pixels, other=0.0)
    inside = (d > tl.load(near + frame)) & (d < tl.load(far + frame))
    tl.store(valid + p, inside.to(valid.dtype.element_ty), mask=p < pixels)

    # The 3 * BLOCK coordinates of the block lie in a row in memory. Each third is written whole by
    # neighbouring threads; a thread finds its pixel, whose depth the first-level cache holds.
    for third in tl.static_range(3):
        e = third * BLOCK + tl.arange(0, BLOCK)
        q = start + e // 3
        coordinate = e % 3
        z = tl.load(depth + q, mask=q < pixels, other=0.0).to(dtype)
        row = q // width
        x = ((q - row * width).to(dtype) - centre_x) * scale_x * z
        y = (row.to(dtype) - centre_y) * scale_y * z
        value = _column(pose, coordinate, 0, dtype) * (x - t_x)
        value += _column(pose, coordinate, 1, dtype) * (y - t_y)
        value += _column(pose, coordinate, 2, dtype) * (z - t_z)
        tl.store(points + start.to(tl.int64) * 3 + e, value, mask=q < pixels)


@dataclass(frozen=True)
class Config:
    """Pixels and warps of one program."""

    block: int
    warps: int

    @classmethod
    def for_shape(cls, dtype: torch.dtype) -> Config:
        """The fastest of 256, 512 and 1024 pixels on an H100."""
        return cls(512 if dtype == torch.float64 else 256, 4)


@torch.library.custom_op("gen3r::unproject", mutates_args=())
def _unproject(
    depth: Tensor,  # [N, H, W] contiguous, as all
    poses: Tensor,  # [N, 3, 4] world to camera
    intrinsics: Tensor,  # [N, 3, 3]
    near: Tensor,  # [N]
    far: Tensor,  # [N]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # points [N, H, W, 3], mask [N, H, W] bool
    if depth.dim() != 3 or not depth.is_contiguous():
        raise ValueError(
            f"unproject: depth of shape {tuple(depth.shape)} and strides {depth.stride()}; "
            "expected contiguous [N, H, W]"
        )
    frames, height, width = depth.shape
    for name, tensor, shape in (
        ("extrinsics", poses, (frames, 3, 4)),
        ("intrinsics", intrinsics, (frames, 3, 3)),
        ("near", near, (frames,)),
        ("far", far, (frames,)),
    ):
        if tensor.shape != shape or tensor.device != depth.device or not tensor.is_contiguous():
            raise ValueError(
                f"unproject: {name} of shape {tuple(tensor.shape)} on {tensor.device}; expected "
                f"contiguous {shape} on {depth.device}"
            )
    points = depth.new_empty(*depth.shape, 3, dtype=dtype)
    mask = torch.empty_like(depth, dtype=torch.bool)
    config = Config.for_shape(dtype)
    grid = (triton.cdiv(height * width, config.block), frames)
    _unproject_kernel[grid](
        depth,
        poses,
        intrinsics,
        near,
        far,
        points,
        mask.view(torch.uint8),
        height * width,
        width,
        config.block,
        num_warps=config.warps,
    )
    return points, mask


@_unproject.register_fake
def _(
    depth: Tensor,
    poses: Tensor,
    intrinsics: Tensor,
    near: Tensor,
    far: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    points = depth.new_empty(*depth.shape, 3, dtype=dtype)
    return points, torch.empty_like(depth, dtype=torch.bool)


def unproject_reference(
    depth: Tensor,  # [..., H, W]
    extrinsics: Tensor,  # [..., 3 or 4, 4] world to camera
    intrinsics: Tensor,  # [..., 3, 3] pixels
    near: Tensor,  # [...] smallest depth kept, exclusive
    far: Tensor,  # [...] largest depth kept, exclusive
) -> tuple[Tensor, Tensor]:  # points [..., H, W, 3] float64, mask [..., H, W] bool
    """The definition in float64."""
    height, width = depth.shape[-2:]
    d, pose, k = depth.double(), extrinsics.double(), intrinsics.double()
    v, u = torch.meshgrid(
        torch.arange(height, device=d.device, dtype=d.dtype),
        torch.arange(width, device=d.device, dtype=d.dtype),
        indexing="ij",
    )

    def entry(matrix: Tensor, row: int, column: int) -> Tensor:
        return matrix[..., row, column, None, None]

    x = (u - entry(k, 0, 2)) / entry(k, 0, 0) * d
    y = (v - entry(k, 1, 2)) / entry(k, 1, 1) * d
    camera = torch.stack([x, y, d], dim=-1)
    rotation, translation = pose[..., :3, :3], pose[..., :3, 3]
    points = (camera - translation[..., None, None, :]) @ rotation[..., None, :, :]
    mask = (depth > near[..., None, None]) & (depth < far[..., None, None])
    return points, mask


def unproject(
    depth: Tensor,  # [..., H, W]
    extrinsics: Tensor,  # [..., 3 or 4, 4] world to camera
    intrinsics: Tensor,  # [..., 3, 3] pixels
    near: Tensor,  # [...] exclusive lower bound
    far: Tensor,  # [...] exclusive upper bound
    *,
    out_dtype: torch.dtype = torch.float64,
    backends: Backends = DEFAULT_BACKENDS,
) -> tuple[Tensor, Tensor]:  # points [..., H, W, 3] out_dtype, mask [..., H, W] bool
    """World coordinates of every pixel and which of them are valid.

    The kernel serves float32 and half-precision depth maps on a GPU and float64 or float32 points.
    It has no derivative: where autograd records, the reference runs.

    Raises
    ------
    ValueError : on the Triton path by name (`operators="triton"`), other point dtypes and inputs
        that require gradients.
    """
    tensors = (depth, extrinsics, intrinsics, near, far)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    supported = out_dtype in POINT_DTYPES and not differentiable
    if backends.operators == "triton" and not supported:
        raise ValueError(
            f"unproject: operators='triton' writes float64 or float32 points without derivative, "
            f"asked for {out_dtype}{' with gradients' if differentiable else ''}; "
            "use operators='auto'"
        )
    kernels = use_triton("unproject", depth, out_dtype, backends, any_dtype=True)
    if not (kernels and supported):
        points, mask = unproject_reference(depth, extrinsics, intrinsics, near, far)
        return points.to(out_dtype), mask
    lead = depth.shape[:-2]
    points, mask = torch.ops.gen3r.unproject(
        depth.reshape(-1, *depth.shape[-2:]).contiguous(),
        _rows(extrinsics[..., :3, :], lead),
        _rows(intrinsics, lead),
        _rows(near[..., None, None], lead).view(-1),
        _rows(far[..., None, None], lead).view(-1),
        out_dtype,
    )
    return points.view(*depth.shape, 3), mask.view(depth.shape)


def _rows(matrix: Tensor, lead: torch.Size) -> Tensor:
    """A small matrix per depth map, [N, rows, columns] contiguous."""
    matrix = matrix.expand(*lead, *matrix.shape[-2:])
    return matrix.reshape(-1, *matrix.shape[-2:]).contiguous()


def compile_cases() -> list[CompileCase]:
    """Float32 depth maps and cameras to points of both dtypes."""
    cases = []
    for dtype in POINT_DTYPES:
        config = Config.for_shape(dtype)
        pointers = {n: "*fp32" for n in ("depth", "poses", "intrinsics", "near", "far")}
        pointers |= {"points": "*fp64" if dtype == torch.float64 else "*fp32", "valid": "*u8"}
        cases.append(
            CompileCase(
                str(dtype).removeprefix("torch."),
                _unproject_kernel,
                pointers | {"pixels": "i32", "width": "i32"},
                {"BLOCK": config.block},
                {"num_warps": config.warps},
                (*pointers, "pixels", "width"),
            )
        )
    return cases
