# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""The implicit matrix product behind `gen3r_kernels.causal_conv3d`, on channels-last memory.

It multiplies [frames, H, W, Cin] by [Cout, kt * kh * kw * Cin]: a program owns a rectangle of
pixels of one frame and some output channels, and walks over taps and chunks of input channels. The
tensor memory accelerator fetches each tap's rectangle as a box and fills what lies outside the
image with zeros, so there is neither a padded copy nor a mask. Frames before x come from the past's
own descriptor, so there is no concatenation; without a past their taps are skipped. At the end the
program adds the residual to its float32 sums, or puts the two halves of the channels into two
frames in a row (`pairs`), so that neither takes a pass over memory of its own.

Inputs of 8 channels (RGB, filled up) would give products of 8 for each of 27 taps. There the three
taps of a row are one tap of 24 channels: a descriptor with overlapping strides reads each pixel
with its neighbours.

What bounds it on an H100: the 700 W of the card, inside a decoder that runs for 0.3 s (1.7 GHz).
Alone for some milliseconds, at 2.0 GHz, other configurations are the faster: 256 pixels by 96
channels on one warpgroup 522 TFLOP/s against 421, in the decoder 384 against 397; 128 by 192 on
one warpgroup 596 against 520, in the decoder 588 against 643. So the choice was made inside the
decoder. Tried and slower at 96: 256 pixels on two warpgroups (362), 128 output channels instead of
64 + 32 (281), one program for two frames (222), three chunks a step (415), a cap of 128 registers
(128), programs that walk over frames first (415), two neighbouring pixels as one of 192 channels
with a quarter of the weights zero (290 in the decoder).

RMSNorm and SiLU of the input are an operator of their own (`rms_norm_silu`). In here they would be
computed for each of 27 taps: 4,096 exponentials for each chunk of 32 channels keep the special
function units of a multiprocessor busy for 256 cycles, its products the tensor cores for 192.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels.carried import carrying, describe, empty_last, launch, operator
from gen3r_kernels.dispatch import CompileCase


@triton.jit
def tile_places(
    f,
    h,
    w,
    c,
    height,
    width,
    CHANNELS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
):
    """Offsets and mask [BH * BW, BN] of a rectangle of pixels in [N, height, width, CHANNELS]."""
    pixel = tl.arange(0, BH * BW)
    i = h + pixel // BW
    j = w + pixel % BW
    o = c + tl.arange(0, BN)
    place = (f.to(tl.int64) * height + i) * width + j
    inside = ((i < height) & (j < width))[:, None] & (o < CHANNELS)[None, :]
    return place[:, None] * CHANNELS + o[None, :], inside


