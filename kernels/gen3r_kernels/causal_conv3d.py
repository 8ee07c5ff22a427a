"""Convolution over space and time that looks only backwards, with what it remembers of the past.

y[t] = bias + sum over kt, kh, kw of weight[kt, kh, kw] @ frames[t * stride + kt][h + kh, w + kw],
where frames are [past | x] along time, `past` the last frames before x (zeros when there are none),
and space is padded with zeros. A residual may be added to y, or y's channels may be spread over
pairs of frames: [B, 2 C, T, H, W] becomes [B, C, 2 T, H, W], the first half of the channels first.

The appearance VAE's 3x3x3 convolutions at 49 x 560 x 560 hold 1.2e14 of its operations: 96 channels
at 560x560 (0.62 TFLOP for 4 frames, 0.84 ms at the 746 TFLOP/s of an H100), 192 at 280x280 (the
same), 384 at 140x140 and 70x70. Measured on an H100 in bf16, TFLOP/s, each shape alone, with the
configurations that run (which were chosen inside the decoder, see `causal_conv3d_triton`). cuDNN is
given x behind its past. The first three are rows of the suite `kernels`; the others are from probes
with residual or pairs, for which cuDNN takes passes of its own:

| shape | kernel | cuDNN channels-last |
|---|---|---|
| 96 to 96, 3x3x3, 4 frames of 560x560 | 429 | 199 |
| 192 to 192, 3x3x3, 4 of 280x280 | 530 | 469 |
| 384 to 384, 3x3x3, 2 of 140x140 | 449 | 485 |
| 96 to 96, 12 of 560x560, inside the decoder 397 | 421 | 187 |
| 192 to 192, 12 of 280x280, inside the decoder 643 | 520 | 439 |
| 384 to 384, 12 of 70x70 (cuDNN runs) | 447 | 508 |
| 512 to 512, 24 of 70x70 (cuDNN runs) | 477 | 711 |
| 384 to 768, 3x1x1 into pairs, 6 of 140x140 | 509 | 234 |
| 3 to 96, 3x3x3, 12 of 560x560 | 40 | 10 |
| 96 to 3, 3x3x3, 12 of 560x560 | 22 | 17 |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.causal_conv3d_triton import causal_conv3d_kernel, pairs_supported
from gen3r_kernels.dispatch import use_triton

Sizes = tuple[int, ...]

LAST = torch.channels_last_3d

SMALLEST_FRAME = 140 * 140  # pixels from which the kernel was the faster
MEASURED_KERNELS = ((3, 3, 3), (1, 3, 3))


def supported(weight: Sizes, stride: Sizes, padding: Sizes) -> bool:
    """Whether the kernel can: it keeps the size in space.

    weight : its shape [Cout, Cin, kt, kh, kw].
    """
    _, _, _, height, width = weight
    centred = tuple(padding) == (0, height // 2, width // 2) and height % 2 == width % 2 == 1
    return tuple(stride[1:]) == (1, 1) and centred


def choose(x: Sizes, weight: Sizes, stride: Sizes, padding: Sizes, *, pairs: bool = False) -> str:
    """``kernel`` or ``library``: what was faster on an H100, by the shapes of x and weight."""
    large = x[-2] * x[-1] >= SMALLEST_FRAME and tuple(weight[2:]) in MEASURED_KERNELS
    # Pairs: the library's result would have to be rearranged.
    return "kernel" if (large or pairs) and supported(weight, stride, padding) else "library"


def causal_conv3d_reference(
    x: Tensor,  # [B, Cin, T, H, W]
    weight: Tensor,  # [Cout, Cin, kt, kh, kw]
    bias: Tensor | None,  # [Cout]
    past: Tensor | None = None,  # [B, Cin, P, H, W]; None: kt - 1 frames of zeros
    *,
    stride: Sizes = (1, 1, 1),
    padding: Sizes = (0, 1, 1),
    residual: Tensor | None = None,  # as the result
    pairs: bool = False,
) -> Tensor:  # [B, Cout, T', H', W'], or [B, Cout / 2, 2 T', H', W'] for pairs; float32
    """The definition in float32."""
    wide = None if bias is None else bias.float()
    joined = _join(x, past, weight.shape[2]).float()
    return _finish(F.conv3d(joined, weight.float(), wide, stride, padding), residual, pairs)


def _finish(
    y: Tensor,  # [B, Cout, T, H, W]
    residual: Tensor | None,
    pairs: bool,
) -> Tensor:
    """Pairs of frames, or the residual added, in the residual's dtype."""
    if pairs:
        y = _in_pairs(y)
    if residual is None:
        return y
    return residual + y


