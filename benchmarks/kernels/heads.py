"""VGGT's operators: the dense head's convolution, resize and output, queries and keys of a block.

8 frames at a time. `eager` and `compile` hold maps as upstream does, channels first; `gen3r` holds
them channels last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import gen3r_kernels as ops
from benchmarks.kernels.case import (
    Case,
    Draw,
    Function,
    Outputs,
    Problem,
    Sizes,
    as_tuple,
    providers_of,
)
from benchmarks.timing import dtype_name, shape_name

NAMES = ("eager", "compile", "gen3r")
FRAMES = 8
PATCH = 14
LAST_FEATURES = 32


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _problem(
    eager: Function, ours: Function, plain: Sequence[Any], reference: Callable[[], Outputs]
) -> Problem:
    """Both functions on the same arguments, maps in the memory format that each wants."""
    arranged = [_last(x) if isinstance(x, Tensor) and x.dim() == 4 else x for x in plain]
    args = {"eager": plain, "": arranged}
    return Problem(providers_of({"eager": eager, "gen3r": ours}, args), reference)


def build_convolution(sizes: Sizes, device: torch.device) -> Problem:
    draw, width, side = Draw(device), sizes.features, 4 * (sizes.side // PATCH)
    maps = [draw.normal(FRAMES, width, side, side, dtype=sizes.dtype) for _ in range(2)]
    weight = draw.normal(width, width, 3, 3, dtype=sizes.dtype, scale=(9 * width) ** -0.5)
    bias = draw.normal(width, dtype=sizes.dtype)

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, weight, bias, padding=1) + residual)

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.conv2d_add_relu(x, weight, bias, residual=residual, relu=True)

    def reference() -> Outputs:
        return (ops.conv2d_add_relu_reference(maps[0], weight, bias, maps[1], True),)

    return _problem(eager, ours, (*maps, weight, bias), reference)


def build_resize(sizes: Sizes, device: torch.device) -> Problem:
    draw, width, rows = Draw(device), sizes.features // 2, 8 * (sizes.side // PATCH)
    side = sizes.side // PATCH * PATCH
    x = draw.normal(FRAMES, width, rows, rows, dtype=sizes.dtype)
    across, down = (draw.normal(side, width // 2, dtype=torch.float32) for _ in range(2))

    def eager(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
        y = F.interpolate(x, (side, side), mode="bilinear", align_corners=True)
        columns = across.t()[:, None, :].expand(-1, side, -1)
        return y + torch.cat([columns, down.t()[:, :, None].expand(-1, -1, side)]).to(y.dtype)

    def ours(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
        return ops.resize_bilinear(x, (side, side), position=(across, down))

    def reference() -> Outputs:
        return (ops.resize_bilinear_reference(x, (side, side), (across, down)),)

    return _problem(eager, ours, (x, across, down), reference)


def build_output(sizes: Sizes, device: torch.device) -> Problem:
    draw = Draw(device)
    x = draw.normal(FRAMES, LAST_FEATURES, sizes.side, sizes.side, dtype=sizes.dtype)
    weight = draw.normal(2, LAST_FEATURES, dtype=sizes.dtype, scale=LAST_FEATURES**-0.5)
    bias = draw.normal(2, dtype=sizes.dtype)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        raw = F.conv2d(x, weight[:, :, None, None], bias).permute(0, 2, 3, 1).float()
        return raw[..., :-1].exp(), 1 + raw[..., -1].exp()

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        return ops.dense_output(x, weight, bias, exponential=True)

    def reference() -> Outputs:
        return ops.dense_output_reference(x, weight, bias, True)

    return _problem(eager, ours, (x, weight, bias), reference)


def build_norm_rope(sizes: Sizes, device: torch.device) -> Problem:
    draw, (views, tokens, heads, head_dim) = Draw(device), sizes.views
    q, k, _ = draw.normal(views, tokens, 3, heads, head_dim, dtype=sizes.dtype).unbind(2)
    norms = [
        (draw.normal(head_dim, dtype=sizes.dtype), draw.normal(head_dim, dtype=sizes.dtype))
        for _ in range(2)
    ]
    angles = draw.uniform(tokens, 2, 1, head_dim // 4, low=-3, high=3)
    angles = angles.expand(-1, -1, 2, -1).reshape(tokens, head_dim)
    tables = (angles.cos(), angles.sin())

    def turned(x: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (t[:, None, :].to(x.dtype) for t in tables)
        x = F.layer_norm(x, x.shape[-1:], *norm)
        first, second = x.unflatten(-1, (2, 2, -1)).unbind(-2)
        return x * cos + torch.stack([-second, first], dim=-2).flatten(-3) * sin

    def eager(q: Tensor, k: Tensor) -> Outputs:
        return turned(q, norms[0]), turned(k, norms[1])

    def ours(q: Tensor, k: Tensor) -> Outputs:
        return ops.layer_norm_rope(q, k, norms[0], norms[1], tables)

    def reference() -> Outputs:
        return as_tuple(ops.layer_norm_rope_reference(q, k, norms[0], norms[1], tables))

    functions: dict[str, Function] = {"eager": eager, "gen3r": ours}
    return Problem(providers_of(functions, {"": (q, k)}), reference)


def cases(sizes: Sizes) -> list[Case]:
    item, dtype, width = sizes.dtype.itemsize, dtype_name(sizes.dtype), sizes.features
    grid = sizes.side // PATCH
    level, coarse, full = 4 * grid, 8 * grid, PATCH * grid
    pixels = FRAMES * sizes.side**2
    queries = 2 * torch.Size(sizes.views).numel()

    def case(
        name: str, shape: str, count: int, flops: int, metric: str, build: Callable[..., Problem]
    ) -> Case:
        return Case(name, shape, dtype, NAMES, count, flops, (metric,), partial(build, sizes))

    numbers = FRAMES * width * level**2
    enlarged = FRAMES * width // 2 * full**2
    return [
        case(
            "conv2d_add_relu",
            f"{shape_name(FRAMES, width, level, level)} -> {width}",
            item * (3 * numbers + 9 * width**2),
            2 * 9 * width * numbers,
            "tflops",
            build_convolution,
        ),
        case(
            "resize_bilinear",
            f"{shape_name(FRAMES, width // 2, coarse, coarse)} -> {full}",
            item * (FRAMES * width // 2 * coarse**2 + enlarged),
            10 * enlarged,
            "gbps",
            build_resize,
        ),
        case(
            "dense_output",
            f"{shape_name(FRAMES, LAST_FEATURES, sizes.side, sizes.side)} -> 2",
            pixels * (item * LAST_FEATURES + 8),
            4 * LAST_FEATURES * pixels,
            "gbps",
            build_output,
        ),
        case(
            "layer_norm_rope",
            shape_name(*sizes.views),
            2 * item * queries,
            13 * queries,
            "gbps",
            build_norm_rope,
        ),
    ]
