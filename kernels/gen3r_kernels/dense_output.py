# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""A dense head's last layer: K numbers a pixel from C channels, as values and their confidence.

raw = weight x + bias at every pixel; the first K - 1 are the values (or their exponentials), and
1 + exp of the last is the confidence, all in float32.

At [49, 32, 560, 560] with K = 2: 0.98 GB in, 0.12 GB out in bf16: 0.39 ms at the 2.86 TB/s that a
copy reaches on an H100. As a convolution with two output channels, a conversion to float32 and
three passes for the activations it moves 2.1 GB, and the library's convolution is made for more
channels. The kernel reads channels-last memory; sums are float32 and nothing is rounded to bf16.

Backward, with d raw = d value * value (d value, where values are raw) and d confidence *
(confidence - 1): dx = d raw @ weight, written by one kernel from the float32 maps, of which either
may be without a gradient. At the shape above 1.2 GB, 0.43 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.carried import launch, operator
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


@triton.jit
def _backward_kernel(
    dvalues,  # [pixels, K - 1] float32 or None
    values,  # as dvalues, or None: not exponential
    dconfidence,  # [pixels] float32 or None
    confidence,  # [pixels] float32 or None, as dconfidence
    weight,  # [K, C]
    dx,  # [pixels, C]
    pixels,
    C: tl.constexpr,
    K: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BP
    p = tl.arange(0, BP)
    c = tl.arange(0, BC)
    here = start + p < pixels
    total = tl.zeros([BP, BC], tl.float32)
    if dvalues is not None:
        for k in tl.static_range(K - 1):
            place = (start + p) * (K - 1) + k
            raw = tl.load(dvalues + place, mask=here, other=0.0)
            if values is not None:
                raw *= tl.load(values + place, mask=here, other=0.0)
            w = tl.load(weight + k * C + c, mask=c < C, other=0.0).to(tl.float32)
            total += raw[:, None] * w[None, :]
    if dconfidence is not None:
        raw = tl.load(dconfidence + start + p, mask=here, other=0.0)
        raw *= tl.load(confidence + start + p, mask=here, other=1.0) - 1.0
        w = tl.load(weight + (K - 1) * C + c, mask=c < C, other=0.0).to(tl.float32)
        total += raw[:, None] * w[None, :]
    inside = here[:, None] & (c < C)[None, :]
    place = start * C + p[:, None] * C + c[None, :]
    tl.store(dx + place, total.to(dx.dtype.element_ty), mask=inside)


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


@operator("dense_output")
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
    launch(_output_kernel)[(triton.cdiv(pixels, config.pixels),)](
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


def _empty_gradient(confidence: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    count, height, width = confidence.shape
    size = (count, weight.shape[1], height, width)
    return torch.empty(size, dtype=dtype, device=confidence.device, memory_format=LAST)


@torch.library.custom_op("gen3r::dense_output_backward", mutates_args=())
def _dense_output_backward(
    dvalues: Tensor | None,  # [N, H, W, K - 1] float32
    dconfidence: Tensor | None,  # [N, H, W] float32
    values: Tensor,  # [N, H, W, K - 1] float32
    confidence: Tensor,  # [N, H, W] float32
    weight: Tensor,  # [K, C] contiguous
    exponential: bool,
    dtype: torch.dtype,
) -> Tensor:  # [N, C, H, W] channels-last, in dtype
    dx = _empty_gradient(confidence, weight, dtype)
    pixels = confidence.numel()
    if pixels == 0:
        return dx
    outputs, channels = weight.shape
    config = Config.for_shape(channels)
    _backward_kernel[(triton.cdiv(pixels, config.pixels),)](
        None if dvalues is None else dvalues.contiguous(),
        values if exponential and dvalues is not None else None,
        None if dconfidence is None else dconfidence.contiguous(),
        None if dconfidence is None else confidence,
        weight,
        dx,
        pixels,
        C=channels,
        K=outputs,
        BP=config.pixels,
        BC=config.channels,
        num_warps=config.warps,
    )
    return dx


@_dense_output_backward.register_fake
def _(
    dvalues: Tensor | None,
    dconfidence: Tensor | None,
    values: Tensor,
    confidence: Tensor,
    weight: Tensor,
    exponential: bool,
    dtype: torch.dtype,
) -> Tensor:
    return _empty_gradient(confidence, weight, dtype)


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


def _save(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]
) -> None:
    x, weight, bias, ctx.exponential = inputs  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    ctx.dtypes = x.dtype, bias.dtype  # type: ignore[attr-defined]
    ctx.set_materialize_grads(False)  # a loss of the values alone leaves the confidence None
    kept: Any = x if needs[1] else None
    ctx.save_for_backward(kept, weight, *output)


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, dvalues: Tensor | None, dconfidence: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, weight, values, confidence = ctx.saved_tensors  # type: ignore[attr-defined]
    exponential = ctx.exponential  # type: ignore[attr-defined]
    dtype, bias_dtype = ctx.dtypes  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    dx = dweight = dbias = None
    if needs[0]:
        dx = _dense_output_backward(
            dvalues, dconfidence, values, confidence, weight, exponential, dtype
        )
    if needs[1] or needs[2]:
        first = torch.zeros_like(values) if dvalues is None else dvalues
        last = torch.zeros_like(confidence) if dconfidence is None else dconfidence
        first = first * values if exponential else first
        raw = torch.cat([first, (last * (confidence - 1))[..., None]], dim=-1).flatten(0, 2)
        if needs[1]:
            rows = x.permute(0, 2, 3, 1).flatten(0, 2)
            dweight = (raw.to(dtype).T @ rows).to(weight.dtype)
        if needs[2]:
            dbias = raw.sum(0).to(bias_dtype)
    return dx, dweight, dbias, None


_dense_output.register_autograd(_differentiate, setup_context=_save)


def dense_output(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C], K at least 2
    bias: Tensor,  # [K]
    *,
    exponential: bool,
    backends: Backends = DEFAULT_BACKENDS,
) -> tuple[Tensor, Tensor]:  # [N, H, W, K - 1], [N, H, W] float32
    """Values and confidence of every pixel, differentiable. exponential: values are exp(raw).

    ``auto`` takes the kernel for channels-last x on a GPU in half precision.

    Raises
    ------
    ValueError : shapes that do not fit; on the Triton path by name (`operators="triton"`) channels
        that the kernel does not take.
    """
    fits = x.dim() == 4 and weight.dim() == 2 and weight.shape[1] == x.shape[1]
    if not fits or weight.shape[0] < 2 or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"dense_output: x {list(x.shape)}, weight {list(weight.shape)}, bias "
            f"{list(bias.shape)}; expected [N, C, H, W], [K, C] and [K] with K of 2 or more"
        )
    kernel = use_triton("dense_output", x, x.dtype, backends)
    if backends.operators == "triton":
        x = x.contiguous(memory_format=LAST)
    elif kernel:
        kernel = x.is_contiguous(memory_format=LAST) and x.shape[1] <= MAX_CHANNELS
    if not kernel:
        return _plain(x, weight, bias, exponential)
    return torch.ops.gen3r.dense_output(x, weight.contiguous(), bias.contiguous(), exponential)


def compile_cases() -> list[CompileCase]:
    """The depth head and the point head; backward from the values, and from both maps."""
    cases = []
    config = Config.for_shape(32)
    for name, outputs, exponential in (("depth", 2, True), ("points", 4, False)):
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
    for name, outputs, maps in (
        ("depth, backward", 2, ("dvalues", "values", "dconfidence", "confidence")),
        ("points, backward", 4, ("dvalues",)),
    ):
        pointers = dict.fromkeys(maps, "*fp32") | {"weight": "*bf16", "dx": "*bf16"}
        absent = {n: None for n in ("values", "dconfidence", "confidence") if n not in maps}
        cases.append(
            CompileCase(
                name,
                _backward_kernel,
                pointers | {"pixels": "i32"},
                {"C": 32, "K": outputs, "BP": config.pixels, "BC": config.channels, **absent},
                {"num_warps": config.warps},
                tuple(pointers),
            )
        )
    return cases
