"""Camera mathematics: trajectories, poses, rays and Pluecker maps, pose encoding, depth bounds.

Conventions: OpenCV axes; "extrinsics" map world to camera; "c2w" maps camera to world; intrinsics
are in pixels. The world frame of a scene is its first camera. Functions keep the dtype they are
given (cameras read from a file stay float64 until the model's cast).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gen3r.scene import trajectory_name

ARC_DEGREES = 15.0
MIN_DEPTH = 1e-8
MAX_DEPTH = 50.0
MOST_SORTED = 2**24  # entries that torch.quantile takes at once


def _rotation(axis: str, angles: Tensor) -> Tensor:
    """Rotations about the camera's y ("yaw") or x ("pitch"); angles [F] radians -> [F, 4, 4]."""
    c, s = angles.cos(), angles.sin()
    pose = torch.eye(4, dtype=angles.dtype).repeat(len(angles), 1, 1)
    a, b = (0, 2) if axis == "yaw" else (1, 2)
    pose[:, a, a], pose[:, a, b], pose[:, b, a], pose[:, b, b] = c, s, -s, c
    return pose


def trajectory(name: str, num_frames: int, scene_scale: float = 1.0) -> Tensor:
    """Built-in camera move as c2w [F, 4, 4] float32, relative to the first frame.

    ``zoom_*`` move along z by `scene_scale` in total; ``arc_*`` turn by 15 degrees of yaw and
    ``translate_*`` by 15 degrees of pitch, in place; ``free`` is the identity.
    Source: upstream infer.py.

    Raises
    ------
    ValueError : an unknown name.
    """
    canonical = trajectory_name(name)
    progress = torch.linspace(0.0, 1.0, num_frames, dtype=torch.float64)
    pose = torch.eye(4, dtype=torch.float64).repeat(num_frames, 1, 1)
    if canonical.startswith("zoom"):
        pose[:, 2, 3] = progress * scene_scale * (1 if canonical == "zoom_in" else -1)
    elif canonical != "free":
        sign = 1 if canonical in ("arc_right", "translate_down") else -1
        axis = "yaw" if canonical.startswith("arc") else "pitch"
        pose = _rotation(axis, sign * progress * math.radians(ARC_DEGREES))
    return pose.float()


def invert_pose(pose: Tensor) -> Tensor:
    """Inverse of poses [..., 4, 4]."""
    return torch.linalg.inv(pose)


def relative_poses(
    c2w: Tensor,  # [F, 4, 4]
) -> Tensor:  # [F, 4, 4], the first is exactly the identity
    """Camera-to-world poses in the frame of the first camera (no scale normalisation)."""
    relative = invert_pose(c2w[:1]) @ c2w
    relative[0] = torch.eye(4, dtype=c2w.dtype, device=c2w.device)
    return relative


def rays(
    c2w: Tensor,  # [..., 4, 4]
    intrinsics: Tensor,  # [..., 3, 3] pixels
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # origin, direction (unit length), both [..., 3, H, W]
    """World rays through the pixel centres (+0.5)."""
    return rays_through(c2w, torch.linalg.inv(intrinsics), height, width)


def rays_through(
    c2w: Tensor,  # [..., 4, 4]
    inverse: Tensor,  # [..., 3, 3] inverse intrinsics
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # origin, direction (unit length), both [..., 3, H, W]
    """`rays` of intrinsics that are inverted already (inverting waits for a GPU)."""
    rows = torch.arange(height, dtype=c2w.dtype, device=c2w.device) + 0.5
    columns = torch.arange(width, dtype=c2w.dtype, device=c2w.device) + 0.5
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)]).flatten(1)
    camera = inverse @ pixels
    direction = c2w[..., :3, :3] @ camera
    direction = direction / direction.norm(dim=-2, keepdim=True)
    origin = c2w[..., :3, 3:].expand_as(direction)
    return origin.unflatten(-1, (height, width)), direction.unflatten(-1, (height, width))


def plucker_map(
    c2w: Tensor,  # [..., 4, 4]
    intrinsics: Tensor,  # [..., 3, 3] pixels
    height: int,
    width: int,
) -> Tensor:  # [..., 6, H, W]
    """Pluecker coordinates of every pixel's ray: moment o x d, then direction d."""
    return plucker_coordinates(*rays(c2w, intrinsics, height, width))


def plucker_coordinates(
    origin: Tensor,  # [..., 3, H, W]
    direction: Tensor,  # [..., 3, H, W]
) -> Tensor:  # [..., 6, H, W]
    """Moment o x d and direction d of rays."""
    moment = torch.linalg.cross(origin, direction, dim=-3)
    return torch.cat([moment, direction], dim=-3)


