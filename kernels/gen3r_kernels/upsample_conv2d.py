# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""Twice the height and width (nearest), then a 3x3 convolution: the autoencoder's way up.

y = bias + conv3x3(u), u[i, j] = x[i // 2, j // 2], zeros around u. Rows 2 h + p of y see only two
rows of x, h - 1 + p and h + p, with the kernel's rows summed where they fall on the same row of x:

    p = 0:  w[0] on x[h - 1],  w[1] + w[2] on x[h]
    p = 1:  w[0] + w[1] on x[h],  w[2] on x[h + 1]

and columns alike. So y is four convolutions of 2x2 of x itself, one for each (row, column) parity:
4/9 of the products, and u is never written. The sums of weights are taken in float32 and rounded to
the dtype of the weights once.

Real shapes, 49 frames: 384 to 192 channels at 70x70 (13 frames before the frame rate doubles) and
140x140, 192 to 96 at 280x280: 5.8 TFLOP in place of 13.0, and 6.4 GB of u (write and read) less.
The implicit matrix product is that of `causal_conv3d_triton`: a program owns a rectangle of pixels
of x, one parity and some output channels; the tensor memory accelerator fills what lies outside
with zeros and writes the rectangle into every second row and column of y.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.carried import carrying, describe, empty_last, launch, operator
from gen3r_kernels.causal_conv3d_triton import Config
from gen3r_kernels.dispatch import CompileCase, use_triton

LAST = torch.channels_last


@triton.jit
def _parity_places(
    f,
    h,
    down,
    w,
    c,
    height,
    width,
    CHANNELS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
):
    """Offsets and mask [BH * BW, BN] of a rectangle in [N, height, 2, width, CHANNELS]."""
    pixel = tl.arange(0, BH * BW)
    i = h + pixel // BW
    j = w + pixel % BW
    o = c + tl.arange(0, BN)
    place = ((f.to(tl.int64) * height + i) * 2 + down) * width + j
    inside = ((i < height) & (j < width))[:, None] & (o < CHANNELS)[None, :]
    return place[:, None] * CHANNELS + o[None, :], inside


@triton.jit
def _upsample_kernel(
    x,  # descriptor of [N, H, W, CIN]
    weight,  # descriptor of [4 parities * COUT, 4 taps * CIN], boxes of BN rows
    weight_2,  # the same, boxes of BN2 rows
    bias,  # [COUT] if HAS_BIAS
    y,  # descriptor of [N, H, 2, W, 2 * COUT], boxes of BN channels
    y_2,  # the same, boxes of BN2 channels
    rows,  # rectangles in the height of x
    columns,  # rectangles in its width
    height,  # of x, if PLAIN; else None
    width,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BN2: tl.constexpr,
    BK: tl.constexpr,
    PLAIN: tl.constexpr,  # y is a pointer, y_2 None
):
    BM: tl.constexpr = BH * BW
    PARTS: tl.constexpr = COUT // (BN + BN2)
    CHUNKS: tl.constexpr = (CIN + BK - 1) // BK
    program = tl.program_id(0)
    n = (program % PARTS) * (BN + BN2)
    program //= PARTS
    parity = program % 4
    down = parity // 2
    right = parity % 2
    program //= 4
    w = (program % columns) * BW
    program //= columns
    h = (program % rows) * BH
    f = program // rows

    sums = tl.zeros([BM, BN], tl.float32)
    if BN2 > 0:
        sums_2 = tl.zeros([BM, BN2], tl.float32)
    row = parity * COUT + n
    for i in range(0, 4 * CHUNKS):
        tap = i // CHUNKS
        c = (i - tap * CHUNKS) * BK
        a = x.load([f, h + tap // 2 + down - 1, w + tap % 2 + right - 1, c]).reshape(BM, BK)
        k = tap * CIN + c
        sums = tl.dot(a, weight.load([row, k]).T, sums, input_precision=PRECISION)
        if BN2 > 0:
            second = weight_2.load([row + BN, k]).T
            sums_2 = tl.dot(a, second, sums_2, input_precision=PRECISION)

    o = n + tl.arange(0, BN)
    if HAS_BIAS:
        sums += tl.load(bias + o).to(tl.float32)[None, :]
    c = right * COUT + n
    if PLAIN:
        places, inside = _parity_places(f, h, down, w, c, height, width, 2 * COUT, BH, BW, BN)
        tl.store(y + places, sums.to(y.dtype.element_ty), mask=inside)
    else:
        y.store([f, h, down, w, c], sums.to(y.dtype).reshape(1, BH, 1, BW, BN))
    if BN2 > 0:
        o = n + BN + tl.arange(0, BN2)
        if HAS_BIAS:
            sums_2 += tl.load(bias + o).to(tl.float32)[None, :]
        if PLAIN:
            places, inside = _parity_places(
                f, h, down, w, c + BN, height, width, 2 * COUT, BH, BW, BN2
            )
            tl.store(y + places, sums_2.to(y.dtype.element_ty), mask=inside)
        else:
            y_2.store([f, h, down, w, c + BN], sums_2.to(y.dtype).reshape(1, BH, 1, BW, BN2))


def parity_weights(
    weight: Tensor,  # [Cout, Cin, 3, 3]
) -> Tensor:  # [2, 2, Cout, 2, 2, Cin] in its dtype: parity of row and column, output, taps, input
    """The four 2x2 kernels that do what the 3x3 kernel does on doubled rows and columns."""
    top, middle, bottom = weight.float().unbind(2)  # [Cout, Cin, 3]
    rows = torch.stack(
        [torch.stack([top, middle + bottom]), torch.stack([top + middle, bottom])]
    )  # [parity, tap, Cout, Cin, 3]
    left, middle, right = rows.unbind(-1)
    both = torch.stack(
        [torch.stack([left, middle + right]), torch.stack([left + middle, right])]
    )  # [column parity, column tap, row parity, row tap, Cout, Cin]
    return both.permute(2, 0, 4, 3, 1, 5).to(weight.dtype)


def supported(channels_in: int, channels_out: int) -> bool:
    """Whether the kernel takes these widths: whole 16-byte rows, whole programs."""
    config = Config.for_shape(channels_in, channels_out)
    whole = channels_out % (config.channels + config.channels_2) == 0
    return whole and channels_in % 8 == channels_out % 8 == 0


def _doubled(x: Tensor, channels: int) -> Tensor:
    size = (x.shape[0], channels, 2 * x.shape[2], 2 * x.shape[3])
    return empty_last(size, x.dtype, x.device)


@operator("upsample_conv2d")
def upsample_conv2d_kernel(
    x: Tensor,  # [N, Cin, H, W] channels-last
    weight: Tensor,  # [Cout, Cin, 3, 3]
    bias: Tensor | None,  # [Cout]
) -> Tensor:  # [N, Cout, 2 H, 2 W] channels-last
    """The kernel's launch for tensors in the memory format that it reads."""
    channels_out, channels_in = weight.shape[:2]
    if x.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"upsample_conv2d: x of shape {tuple(x.shape)} and weight of shape "
            f"{tuple(weight.shape)} do not fit; expected [N, Cin, H, W] and [Cout, Cin, 3, 3]"
        )
    if not supported(channels_in, channels_out):
        raise ValueError(
            f"upsample_conv2d: the kernel does not take {channels_in} to {channels_out} channels; "
            "use operators='reference'"
        )
    if not x.is_contiguous(memory_format=LAST):
        raise ValueError(
            f"upsample_conv2d: x of shape {tuple(x.shape)} has strides {x.stride()}; "
            "convert it with .contiguous(memory_format=torch.channels_last)"
        )
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if len(dtypes) > 1:
        raise ValueError(f"upsample_conv2d: tensors of one dtype are needed, got {dtypes}")
    y = _doubled(x, channels_out)
    count, _, height, width = x.shape
    config = Config.for_shape(channels_in, channels_out)
    second = config.channels_2 or config.channels
    kernels = parity_weights(weight).reshape(4 * channels_out, 4 * channels_in)
    grid = y.permute(0, 2, 3, 1).view(count, height, 2, width, 2 * channels_out)

    def matrix(channels: int) -> Any:
        return describe(kernels, [channels, config.chunk])

    def boxes(channels: int) -> Any:
        return describe(grid, [1, config.rows, 1, config.columns, channels])

    rows = triton.cdiv(height, config.rows)
    columns = triton.cdiv(width, config.columns)
    parts = channels_out // (config.channels + config.channels_2)
    plain = carrying()  # see `gen3r_kernels.carried`
    launch(_upsample_kernel)[(parts * 4 * columns * rows * count,)](
        describe(x.permute(0, 2, 3, 1), [1, config.rows, config.columns, config.chunk]),
        matrix(config.channels),
        matrix(second),
        weight if bias is None else bias,
        *((grid, None) if plain else (boxes(config.channels), boxes(second))),
        rows,
        columns,
        *((height, width) if plain else (None, None)),
        channels_in,
        channels_out,
        bias is not None,
        "ieee" if x.dtype == torch.float32 else "tf32",  # the latter means nothing to bf16
        config.rows,
        config.columns,
        config.channels,
        config.channels_2,
        config.chunk,
        plain,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y


@upsample_conv2d_kernel.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _doubled(x, weight.shape[0])


def upsample_conv2d_reference(
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin, 3, 3]
    bias: Tensor | None,  # [Cout]
) -> Tensor:  # [N, Cout, 2 H, 2 W] float32
    """The definition in float32."""
    return _library(x.float(), weight.float(), None if bias is None else bias.float())


def _library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None  # type: ignore[attr-defined]


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor
) -> tuple[Tensor | None, ...]:
    """The library's backward over u; a value of x gets what its four copies get."""
    x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    has_bias = ctx.has_bias  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    du, dweight, dbias = torch.ops.aten.convolution_backward(
        dy,
        F.interpolate(x, scale_factor=2.0, mode="nearest"),
        weight,
        [weight.shape[0]] if has_bias else None,
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        1,
        [needs[0], needs[1], has_bias and needs[2]],
    )
    return (4 * F.avg_pool2d(du, 2) if needs[0] else None), dweight, dbias


upsample_conv2d_kernel.register_autograd(_differentiate, setup_context=_save)


def upsample_conv2d(
    x: Tensor,  # [N, Cin, H, W]
    weight: Tensor,  # [Cout, Cin, 3, 3]
    bias: Tensor | None,  # [Cout]
    *,
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor:  # [N, Cout, 2 H, 2 W], dtype of x
    """Nearest-neighbour doubling and a 3x3 convolution with zero padding; differentiable.

    ``auto`` takes the kernel for channels-last x (`torch.channels_last`) of the widths that it
    `supports`, ``triton`` rearranges x for it; the library's two steps do the rest.

    Raises
    ------
    ValueError : shapes or dtypes that do not fit.
    """
    channels_out, channels_in = weight.shape[:2]
    kernel = use_triton("upsample_conv2d", x, x.dtype, backends)
    kernel = kernel and supported(channels_in, channels_out)
    if kernel and (backends.operators == "triton" or x.is_contiguous(memory_format=LAST)):
        return torch.ops.gen3r.upsample_conv2d(x.contiguous(memory_format=LAST), weight, bias)
    return _library(x, weight, bias)


def compile_cases() -> list[CompileCase]:
    """The widths of the appearance VAE's decoder."""
    cases = []
    for channels_in, channels_out in ((384, 192), (192, 96)):
        config = Config.for_shape(channels_in, channels_out)
        second = config.channels_2 or config.channels
        y, y_2 = (
            f"tensordesc<bf16[1, {config.rows}, 1, {config.columns}, {n}]>"
            for n in (config.channels, second)
        )
        cases.append(
            CompileCase(
                f"{channels_in} to {channels_out}",
                _upsample_kernel,
                {
                    "x": f"tensordesc<bf16[1, {config.rows}, {config.columns}, {config.chunk}]>",
                    "weight": f"tensordesc<bf16[{config.channels}, {config.chunk}]>",
                    "weight_2": f"tensordesc<bf16[{second}, {config.chunk}]>",
                    "bias": "*bf16",
                    "y": y,
                    "y_2": y_2,
                    "rows": "i32",
                    "columns": "i32",
                },
                {
                    "height": None,
                    "width": None,
                    "PLAIN": False,
                    "CIN": channels_in,
                    "COUT": channels_out,
                    "HAS_BIAS": True,
                    "PRECISION": "tf32",
                    "BH": config.rows,
                    "BW": config.columns,
                    "BN": config.channels,
                    "BN2": config.channels_2,
                    "BK": config.chunk,
                },
                {"num_warps": config.warps, "num_stages": config.stages},
                ("bias",),
            )
        )
    first = cases[0]
    constants = {n: v for n, v in first.constexprs.items() if n not in ("height", "width")}
    signature = first.signature | {"y": "*bf16", "height": "i32", "width": "i32"}
    signature.pop("y_2")
    constants |= {"y_2": None, "PLAIN": True}
    carried = (f"{first.name}, carried", first.kernel, signature, constants)
    return [*cases, CompileCase(*carried, first.options, ("bias", "y"))]
