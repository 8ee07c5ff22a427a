"""rms_norm_silu, causal_conv3d and upsample_conv2d: the autoencoders, four frames at a time.

`eager` and `compile` hold their tensors as upstream does, channels first; `library` and `gen3r`
hold them channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    reference_gradients,
)
from benchmarks.timing import dtype_name, shape_name

NAMES = ("eager", "compile", "library", "gen3r")
Video = tuple[int, int, int]  # channels, frames, side


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def eager_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma)


def library_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """The fused RMSNorm on a view whose last axis is the channels."""
    rows = F.rms_norm(x.movedim(1, -1), x.shape[1:2], gamma.flatten(), 1e-12)
    return F.silu(rows).movedim(-1, 1)


def eager_conv(x: Tensor, weight: Tensor, bias: Tensor, cache: Tensor) -> Tensor:
    joined = torch.cat([cache, x], dim=2)
    return F.conv3d(F.pad(joined, (1, 1, 1, 1, 0, 0)), weight, bias)


def library_conv(x: Tensor, weight: Tensor, bias: Tensor, cache: Tensor) -> Tensor:
    """cuDNN on channels-last tensors, padding inside."""
    return F.conv3d(torch.cat([cache, x], dim=2), weight, bias, padding=(0, 1, 1))


def build_norm(sizes: Sizes, video: Video, backward: bool, device: torch.device) -> Problem:
    draw, (channels, frames, side) = Draw(device), video
    shape = (1, channels, frames, side, side)
    plain = draw.normal(*shape, dtype=sizes.dtype)
    gamma = draw.normal(channels, 1, 1, 1, dtype=sizes.dtype, scale=0.1).add_(1)
    args: dict[str, Sequence[Any]] = {
        "eager": (plain, gamma),
        "": (channels_last(plain), gamma),
    }
    functions: dict[str, Function] = {
        "eager": eager_norm,
        "library": library_norm,
        "gen3r": ops.rms_norm_silu,
    }
    reference = ops.rms_norm_silu_reference
    if not backward:
        return Problem(providers_of(functions, args), lambda: as_tuple(reference(plain, gamma)))
    grads = [channels_last(draw.normal(*shape, dtype=sizes.dtype))]
    return Problem(
        providers_of(functions, args, (0, 1), grads),
        lambda: reference_gradients(reference, (plain, gamma), (0, 1), grads),
    )


def build_conv(sizes: Sizes, video: Video, device: torch.device) -> Problem:
    draw, (channels, frames, side) = Draw(device), video
    plain = draw.normal(1, channels, frames, side, side, dtype=sizes.dtype)
    cache = draw.normal(1, channels, 2, side, side, dtype=sizes.dtype)
    scale = (27 * channels) ** -0.5
    weight = draw.normal(channels, channels, 3, 3, 3, dtype=sizes.dtype, scale=scale)
    bias = draw.normal(channels, dtype=sizes.dtype, scale=0.1)
    args: dict[str, Sequence[Any]] = {
        "eager": (plain, weight, bias, cache),
        "": (channels_last(plain), channels_last(weight), bias, channels_last(cache)),
    }

    def ours(x: Tensor, weight: Tensor, bias: Tensor, cache: Tensor) -> Tensor:
        return ops.causal_conv3d(x, weight, bias, cache)

    def reference() -> Outputs:
        return (ops.causal_conv3d_reference(plain, weight, bias, cache),)

    functions: dict[str, Function] = {"eager": eager_conv, "library": library_conv, "gen3r": ours}
    return Problem(providers_of(functions, args), reference)


def build_upsample(sizes: Sizes, video: Video, device: torch.device) -> Problem:
    draw, (channels, frames, side) = Draw(device), video
    plain = draw.normal(frames, channels, side, side, dtype=sizes.dtype)
    scale = (9 * channels) ** -0.5
    weight = draw.normal(channels // 2, channels, 3, 3, dtype=sizes.dtype, scale=scale)
    bias = draw.normal(channels // 2, dtype=sizes.dtype, scale=0.1)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (plain, weight)]
    args: dict[str, Sequence[Any]] = {"eager": (plain, weight, bias), "": (*last, bias)}

    def library(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.upsample_conv2d(x, weight, bias)

    def reference() -> Outputs:
        return (ops.upsample_conv2d_reference(plain, weight, bias),)

    functions: dict[str, Function] = {"eager": library, "library": library, "gen3r": ours}
    return Problem(providers_of(functions, args), reference)


def cases(sizes: Sizes) -> list[Case]:
    item, dtype, found = sizes.dtype.itemsize, dtype_name(sizes.dtype), []
    for backward in (False, True):
        channels, frames, side = sizes.videos[0]
        elements = channels * frames * side * side
        found.append(
            Case(
                name="rms_norm_silu_backward" if backward else "rms_norm_silu",
                shape=shape_name(1, channels, frames, side, side),
                dtype=dtype,
                providers=NAMES,
                bytes=elements * item * (3 if backward else 2),  # backward: x, dy, dx
                flops=elements * (20 if backward else 9),
                metrics=("gbps",),
                build=partial(build_norm, sizes, sizes.videos[0], backward),
            )
        )
    for video in sizes.videos:
        channels, frames, side = video
        pixels = side * side
        weight = 27 * channels**2 + channels
        found.append(
            Case(
                name="causal_conv3d",
                shape=f"{shape_name(1, channels, frames, side, side)} -> {channels}",
                dtype=dtype,
                # torch.compile calls cuDNN as eager does: one size shows it.
                providers=NAMES if video == sizes.videos[0] else ("eager", "library", "gen3r"),
                # x, the cache of two frames, the weights and the output.
                bytes=item * (channels * pixels * (2 * frames + 2) + weight),
                flops=2 * 27 * channels**2 * frames * pixels,
                metrics=("tflops",),
                build=partial(build_conv, sizes, video),
            )
        )
    video = sizes.videos[1]
    channels, frames, side = video
    pixels = frames * side * side
    found.append(
        Case(
            name="upsample_conv2d",
            shape=f"{shape_name(frames, channels, side, side)} -> {channels // 2}",
            dtype=dtype,
            providers=("eager", "library", "gen3r"),
            # x, the weights and an output of half the channels and four times the pixels.
            bytes=item * (pixels * (channels + 4 * channels // 2) + 9 * channels * channels // 2),
            flops=2 * 9 * channels * (channels // 2) * 4 * pixels,
            metrics=("tflops",),
            build=partial(build_upsample, sizes, video),
        )
    )
    return found
