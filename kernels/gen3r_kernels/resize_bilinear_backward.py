# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""Backward of `resize_bilinear` with respect to the map that was resized.

The resize is separable, y = R x C^T, so dx = R^T dy C. Row o of y takes (1 - low) of row i of x and
`low` of row i + 1, where i + low = o (h - 1) / (H - 1). With H_o = dy[o] C and the sums over the
rows o that lie between i and i + 1,

    own_i = sum (1 - low) H_o,   next_i = sum low H_o,   dx[i] = own_i + next_(i - 1).

A program goes down a strip of rows of x and hands `next` on, so that every H_o is computed once (at
a strip's upper edge twice). H_o is a gather: column j of x collects the columns q of y with
|q (w - 1) / (W - 1) - j| < 1, at most ceil(2 (W - 1) / (w - 1)), which neighbouring columns find in
the first-level cache. Nothing is added atomically: results repeat bit by bit. Places are exact
integers, weights and sums float32; the result is rounded once.

Bytes at [4, 128, 320, 320] from [4, 128, 560, 560] in bf16: 0.32 GB in, 0.10 GB out: 0.15 ms at the
2.86 TB/s that a copy reaches on an H100.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.dispatch import CompileCase

LAST = torch.channels_last
MOST_TAPS, MOST_ROWS = 8, 4  # loads that are written out; more of them take a loop
PROGRAMS = 1024  # a few waves over the 132 multiprocessors of an H100


@triton.jit
def _first(i, size, out):
    """First index of y that lies at or beyond index i of x; `out` beyond the last index of x."""
    span = tl.maximum(size - 1, 1)
    ahead = tl.maximum((i * (out - 1) + span - 1) // span, 1)  # only index 0 lies at 0
    return tl.where(i <= 0, 0, tl.where(i >= size, out, ahead))


@triton.jit
def _resize_backward_kernel(
    dy,  # [N, out_height, out_width, C]
    dx,  # [N, height, width, C]
    height,
    width,
    out_height,
    out_width,
    strips,  # programs over the rows of dx
    tiles,  # programs over the columns of dx
    C: tl.constexpr,
    STRIP: tl.constexpr,  # rows of dx a program
    BW: tl.constexpr,
    BC: tl.constexpr,
    ROWS: tl.constexpr,  # of y whose loads are under way at once
    TAPS: tl.constexpr,  # columns of y that a column of dx collects, in CHUNKS loops
    CHUNKS: tl.constexpr,
):
    program = tl.program_id(0)
    part = program // tiles
    j = (program - part * tiles) * BW + tl.arange(0, BW)
    c = tl.arange(0, BC)
    image = (part // strips).to(tl.int64)
    top = (part % strips) * STRIP
    inside = (j < width)[:, None] & (c < C)[None, :]
    row_step = 1.0 / tl.maximum(out_height - 1, 1).to(tl.float32)
    column_step = 1.0 / tl.maximum(out_width - 1, 1).to(tl.float32)
    # Strictly behind the column before j: at that column itself the weight is 0.
    nearest = (j - 1) * (out_width - 1) // tl.maximum(width - 1, 1) + 1
    nearest = tl.where(j == 0, 0, nearest)

    handed = tl.zeros([BW, BC], tl.float32)
    for step in tl.range(0, tl.minimum(STRIP, height - top) + 1):
        i = top - 1 + step  # the row above the strip only hands on
        own = tl.zeros([BW, BC], tl.float32)
        following = tl.zeros([BW, BC], tl.float32)
        end = _first(i + 1, height, out_height)
        for start in tl.range(_first(i, height, out_height), end, ROWS):
            for r in tl.static_range(ROWS):
                o = start + r
                limit = tl.where(o < end, out_width, 0)
                source = dy + (image * out_height + o) * out_width * C
                line = tl.zeros([BW, BC], tl.float32)
                for chunk in range(CHUNKS):
                    for tap in tl.static_range(TAPS):
                        q = nearest + (chunk * TAPS + tap)
                        away = tl.abs(q * (width - 1) - j * (out_width - 1))
                        weight = 1.0 - away.to(tl.float32) * column_step
                        wanted = (q < limit) & (weight > 0.0)
                        value = tl.load(
                            source + q[:, None] * C + c[None, :],
                            mask=inside & wanted[:, None],
                            other=0.0,
                        )
                        line += weight[:, None] * value.to(tl.float32)
                low = (o * (height - 1) - i * (out_height - 1)).to(tl.float32) * row_step
                own += (1.0 - low) * line
                following += low * line
        place = (image * height + i) * width * C + j[:, None] * C + c[None, :]
        result = (handed + own).to(dx.dtype.element_ty)
        limit = tl.where(i < top, 0, width)
        tl.store(dx + place, result, mask=inside & (j < limit)[:, None])
        handed = following


@dataclass(frozen=True)
class BackwardConfig:
    """Rows, columns and padded channels of dx of one program, and its warps."""

    strip: int
    columns: int
    channels: int
    warps: int

    @classmethod
    def for_shape(cls, count: int, channels: int, height: int, width: int) -> BackwardConfig:
        """2,048 values of a row at a time, and the longest strip that leaves `PROGRAMS`."""
        padded = max(16, triton.next_power_of_2(channels))
        columns = max(1, 2048 // padded)
        parts = count * triton.cdiv(width, columns)
        strip = next((n for n in (16, 8, 4, 2) if parts * (height // n) >= PROGRAMS), 1)
        return cls(strip, columns, padded, 8 if columns * padded >= 2048 else 4)


def _taps(size: int, out: int) -> int:
    """Indices of y that one index of x reaches at most."""
    return out if size == 1 else max(1, -(-2 * (out - 1) // (size - 1)))


def _constants(size: tuple[int, int], out: tuple[int, int]) -> dict[str, int]:
    """How the loads are written out, for a map of `size` from one of `out`."""
    rows, taps = -(-_taps(size[0], out[0]) // 2), _taps(size[1], out[1])
    few = min(taps, MOST_TAPS)
    return {"ROWS": min(rows, MOST_ROWS), "TAPS": few, "CHUNKS": -(-taps // few)}


def _empty(dy: Tensor, height: int, width: int) -> Tensor:
    size = (*dy.shape[:2], height, width)
    return torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=LAST)


@torch.library.custom_op("gen3r::resize_bilinear_backward", mutates_args=())
def resize_bilinear_backward(
    dy: Tensor,  # [N, C, H, W]
    height: int,  # of what was resized
    width: int,
) -> Tensor:  # [N, C, height, width] channels-last, dtype of dy
    """The launcher; the forward pass has checked the sizes."""
    count, channels, *out = dy.shape
    dx = _empty(dy, height, width)
    if dx.numel() == 0:
        return dx
    config = BackwardConfig.for_shape(count, channels, height, width)
    strips, tiles = triton.cdiv(height, config.strip), triton.cdiv(width, config.columns)
    _resize_backward_kernel[(tiles * strips * count,)](
        dy.contiguous(memory_format=LAST),
        dx,
        height,
        width,
        *out,
        strips,
        tiles,
        C=channels,
        STRIP=config.strip,
        BW=config.columns,
        BC=config.channels,
        num_warps=config.warps,
        **_constants((height, width), (out[0], out[1])),
    )
    return dx


@resize_bilinear_backward.register_fake
def _(dy: Tensor, height: int, width: int) -> Tensor:
    return _empty(dy, height, width)


def compile_cases() -> list[CompileCase]:
    """Each of the depth head's sizes of 560 x 560 pixels, four frames."""
    cases = []
    for channels, size, out in ((256, 20, 40), (256, 160, 320), (128, 320, 560)):
        config = BackwardConfig.for_shape(4, channels, size, size)
        sizes = ("height", "width", "out_height", "out_width", "strips", "tiles")
        launch = {"STRIP": config.strip, "BW": config.columns, "BC": config.channels}
        cases.append(
            CompileCase(
                f"{channels} channels, {size} from {out}",
                _resize_backward_kernel,
                {"dy": "*bf16", "dx": "*bf16"} | dict.fromkeys(sizes, "i32"),
                {"C": channels, **launch, **_constants((size, size), (out, out))},
                {"num_warps": config.warps},
                ("dy", "dx"),
            )
        )
    return cases