def _in_pairs(
    y: Tensor,  # [B, 2 C, T, H, W]
) -> Tensor:  # [B, C, 2 T, H, W]
    halves = y.unflatten(1, (2, -1))
    if y.is_contiguous():
        return halves.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
    # Channels-last memory stays so: [B, T, 2, H, W, C].
    return halves.permute(0, 3, 1, 4, 5, 2).flatten(1, 2).permute(0, 4, 1, 2, 3)


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
    x, weight, bias, past, residual, stride, pairs = inputs
    ctx.save_for_backward(x, weight, past)
    added = None if residual is None else residual.dtype
    ctx.how = (bias is not None, added, stride, pairs)  # type: ignore[attr-defined]


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The library's backward over [past | x]."""
    x, weight, past = ctx.saved_tensors  # type: ignore[attr-defined]
    has_bias, added, stride, pairs = ctx.how  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    channels_out, _, taps, *sides = weight.shape
    dresidual = dy if added is not None and needs[4] else None
    if pairs:  # [B, C, 2 T, H, W] to [B, 2 C, T, H, W]
        dy = dy.unflatten(2, (-1, 2)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
    dy = dy.to(x.dtype)
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
    return dx, dweight, dbias, dpast, dresidual, None, None


causal_conv3d_kernel.register_autograd(_differentiate, setup_context=_save)


def causal_conv3d(
    x: Tensor,  # [B, Cin, T, H, W]
    weight: Tensor,  # [Cout, Cin, kt, kh, kw]
    bias: Tensor | None,  # [Cout]
    past: Tensor | None = None,  # [B, Cin, P, H, W]; None: kt - 1 frames of zeros
    *,
    stride: Sizes = (1, 1, 1),
    padding: Sizes = (0, 1, 1),
    joined: bool = False,
    residual: Tensor | None = None,  # as the result; not with pairs
    pairs: bool = False,
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor:  # [B, Cout, T', H', W'], or [B, Cout / 2, 2 T', H', W'] for pairs
    """Causal convolution of a chunk of frames that follows `past`; differentiable.

    joined : x begins with its past; `past` is not given then.
    The result has the dtype of the residual, where there is one, else that of x. ``auto`` takes the
    kernel for channels-last x (`torch.channels_last_3d`) where `choose` says so: x in other memory
    would have to be rearranged, which takes 0.54 ms where the convolution takes 1.47. ``triton``
    takes it for every shape that it supports, and rearranges. Everything else goes to the library
    (cuDNN, oneDNN) behind a concatenation, in every mode.

    Raises
    ------
    ValueError : shapes or dtypes that do not fit; a residual with pairs.
    """
    if joined:
        past = x[:, :, :0]
    if pairs and residual is not None:
        raise ValueError("causal_conv3d: a residual cannot be added to pairs; add it afterwards")
    if use_triton("causal_conv3d", x, x.dtype, backends):
        kernel = supported(weight.shape, stride, padding)
        if backends.operators != "triton":
            best = choose(x.shape, weight.shape, stride, padding, pairs=pairs)
            kernel = best == "kernel" and x.is_contiguous(memory_format=LAST)
        if kernel and (not pairs or pairs_supported(x.shape[1], weight.shape[0])):
            return _launch(x, weight, bias, past, residual, stride[0], pairs)
    whole = x if joined else _join(x, past, weight.shape[2])
    return _finish(_library(whole, weight, bias, stride, padding), residual, pairs)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    residual: Tensor | None,
    stride: int,
    pairs: bool,
) -> Tensor:
    """The kernel, with channels filled up to the multiple of 8 that its descriptors need."""
    channels_out, channels_in = weight.shape[:2]
    extra_in, extra_out = -channels_in % 8, -channels_out % 8
    if extra_out and residual is not None:
        residual = _more_channels(residual, extra_out)
    if extra_in or extra_out:
        weight = F.pad(weight, (0, 0) * 3 + (0, extra_in) + (0, extra_out))
        bias = None if bias is None else F.pad(bias, (0, extra_out))
        x = _more_channels(x, extra_in)
        past = None if past is None else _more_channels(past, extra_in)
    y = torch.ops.gen3r.causal_conv3d(
        x.contiguous(memory_format=LAST),
        weight,
        bias,
        None if past is None else past.contiguous(memory_format=LAST),
        None if residual is None else residual.contiguous(memory_format=LAST),
        stride,
        pairs,
    )
    return y[:, :channels_out] if extra_out else y


def _more_channels(x: Tensor, extra: int) -> Tensor:
    return F.pad(x, (0, 0) * 3 + (0, extra)) if extra else x