def quaternion_to_matrix(
    quaternion: Tensor,  # [..., 4] xyzw, any length
) -> Tensor:  # [..., 3, 3]
    """Rotation matrix of a quaternion, scaled by 2 / |q|^2 so that q need not be unit."""
    x, y, z, w = quaternion.unbind(-1)
    s = 2.0 / quaternion.square().sum(-1)
    rows = [
        *(1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)),
        *(s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)),
        *(s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)),
    ]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def matrix_to_quaternion(
    matrix: Tensor,  # [..., 3, 3]
) -> Tensor:  # [..., 4] xyzw, unit, w >= 0
    """Unit quaternion of a rotation matrix.

    Of the four equivalent formulas the one with the largest divisor is taken (Shepperd 1978).
    """
    m = matrix
    diagonal = torch.diagonal(m, dim1=-2, dim2=-1)
    trace = diagonal.sum(-1)
    # Column i holds 4 * q_i * (x, y, z, w) for q_i in x, y, z, w.
    xx, yy, zz = (1 + 2 * diagonal[..., i] - trace for i in range(3))
    ww = 1 + trace
    xy, xz, yz = (
        m[..., 0, 1] + m[..., 1, 0],
        m[..., 0, 2] + m[..., 2, 0],
        m[..., 1, 2] + m[..., 2, 1],
    )
    xw, yw, zw = (
        m[..., 2, 1] - m[..., 1, 2],
        m[..., 0, 2] - m[..., 2, 0],
        m[..., 1, 0] - m[..., 0, 1],
    )
    candidates = torch.stack(
        [
            torch.stack([xx, xy, xz, xw], -1),
            torch.stack([xy, yy, yz, yw], -1),
            torch.stack([xz, yz, zz, zw], -1),
            torch.stack([xw, yw, zw, ww], -1),
        ],
        dim=-2,
    )
    best = torch.stack([xx, yy, zz, ww], -1).argmax(-1)
    chosen = candidates.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    unit = chosen / chosen.norm(dim=-1, keepdim=True)
    return torch.where(unit[..., 3:] < 0, -unit, unit)


def decode_pose(
    encoding: Tensor,  # [..., 9] translation 3, quaternion xyzw 4, fov_h, fov_w in radians
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # extrinsics [..., 3, 4] world to camera, intrinsics [..., 3, 3] pixels
    """Cameras of a VGGT pose encoding (arXiv 2503.11651); principal point: the image centre."""
    rotation = quaternion_to_matrix(encoding[..., 3:7])
    extrinsics = torch.cat([rotation, encoding[..., :3, None]], dim=-1)
    intrinsics = encoding.new_zeros(*encoding.shape[:-1], 3, 3)
    intrinsics[..., 0, 0] = width / 2 / torch.tan(encoding[..., 8] / 2)
    intrinsics[..., 1, 1] = height / 2 / torch.tan(encoding[..., 7] / 2)
    intrinsics[..., 0, 2] = width / 2
    intrinsics[..., 1, 2] = height / 2
    intrinsics[..., 2, 2] = 1
    return extrinsics, intrinsics


def encode_pose(
    extrinsics: Tensor,  # [..., 3 or 4, 4] world to camera
    intrinsics: Tensor,  # [..., 3, 3] pixels
    height: int,
    width: int,
) -> Tensor:  # [..., 9]
    """The inverse of `decode_pose` for unit quaternions and centred principal points."""
    fov_h = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    fov_w = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    quaternion = matrix_to_quaternion(extrinsics[..., :3, :3])
    return torch.cat(
        [extrinsics[..., :3, 3], quaternion, torch.stack([fov_h, fov_w], -1)], dim=-1
    ).to(extrinsics.dtype)


def crop_intrinsics(
    source: tuple[int, int],  # height, width of the stored image
    focal: tuple[float, float],  # fl_x, fl_y pixels
    center: tuple[float, float],  # cx, cy pixels
    size: int,
) -> Tensor:  # [3, 3] float32
    """Intrinsics after resizing to cover `size` and centre-cropping.

    Sizes are truncated here and rounded in the image's own resize, as upstream's get_K: the
    principal point can be off by up to one pixel (behaviour 16).
    """
    scale = size / min(source)
    top, left = (max(int(extent * scale) - size, 0) // 2 for extent in source)
    k = torch.eye(3, dtype=torch.float32)
    k[0, 0], k[1, 1] = focal[0] * scale, focal[1] * scale
    k[0, 2], k[1, 2] = center[0] * scale - left, center[1] * scale - top
    return k


def to_homogeneous(
    extrinsics: Tensor,  # [..., 3, 4]
) -> Tensor:  # [..., 4, 4]
    """Append the row (0, 0, 0, 1)."""
    last = extrinsics.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*extrinsics.shape[:-2], 1, 4)
    return torch.cat([extrinsics, last], dim=-2)


def depth_bounds(
    depth: Tensor,  # [..., H, W]
    min_max: bool = True,
) -> tuple[Tensor, Tensor]:  # near, far, both [...], exclusive
    """Depths that count as valid, per frame (behaviour 14).

    With `min_max`: above max(1e-8, 0.1 percentile) and below min(98th percentile, 50), strictly, so
    a constant frame is masked entirely. Without: above 1e-8.
    """
    flat = depth.float().flatten(-2)
    if not min_max:
        low = torch.full(flat.shape[:-1], MIN_DEPTH, device=depth.device)
        return low, torch.full_like(low, math.inf)
    # quantile takes at most 2^24 entries a call: 53 frames of 560 x 560.
    rows = flat.flatten(0, -2) if flat.ndim > 1 else flat[None]
    levels = torch.tensor([0.001, 0.98], device=depth.device)
    parts = rows.split(max(1, MOST_SORTED // rows.shape[1]))
    bounds = torch.cat([torch.quantile(part, levels, dim=1) for part in parts], dim=1)
    near, far = bounds.unflatten(-1, flat.shape[:-1]) if flat.ndim > 1 else bounds[:, 0]
    return near.clamp(min=MIN_DEPTH), far.clamp(max=MAX_DEPTH)