@triton.jit
def _forward_kernel(
    x,  # descriptor of [B * frames, H, W, CIN]
    past,  # descriptor of [B * PAST, H, W, CIN] if HAS_PAST
    weight,  # descriptor of [COUT, KT * KH * KW * CIN], boxes of BN rows
    weight_2,  # the same, boxes of BN2 rows
    bias,  # [COUT] if HAS_BIAS
    residual,  # descriptor as y if HAS_RESIDUAL
    residual_2,  # as y_2
    y,  # descriptor of [B * frames_out * HALVES, H, W, COUT / HALVES], boxes of BN channels
    y_2,  # the same, boxes of BN2 channels
    frames,
    frames_out,
    rows,  # rectangles in the height of a frame
    columns,  # rectangles in its width
    height,  # pixels, if PLAIN; else None
    width,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    KT: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE: tl.constexpr,  # in time
    PAST: tl.constexpr,  # frames before x
    HAS_PAST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HALVES: tl.constexpr,  # frames that the output channels of one frame are spread over
    PRECISION: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BN2: tl.constexpr,
    BK: tl.constexpr,
    PLAIN: tl.constexpr,  # y and residual are pointers, y_2 and residual_2 None
):
    BM: tl.constexpr = BH * BW
    PARTS: tl.constexpr = (COUT + BN + BN2 - 1) // (BN + BN2)
    program = tl.program_id(0)
    n = (program % PARTS) * (BN + BN2)
    program //= PARTS
    w = (program % columns) * BW
    program //= columns
    h = (program % rows) * BH
    program //= rows
    t = program % frames_out
    b = program // frames_out

    CHUNKS: tl.constexpr = (CIN + BK - 1) // BK
    FRAME: tl.constexpr = KH * KW * CHUNKS  # steps that read one frame
    sums = tl.zeros([BM, BN], tl.float32)
    if BN2 > 0:
        sums_2 = tl.zeros([BM, BN2], tl.float32)
    before = tl.maximum(PAST - t * STRIDE, 0)  # taps that fall before x
    if HAS_PAST:
        for i in range(0, before * FRAME):
            tap = i // CHUNKS
            kt = tap // (KH * KW)
            kh = (tap // KW) % KH
            kw = tap % KW
            f = b * PAST + t * STRIDE + kt
            c = (i - tap * CHUNKS) * BK
            a = past.load([f, h + kh - KH // 2, w + kw - KW // 2, c]).reshape(BM, BK)
            k = tap * CIN + c
            sums = tl.dot(a, weight.load([n, k]).T, sums, input_precision=PRECISION)
            if BN2 > 0:
                second = weight_2.load([n + BN, k]).T
                sums_2 = tl.dot(a, second, sums_2, input_precision=PRECISION)
    for i in range(before * FRAME, KT * FRAME):
        tap = i // CHUNKS
        kt = tap // (KH * KW)
        kh = (tap // KW) % KH
        kw = tap % KW
        f = b * frames + t * STRIDE + kt - PAST
        c = (i - tap * CHUNKS) * BK
        a = x.load([f, h + kh - KH // 2, w + kw - KW // 2, c]).reshape(BM, BK)
        k = tap * CIN + c
        sums = tl.dot(a, weight.load([n, k]).T, sums, input_precision=PRECISION)
        if BN2 > 0:
            second = weight_2.load([n + BN, k]).T
            sums_2 = tl.dot(a, second, sums_2, input_precision=PRECISION)

    WIDTH: tl.constexpr = COUT // HALVES
    f = (b * frames_out + t) * HALVES + n // WIDTH
    c = n % WIDTH
    o = n + tl.arange(0, BN)
    if HAS_BIAS:
        sums += tl.load(bias + o, mask=o < COUT, other=0.0).to(tl.float32)[None, :]
    if PLAIN:
        places, inside = tile_places(f, h, w, c, height, width, WIDTH, BH, BW, BN)
        if HAS_RESIDUAL:
            sums += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + places, sums.to(y.dtype.element_ty), mask=inside)
    else:
        if HAS_RESIDUAL:
            sums += residual.load([f, h, w, c]).reshape(BM, BN).to(tl.float32)
        y.store([f, h, w, c], sums.to(y.dtype).reshape(1, BH, BW, BN))  # cut at the borders
    if BN2 > 0:
        o = n + BN + tl.arange(0, BN2)
        if HAS_BIAS:
            sums_2 += tl.load(bias + o, mask=o < COUT, other=0.0).to(tl.float32)[None, :]
        if PLAIN:
            places, inside = tile_places(f, h, w, c + BN, height, width, WIDTH, BH, BW, BN2)
            if HAS_RESIDUAL:
                sums_2 += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
            tl.store(y + places, sums_2.to(y.dtype.element_ty), mask=inside)
        else:
            if HAS_RESIDUAL:
                sums_2 += residual_2.load([f, h, w, c + BN]).reshape(BM, BN2).to(tl.float32)
            y_2.store([f, h, w, c + BN], sums_2.to(y.dtype).reshape(1, BH, BW, BN2))


@dataclass(frozen=True)
class Config:
    """Rectangle of pixels, output channels, chunk of input channels, warps and pipeline stages.

    96 and 192 channels are no powers of two: a program sums 64 + 32 or 128 + 64 of them with the
    same pixels.
    """

    rows: int
    columns: int
    channels: int
    channels_2: int
    chunk: int
    warps: int
    stages: int

    @classmethod
    def for_shape(cls, channels_in: int, channels_out: int) -> Config:
        """The fastest inside the two autoencoders on an H100, which 700 W bind there (the module's
        docstring)."""
        chunk = max(16, min(64, channels_in & -channels_in))
        if channels_in == 24:  # `_windows`; what is read beyond is zeros
            chunk = 32
        if channels_out % 128 == 96:
            wide = channels_in == 24
            return cls(16 if wide else 8, 16, 64, 32, chunk, 4, 4 if chunk < 64 else 3)
        if channels_out % 192 == 0 and chunk == 64:
            return cls(16, 16, 128, 64, chunk, 8, 3)
        if channels_out % 192 == 0:
            return cls(8, 16, 128, 64, chunk, 4, 3)
        if channels_out <= 16:
            return cls(16, 32, 16, 0, chunk, 8, 3)
        if channels_out < 128:
            return cls(8, 16, triton.next_power_of_2(channels_out), 0, chunk, 4, 3)
        return cls(8, 16, 128, 0, chunk, 4, 3)


def _rows(x: Tensor) -> Tensor:
    """[B, C, T, H, W] in channels-last memory as [B * T, H, W, C]."""
    rows = x.permute(0, 2, 3, 4, 1)
    if not rows.is_contiguous():
        raise ValueError(
            f"causal_conv3d: a tensor of shape {tuple(x.shape)} has strides {x.stride()}; "
            "convert it with .contiguous(memory_format=torch.channels_last_3d)"
        )
    return rows.flatten(0, 1)


def _is_narrow(channels_in: int, width: int) -> bool:
    """Whether the taps of a row are taken together: three pixels of 8 channels lie in a row."""
    return channels_in == 8 and width == 3


def _windows(rows: Tensor) -> Tensor:
    """[N, H, W, 8] as [N, H, W, 24]: each pixel with its left and right neighbour, overlapping."""
    count, height, width, channels = rows.shape
    padded = F.pad(rows, (0, 0, 1, 1))
    line = (width + 2) * channels
    size = (count, height, width, 3 * channels)
    return padded.as_strided(size, (height * line, line, channels, 1))


def _past_frames(weight: Tensor, past: Tensor | None) -> int:
    return weight.shape[2] - 1 if past is None else past.shape[2]


def _empty_output(
    x: Tensor,
    weight: Tensor,
    past: Tensor | None,
    residual: Tensor | None,
    stride: int,
    pairs: bool,
) -> Tensor:
    frames = (_past_frames(weight, past) + x.shape[2] - weight.shape[2]) // stride + 1
    halves = 2 if pairs else 1
    size = (x.shape[0], weight.shape[0] // halves, frames * halves, *x.shape[3:])
    dtype = x.dtype if residual is None else residual.dtype
    return empty_last(size, dtype, x.device)


def pairs_supported(channels_in: int, channels_out: int) -> bool:
    """Whether no program's channels lie in both halves."""
    config = Config.for_shape(channels_in, channels_out)
    return channels_out // 2 % (config.channels + config.channels_2) == 0


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, pairs: bool
) -> None:
    if x.dim() != 5 or weight.dim() != 5 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"causal_conv3d: x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)} "
            "do not fit; expected [B, Cin, T, H, W] and [Cout, Cin, kt, kh, kw]"
        )
    if x.shape[1] % 8 or weight.shape[0] % 8:
        raise ValueError(
            f"causal_conv3d: {x.shape[1]} to {weight.shape[0]} channels are no multiples of 8, "
            "which the kernel needs; use operators='reference'"
        )
    sides = (x.shape[:2], x.shape[3:])
    if past is not None and (past.shape[:2], past.shape[3:]) != sides:
        raise ValueError(
            f"causal_conv3d: past of shape {tuple(past.shape)} does not fit x {tuple(x.shape)}"
        )
    if past is not None and past.shape[2] >= weight.shape[2]:
        raise ValueError(
            f"causal_conv3d: {past.shape[2]} frames of the past for {weight.shape[2]} taps in "
            f"time; give at most {weight.shape[2] - 1}"
        )
    if pairs and not pairs_supported(x.shape[1], weight.shape[0]):
        raise ValueError(
            f"causal_conv3d: the kernel cannot halve {weight.shape[0]} output channels into pairs; "
            "use operators='reference'"
        )
    dtypes = {t.dtype for t in (x, weight, bias, past) if t is not None}
    if len(dtypes) > 1:
        raise ValueError(f"causal_conv3d: tensors of one dtype are needed, got {dtypes}")


@operator("causal_conv3d")
def causal_conv3d_kernel(
    x: Tensor,  # [B, Cin, T, H, W] channels-last
    weight: Tensor,  # [Cout, Cin, kt, kh, kw], odd kh and kw; rearranged unless channels-last
    bias: Tensor | None,  # [Cout]
    past: Tensor | None,  # [B, Cin, P, H, W] channels-last; P = 0 where x begins with its past
    residual: Tensor | None,  # as the result, in any dtype
    stride: int,  # in time
    pairs: bool,
) -> Tensor:  # [B, Cout, T', H, W], or [B, Cout / 2, 2 T', H, W] for pairs; channels-last
    """The kernel's launch for tensors in the memory format that it reads."""
    _check(x, weight, bias, past, pairs)
    y = _empty_output(x, weight, past, residual, stride, pairs)
    if residual is not None and residual.shape != y.shape:
        raise ValueError(
            f"causal_conv3d: residual of shape {tuple(residual.shape)}; the result has "
            f"{tuple(y.shape)}"
        )
    channels_out, channels_in, *kernel = weight.shape
    narrow = _is_narrow(channels_in, kernel[2])
    if narrow:
        channels_in, kernel[2] = 24, 1
    config = Config.for_shape(channels_in, channels_out)
    second = config.channels_2 or config.channels

    def boxes(t: Tensor, channels: int) -> Any:
        return describe(_rows(t), [1, config.rows, config.columns, channels])

    def source(t: Tensor) -> Any:
        if not narrow:
            return boxes(t, config.chunk)
        shape = [1, config.rows, config.columns, config.chunk]
        return describe(_windows(_rows(t)), shape)

    def matrix(channels: int) -> Any:
        rows = weight.permute(0, 2, 3, 4, 1).reshape(channels_out, -1)
        return describe(rows, [channels, config.chunk])

    rows = triton.cdiv(x.shape[3], config.rows)
    columns = triton.cdiv(x.shape[4], config.columns)
    parts = triton.cdiv(channels_out, config.channels + config.channels_2)
    has_past = past is not None and past.shape[2] > 0
    plain = carrying()  # see `gen3r_kernels.carried`
    results: tuple[Any, ...] = (None if residual is None else _rows(residual), None, _rows(y), None)
    if not plain:
        both = (y if residual is None else residual, y)
        results = tuple(boxes(t, n) for t in both for n in (config.channels, second))
    halves = 2 if pairs else 1
    frames_out = y.shape[2] // halves
    launch(_forward_kernel)[(parts * rows * columns * frames_out * x.shape[0],)](
        source(x),
        source(past if past is not None and has_past else x),
        matrix(config.channels),
        matrix(second),
        weight if bias is None else bias,
        *results,
        x.shape[2],
        frames_out,
        rows,
        columns,
        *(x.shape[3:] if plain else (None, None)),
        channels_in,
        channels_out,
        *kernel,
        stride,
        _past_frames(weight, past),
        has_past,
        bias is not None,
        residual is not None,
        halves,
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


@causal_conv3d_kernel.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    residual: Tensor | None,
    stride: int,
    pairs: bool,
) -> Tensor:
    return _empty_output(x, weight, past, residual, stride, pairs)


def compile_cases() -> list[CompileCase]:
    """Every width of the two autoencoders that the kernel takes, and other kernel sizes."""
    cases = []
    for channels_in, channels_out, kernel in (
        (96, 96, (3, 3, 3)),
        (192, 96, (1, 3, 3)),
        (96, 192, (3, 3, 3)),
        (192, 192, (3, 3, 3)),
        (384, 192, (1, 3, 3)),
        (192, 384, (3, 3, 3)),
        (384, 384, (3, 3, 3)),
        (384, 768, (3, 1, 1)),
        (16, 384, (3, 3, 3)),
        (128, 128, (3, 3, 3)),
        (24, 96, (3, 3, 1)),
        (96, 8, (3, 3, 3)),
    ):
        config = Config.for_shape(channels_in, channels_out)
        second = config.channels_2 or config.channels
        box, y, y_2 = (
            f"tensordesc<bf16[1, {config.rows}, {config.columns}, {n}]>"
            for n in (config.chunk, config.channels, second)
        )
        cases.append(
            CompileCase(
                f"{channels_in} to {channels_out}, {'x'.join(map(str, kernel))}",
                _forward_kernel,
                {
                    "x": box,
                    "past": box,
                    "weight": f"tensordesc<bf16[{config.channels}, {config.chunk}]>",
                    "weight_2": f"tensordesc<bf16[{second}, {config.chunk}]>",
                    "bias": "*bf16",
                    "residual": y,
                    "residual_2": y_2,
                    "y": y,
                    "y_2": y_2,
                    **{n: "i32" for n in ("frames", "frames_out", "rows", "columns")},
                },
                {
                    "height": None,
                    "width": None,
                    "PLAIN": False,
                    "CIN": channels_in,
                    "COUT": channels_out,
                    **dict(zip(("KT", "KH", "KW"), kernel, strict=True)),
                    "STRIDE": 1,
                    "PAST": kernel[0] - 1,
                    "HAS_PAST": kernel[0] > 1,
                    "HAS_BIAS": True,
                    "HAS_RESIDUAL": channels_in == channels_out,
                    "HALVES": 2 if kernel == (3, 1, 1) else 1,
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
    return cases + [_plain_case(case) for case in cases[:1] + cases[3:4]]


def _plain_case(case: CompileCase) -> CompileCase:
    """A case as it is carried: see `gen3r_kernels.carried`."""
    pointers = dict.fromkeys(("residual", "y"), "*bf16")
    signature = case.signature | pointers | dict.fromkeys(("height", "width"), "i32")
    absent = dict.fromkeys(("residual_2", "y_2"))
    constants = {n: v for n, v in case.constexprs.items() if n not in ("height", "width")}
    return CompileCase(
        f"{case.name}, carried",
        case.kernel,
        {n: kind for n, kind in signature.items() if n not in absent},
        {**constants, **absent, "PLAIN": True},
        case.options,
        (*case.divisible, *pointers),
    )
