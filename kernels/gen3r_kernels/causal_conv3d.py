"""Convolution over space and time that looks only backwards, with what it remembers of the past.

y[t] = bias + sum over kt, kh, kw of weight[kt, kh, kw] @ frames[t * stride + kt][h + kh, w + kw],
where frames are [past | x] along time, `past` the last frames before x (zeros when there are none),
and space is padded with zeros.

The appearance VAE's 3x3x3 convolutions at 49 x 560 x 560 hold 1.2e14 of its operations: 96 channels
at 560x560 (0.62 TFLOP for 4 frames, 0.84 ms at the 746 TFLOP/s of an H100), 192 at 280x280 (the
same), 384 at 140x140 and 70x70. Measured on an H100 in bf16, TFLOP/s; the kernel
(`causal_conv3d_triton`) reads past and x where they are, cuDNN is given them concatenated, and the
concatenation is not counted:

| shape | kernel | cuDNN channels-last | cuDNN channels-first |
|---|---|---|---|
| 96 to 96, 3x3x3, 4 frames of 560x560 | 425 | 216 | 178 |
| 192 to 192, 3x3x3, 4 of 280x280 | 522 | 521 | 412 |
| 384 to 384, 3x3x3, 2 of 140x140 | 563 | 536 | 452 |
| 384 to 384, 3x3x3, 1 of 70x70 | 321 | 354 | 269 |
| 512 to 512, 3x3x3, 4 of 70x70 | 530 | 729 | 604 |
| 128 to 128, 3x3x3, 4 of 70x70 | 331 | 383 | - |
| 192 to 96, 1x3x3, 4 of 560x560 | 492 | 387 | 227 |
| 384 to 192, 1x3x3, 4 of 280x280 | 643 | 475 | 329 |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.causal_conv3d_triton import causal_conv3d_kernel
from gen3r_kernels.dispatch import use_triton

Sizes = tuple[int, ...]

SMALLEST_FRAME = 140 * 140  # pixels from which the kernel was the faster
MEASURED_KERNELS = ((3, 3, 3), (1, 3, 3))


def supported(weight: Sizes, stride: Sizes, padding: Sizes) -> bool:
    """Whether the kernel can: size-keeping in space, rows of whole 16 bytes for the descriptors.

    weight : its shape [Cout, Cin, kt, kh, kw].
    """
    channels_out, channels_in, _, height, width = weight
    centred = tuple(padding) == (0, height // 2, width // 2) and height % 2 == width % 2 == 1
    return tuple(stride[1:]) == (1, 1) and centred and channels_in % 8 == channels_out % 8 == 0


def choose(x: Sizes, weight: Sizes, stride: Sizes, padding: Sizes) -> str:
    """``kernel`` or ``library``: what was faster on an H100, by the shapes of x and weight."""
    large = x[-2] * x[-1] >= SMALLEST_FRAME and tuple(weight[2:]) in MEASURED_KERNELS
    return "kernel" if large and supported(weight, stride, padding) else "library"


def causal_conv3d_reference(
    x: Tensor,  # [B, Cin, T, H, W]
    weight: Tensor,  # [Cout, Cin, kt, kh, kw]
    bias: Tensor | None,  # [Cout]
    past: Tensor | None = None,  # [B, Cin, P, H, W]; None: kt - 1 frames of zeros
    *,
    stride: Sizes = (1, 1, 1),
    padding: Sizes = (0, 1, 1),
) -> Tensor:  # [B, Cout, T', H', W'] float32
    """The definition in float32."""
    wide = None if bias is None else bias.float()
    joined = _join(x, past, weight.shape[2]).float()
    return F.conv3d(joined, weight.float(), wide, stride, padding)


def _join(
    x: Tensor,  # [B, C, T, H, W]
    past: Tensor | None,  # [B, C, P, H, W]
    taps: int,
) -> Tensor:  # [B, C, P + T, H, W]
    if past is None:
        past = x.new_zeros(*x.shape[:2], taps - 1, *x.shape[3:])
    return torch.cat([past, x], dim=2)


def _library(
    x: Tensor,  # [B, Cin, T, H, W], past included
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes,
) -> Tensor:
    """The libraries' convolution: oneDNN, cuDNN.

    On a CPU PyTorch (seen in 2.13) sends a batch of one with kernels of up to 3 to its unblocked
    im2col path and larger batches to oneDNN. Here a batch of one goes to oneDNN as well: 5 to 6
    times faster on 2 cores (docs/measured.md); the sums are the same, in another order.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    # Exported and compiled graphs keep the plain operator.
    if on_cpu and torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling():
        return torch.ops.aten.mkldnn_convolution(
            x, weight, bias, list(padding), list(stride), [1, 1, 1], 1
        )
    return F.conv3d(x, weight, bias, stride, padding)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, past, stride = inputs
    ctx.save_for_backward(x, weight, past)
    ctx.how = (bias is not None, stride)  # type: ignore[attr-defined]


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The library's backward over [past | x]."""
    x, weight, past = ctx.saved_tensors  # type: ignore[attr-defined]
    has_bias, stride = ctx.how  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    channels_out, _, taps, *sides = weight.shape
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dy,
        _join(x, past, taps),
        weight,
        [channels_out] if has_bias else None,
        [stride, 1, 1],
        [0, *(side // 2 for side in sides)],
        [1, 1, 1],
        False,
        [0, 0, 0],
        1,
        [needs[0] or needs[3], needs[1], has_bias and needs[2]],
    )
    frames = x.shape[2]
    dpast = dx[:, :, :-frames] if past is not None and needs[3] else None
    dx = dx[:, :, -frames:] if needs[0] else None
    return dx, dweight, dbias, dpast, None


causal_conv3d_kernel.register_autograd(_differentiate, setup_context=_save)


def causal_conv3d(
    x: Tensor,  # [B, Cin, T, H, W]
    weight: Tensor,  # [Cout, Cin, kt, kh, kw]
    bias: Tensor | None,  # [Cout]
    past: Tensor | None = None,  # [B, Cin, P, H, W]; None: kt - 1 frames of zeros
    *,
    stride: Sizes = (1, 1, 1),
    padding: Sizes = (0, 1, 1),
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor:  # [B, Cout, T', H', W'], dtype of x
    """Causal convolution of a chunk of frames that follows `past`; differentiable.

    ``auto`` takes the kernel for channels-last x (`torch.channels_last_3d`) where `choose` says so:
    x in other memory would have to be rearranged, which takes 0.54 ms where the convolution takes
    1.47. ``triton`` takes it for every shape that it supports, and rearranges. Everything else goes
    to the library (cuDNN, oneDNN) behind a concatenation, in every mode.

    Raises
    ------
    ValueError : shapes or dtypes that do not fit.
    """
    last = torch.channels_last_3d
    if use_triton("causal_conv3d", x, x.dtype, backends):
        if backends.operators == "triton":
            kernel = supported(weight.shape, stride, padding)
        else:
            faster = choose(x.shape, weight.shape, stride, padding) == "kernel"
            kernel = faster and x.is_contiguous(memory_format=last)
        if kernel:
            x = x.contiguous(memory_format=last)
            past = None if past is None else past.contiguous(memory_format=last)
            return torch.ops.gen3r.causal_conv3d(x, weight, bias, past, stride[0])
    return _library(_join(x, past, weight.shape[2]), weight, bias, stride, padding)
