# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""A dense head's last layer: K numbers a pixel from C channels, as values and their confidence.

raw = weight x + bias at every pixel; the first K - 1 are the values (or their exponentials), and
1 + exp of the last is the confidence, all in float32.

At [49, 32, 560, 560] with K = 2: 0.98 GB in, 0.12 GB out in bf16: 0.39 ms at the 2.86 TB/s that a
copy reaches on an H100. As a convolution with two output channels, a conversion to float32 and
three passes for the activations it moves 2.1 GB, and the library's convolution is made for more
channels. The kernel reads channels-last memory; sums are float32 and nothing is rounded to bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.dispatch import CompileCase, use_triton

LAST = torch.channels_last
MAX_CHANNELS = 1024


@triton.jit
def _output_kernel(
    x,  # [pixels, C]
    weight,  # [K, C]
    bias,  # [K]
    values,  # [pixels, K - 1] float32
    confidence,  # [pixels] float32
    pixels,
    C: tl.constexpr,
    K: tl.constexpr,
    EXPONENTIAL: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BP
    p = tl.arange(0, BP)
    c = tl.arange(0, BC)
    here = start + p < pixels
    inside = here[:, None] & (c < C)[None, :]
    rows = tl.load(x + start * C + p[:, None] * C + c[None, :], mask=inside, other=0.0)
    rows = rows.to(tl.float32)
    for k in tl.static_range(K):
        w = tl.load(weight + k * C + c, mask=c < C, other=0.0).to(tl.float32)
        raw = tl.sum(rows * w[None, :], axis=1) + tl.load(bias + k).to(tl.float32)
        if k == K - 1:
            tl.store(confidence + start + p, 1.0 + tl.exp(raw), mask=here)
        else:
            if EXPONENTIAL:
                raw = tl.exp(raw)
            tl.store(values + (start + p) * (K - 1) + k, raw, mask=here)


@dataclass(frozen=True)
class Config:
    """Pixels and padded channels of one program, and its warps."""

    pixels: int
    channels: int
    warps: int

    @classmethod
    def for_shape(cls, channels: int) -> Config:
        """4,096 values a program: a warp reads whole rows of 64 bytes."""
        padded = max(16, triton.next_power_of_2(channels))
        return cls(max(16, 4096 // padded), padded, 4)


def _empty(x: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    count, _, height, width = x.shape
    values = x.new_empty((count, height, width, outputs - 1), dtype=torch.float32)
    return values, x.new_empty((count, height, width), dtype=torch.float32)


@torch.library.custom_op("gen3r::dense_output", mutates_args=())
def _dense_output(
    x: Tensor,  # [N, C, H, W] channels-last
    weight: Tensor,  # [K, C] contiguous
    bias: Tensor,  # [K]
    exponential: bool,
) -> tuple[Tensor, Tensor]:  # [N, H, W, K - 1], [N, H, W] float32
    outputs, channels = weight.shape
    if not x.is_contiguous(memory_format=LAST) or channels > MAX_CHANNELS:
        raise ValueError(
            f"dense_output: x {list(x.shape)} with strides {x.stride()}; the kernel takes "
            f"channels-last memory of up to {MAX_CHANNELS} channels; use operators='reference'"
        )
    values, confidence = _empty(x, outputs)
    pixels = confidence.numel()
    if pixels == 0:
        return values, confidence
    config = Config.for_shape(channels)
    _output_kernel[(triton.cdiv(pixels, config.pixels),)](
        x,
        weight,
        bias,
        values,
        confidence,
        pixels,
        C=channels,
        K=outputs,
        EXPONENTIAL=exponential,
        BP=config.pixels,
        BC=config.channels,
        num_warps=config.warps,
    )
    return values, confidence


@_dense_output.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, exponential: bool) -> tuple[Tensor, Tensor]:
    return _empty(x, weight.shape[0])


def dense_output_reference(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C]
    bias: Tensor,  # [K]
    exponential: bool,
) -> tuple[Tensor, Tensor]:  # [N, H, W, K - 1], [N, H, W] float32
    """The definition in float32."""
    return _plain(x.float(), weight.float(), bias.float(), exponential)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, exponential: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's operators: the product in the dtype of x, the activations in float32."""
    raw = torch.nn.functional.conv2d(x, weight[:, :, None, None], bias)
    raw = raw.permute(0, 2, 3, 1).float()
    values = raw[..., :-1]
    return values.exp() if exponential else values, 1 + raw[..., -1].exp()


def dense_output(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C], K at least 2
    bias: Tensor,  # [K]
    *,
    exponential: bool,
    backends: Backends = DEFAULT_BACKENDS,
) -> tuple[Tensor, Tensor]:  # [N, H, W, K - 1], [N, H, W] float32
    """Values and confidence of every pixel. exponential: of the values; else they are raw.

    ``auto`` takes the kernel for channels-last x on a GPU in half precision. It has no derivative:
    where autograd records, PyTorch's operators run.

    Raises
    ------
    ValueError : shapes that do not fit; on the Triton path by name (`operators="triton"`) inputs
        that require gradients, and channels that the kernel does not take.
    """
    fits = x.dim() == 4 and weight.dim() == 2 and weight.shape[1] == x.shape[1]
    if not fits or weight.shape[0] < 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"dense_output: x {list(x.shape)}, weight {list(weight.shape)}, bias "
            f"{list(bias.shape)}; expected [N, C, H, W], [K, C] and [K] with K of 2 or more"
        )
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    if backends.operators == "triton" and differentiable:
        raise ValueError("dense_output: operators='triton' has no derivative; use operators='auto'")
    kernel = use_triton("dense_output", x, x.dtype, backends) and not differentiable
    if backends.operators == "triton":
        x = x.contiguous(memory_format=LAST)
    elif kernel:
        kernel = x.is_contiguous(memory_format=LAST) and x.shape[1] <= MAX_CHANNELS
    if not kernel:
        return _plain(x, weight, bias, exponential)
    return torch.ops.gen3r.dense_output(x, weight.contiguous(), bias.contiguous(), exponential)


def compile_cases() -> list[CompileCase]:
    """The depth head and the point head."""
    cases = []
    for name, outputs, exponential in (("depth", 2, True), ("points", 4, False)):
        config = Config.for_shape(32)
        pointers = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16"}
        pointers |= {"values": "*fp32", "confidence": "*fp32"}
        cases.append(
            CompileCase(
                name,
                _output_kernel,
                pointers | {"pixels": "i32"},
                {
                    "C": 32,
                    "K": outputs,
                    "EXPONENTIAL": exponential,
                    "BP": config.pixels,
                    "BC": config.channels,
                },
                {"num_warps": config.warps},
                tuple(pointers),
            )
        )
    return cases
