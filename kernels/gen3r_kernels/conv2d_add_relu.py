# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""Convolution of images with what follows it: y = [relu](conv(x) + bias [+ residual]).

Stride 1, the size stays, borders are zeros. VGGT's depth head has 20 of these (3x3, mostly 256
channels, 20 x 20 to 560 x 560 pixels), 13 TFLOP for 49 frames of 560 x 560.

The products are cuDNN's on channels-last memory: at [8, 256, 160, 160] in bf16 0.305 ms on an H100,
791 TFLOP/s (channels-first 0.68 ms, our `causal_conv3d` kernel 0.40). PyTorch adds the bias in a
pass of its own (0.46 ms together), the residual and the ReLU in two more. With a ReLU cuDNN does
all of it in its epilogue: 0.306 ms, with a residual 0.333. Without a ReLU PyTorch offers no fused
call, so the kernel here adds bias and residual in one pass: 0.31 GB there, 0.11 ms.

Backward, g = dy where y > 0 (g = dy without a ReLU) is the residual's gradient; those of x, weight
and bias are the library's for g. With frozen weights x is not kept, only y where there is a ReLU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.carried import launch, operator
from gen3r_kernels.dispatch import CompileCase, use_triton

LAST = torch.channels_last
BLOCK, WARPS = 4096, 4  # 32 values a thread: two or three streams, nothing to compute


@triton.jit
def _add_kernel(
    y,  # [pixels * C], written in place
    bias,  # [C] or None
    residual,  # as y, or None
    numbers,
    C: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    value = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + (place % C).to(tl.int32)).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)  # as PyTorch's: NaN stays NaN
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


def _add(y: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> None:
    """y = [relu](y + bias + residual) in place, on channels-last memory."""
    if (bias is None and residual is None and not relu) or y.numel() == 0:
        return
    launch(_add_kernel)[(triton.cdiv(y.numel(), BLOCK),)](
        y, bias, residual, y.numel(), C=y.shape[1], RELU=relu, BLOCK=BLOCK, num_warps=WARPS
    )


@operator("conv2d_add_relu")
def _conv2d_add_relu(
    x: Tensor,  # [N, Cin, H, W] channels-last, as all
    weight: Tensor,  # [Cout, Cin, k, k]
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    pad = [weight.shape[-1] // 2] * 2
    if relu and x.is_cuda and torch.backends.cudnn.is_available():
        one = [1, 1]
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, one, pad, one, 1)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, one, pad, one, 1)
    y = F.conv2d(x, weight, padding=pad).contiguous(memory_format=LAST)
    _add(y, bias, residual, relu)
    return y


@_conv2d_add_relu.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    size = (len(x), len(weight), *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=LAST)


def conv2d_add_relu_reference(
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin, k, k], odd k
    bias: Tensor | None,  # [Cout]
    residual: Tensor | None = None,  # [N, Cout, H, W]
    relu: bool = False,
) -> Tensor:  # [N, Cout, H, W] float32
    """The definition in float32."""
    wide_bias, wide_residual = (None if t is None else t.float() for t in (bias, residual))
    return _plain(x.float(), weight.float(), wide_bias, wide_residual, relu)


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    """PyTorch's operators in the dtype of x."""
    y = F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, _, _, relu = inputs
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    kept: list[Any] = [x if needs[1] else None, weight, output if relu else None]
    ctx.save_for_backward(*kept)


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor
) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    g = dy.contiguous(memory_format=LAST)
    if y is not None:
        g = torch.ops.aten.threshold_backward(g, y, 0)
    dx = dweight = dbias = None
    if needs[0]:
        # The size stays: the gradient of x is this convolution transposed, and unlike
        # `convolution_backward` it does not ask for x.
        dx = F.conv_transpose2d(g, weight, padding=weight.shape[-1] // 2)
    if needs[1]:
        pad, ones = [weight.shape[-1] // 2] * 2, [1, 1]
        _, dweight, _ = torch.ops.aten.convolution_backward(
            g, x, weight, None, ones, pad, ones, False, [0, 0], 1, [False, True, False]
        )
    if needs[2]:
        dbias = g.sum((0, 2, 3))
    return dx, dweight, dbias, g if needs[3] else None, None


_conv2d_add_relu.register_autograd(_differentiate, setup_context=_save)


def conv2d_add_relu(
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin, k, k], odd k
    bias: Tensor | None,  # [Cout]
    *,
    residual: Tensor | None = None,  # [N, Cout, H, W]
    relu: bool = False,
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor:  # [N, Cout, H, W], dtype of x
    """Convolve, add, and apply a ReLU; differentiable.

    ``auto`` fuses for channels-last x on a GPU in half precision, ``triton`` always.

    Raises
    ------
    ValueError : shapes that do not fit.
    """
    side = weight.shape[-1]
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1] or not side % 2:
        raise ValueError(
            f"conv2d_add_relu: x {list(x.shape)} and weight {list(weight.shape)} do not fit; "
            "expected [N, Cin, H, W] and [Cout, Cin, k, k] of odd k"
        )
    shape = (len(x), weight.shape[0], *x.shape[2:])
    if residual is not None and residual.shape != shape:
        raise ValueError(
            f"conv2d_add_relu: residual {list(residual.shape)}; the result has {list(shape)}"
        )
    fused = use_triton("conv2d_add_relu", x, x.dtype, backends)
    if backends.operators == "auto":
        fused = fused and x.is_contiguous(memory_format=LAST)
    if not fused:
        return _plain(x, weight, bias, residual, relu)
    return torch.ops.gen3r.conv2d_add_relu(
        x.contiguous(memory_format=LAST),
        weight.contiguous(memory_format=LAST),
        bias,
        None if residual is None else residual.contiguous(memory_format=LAST),
        relu,
    )


def compile_cases() -> list[CompileCase]:
    """Bias and residual, bias alone, all three."""
    cases = []
    for name, residual, relu in (
        ("bias", False, False),
        ("residual", True, False),
        ("residual, relu", True, True),
    ):
        pointers = {"y": "*bf16", "bias": "*bf16"}
        absent: dict[str, None] = {}
        if residual:
            pointers["residual"] = "*bf16"
        else:
            absent["residual"] = None
        cases.append(
            CompileCase(
                name,
                _add_kernel,
                pointers | {"numbers": "i32"},
                {"C": 256, "RELU": relu, "BLOCK": BLOCK, **absent},
                {"num_warps": WARPS},
                tuple(pointers),
            )
        )
    return cases
