# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""Bilinear resize with aligned corners, plus what is added to its result, in one pass.

y[i, j] = the weighted mean of the four pixels around (i (h - 1) / (H - 1), j (w - 1) / (W - 1)),
plus `added[i, j]`, plus a position signal that is separable: the first half of the channels adds a
value of the column, the second half one of the row.

VGGT's depth head enlarges [N, 256, 160, 160] to 320 x 320 and [N, 128, 320, 320] to 560 x 560 with
a position signal. Bytes of the latter for 8 frames: 0.21 GB in, 0.64 GB out: 0.30 ms at the
2.86 TB/s that a copy reaches on an H100. PyTorch writes the resized map, then reads it and a
position plane of its size to write the sum: three times the bytes.

The kernel reads channels-last memory: a row of C values lies at each of the four pixels, so loads
are wide, and neighbouring pixels find theirs in the first-level cache. Weights and sums are
float32; the result is rounded once. The gradient of x has a kernel of its own
(`resize_bilinear_backward`), that of `added` is the gradient of y, the position tables' are sums
of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.carried import empty_last, launch, operator
from gen3r_kernels.dispatch import CompileCase, use_triton
from gen3r_kernels.resize_bilinear_backward import resize_bilinear_backward

LAST = torch.channels_last
MAX_CHANNELS = 4096
INPUTS = (torch.float32, torch.float16, torch.bfloat16)

Position = tuple[Tensor, Tensor]  # by column [W, C / 2] and by row [H, C / 2], float32


@triton.jit
def _resize_kernel(
    x,  # [N, height, width, C]
    across,  # [out_width, C / 2] or None
    down,  # [out_height, C / 2] or None
    added,  # as y, or None
    y,  # [N, out_height, out_width, C]
    height,
    width,
    out_height,
    out_width,
    row_scale,  # (height - 1) / (out_height - 1)
    column_scale,
    tiles,  # programs in a row of y
    C: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
):
    program = tl.program_id(0)
    line = program // tiles  # row of y, over all images
    i = line % out_height
    image = (line // out_height).to(tl.int64)
    j = (program - line * tiles) * BW + tl.arange(0, BW)
    c = tl.arange(0, BC)

    source_row = i.to(tl.float32) * row_scale
    upper = tl.minimum(source_row.to(tl.int32), height - 1)
    lower = tl.minimum(upper + 1, height - 1)
    low = source_row - upper.to(tl.float32)
    source_column = j.to(tl.float32) * column_scale
    left = tl.minimum(source_column.to(tl.int32), width - 1)
    right = tl.minimum(left + 1, width - 1)
    far = (source_column - left.to(tl.float32))[:, None]

    inside = (j < out_width)[:, None] & (c < C)[None, :]
    above = x + (image * height + upper) * width * C
    below = x + (image * height + lower) * width * C
    near_offsets = left[:, None] * C + c[None, :]
    far_offsets = right[:, None] * C + c[None, :]
    above_near = tl.load(above + near_offsets, mask=inside, other=0.0).to(tl.float32)
    above_far = tl.load(above + far_offsets, mask=inside, other=0.0).to(tl.float32)
    below_near = tl.load(below + near_offsets, mask=inside, other=0.0).to(tl.float32)
    below_far = tl.load(below + far_offsets, mask=inside, other=0.0).to(tl.float32)
    value = (1.0 - low) * ((1.0 - far) * above_near + far * above_far)
    value += low * ((1.0 - far) * below_near + far * below_far)

    place = line.to(tl.int64) * out_width * C + j[:, None] * C + c[None, :]
    if added is not None:
        value += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
    if across is not None:
        HALF: tl.constexpr = C // 2
        first = inside & (c < HALF)[None, :]
        second = inside & (c >= HALF)[None, :]
        value += tl.load(across + j[:, None] * HALF + c[None, :], mask=first, other=0.0)
        value += tl.load(
            down + i * HALF + (c - HALF)[None, :] + 0 * j[:, None], mask=second, other=0.0
        )
    tl.store(y + place, value.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Config:
    """Pixels of a row and padded channels of one program, and its warps."""

    pixels: int
    channels: int
    warps: int

    @classmethod
    def for_shape(cls, channels: int) -> Config:
        """2,048 values a program: 16 a thread, read as whole 16-byte words."""
        padded = max(16, triton.next_power_of_2(channels))
        return cls(max(1, 2048 // padded), padded, 4)


def _scale(size: int, out: int) -> float:
    return (size - 1) / (out - 1) if out > 1 else 0.0


@operator("resize_bilinear")
def _resize(
    x: Tensor,  # [N, C, h, w] channels-last
    height: int,
    width: int,
    across: Tensor | None,  # [width, C / 2] float32, contiguous
    down: Tensor | None,  # [height, C / 2] float32, contiguous
    added: Tensor | None,  # [N, C, height, width] channels-last
) -> Tensor:  # [N, C, height, width] channels-last
    if not x.is_contiguous(memory_format=LAST) or x.dtype not in INPUTS:
        raise ValueError(
            f"resize_bilinear: x {list(x.shape)} {x.dtype} with strides {x.stride()}; the kernel "
            f"takes channels-last memory of {INPUTS}; use operators='reference'"
        )
    count, channels, rows, columns = x.shape
    if channels > MAX_CHANNELS:
        raise ValueError(
            f"resize_bilinear: {channels} channels are above {MAX_CHANNELS}; use "
            "operators='reference'"
        )
    y = _empty(x, height, width)
    if y.numel() == 0:
        return y
    config = Config.for_shape(channels)
    tiles = triton.cdiv(width, config.pixels)
    launch(_resize_kernel)[(tiles * height * count,)](
        x,
        across,
        down,
        added,
        y,
        rows,
        columns,
        height,
        width,
        _scale(rows, height),
        _scale(columns, width),
        tiles,
        C=channels,
        BW=config.pixels,
        BC=config.channels,
        num_warps=config.warps,
    )
    return y


def _empty(x: Tensor, height: int, width: int) -> Tensor:
    size = (*x.shape[:2], height, width)
    return empty_last(size, x.dtype, x.device)


@_resize.register_fake
def _(
    x: Tensor,
    height: int,
    width: int,
    across: Tensor | None,
    down: Tensor | None,
    added: Tensor | None,
) -> Tensor:
    return _empty(x, height, width)


def resize_bilinear_reference(
    x: Tensor,  # [N, C, h, w]
    size: tuple[int, int],
    position: Position | None = None,
    added: Tensor | None = None,  # [N, C, H, W]
) -> Tensor:  # [N, C, H, W] float32
    """The definition in float32."""
    return _plain(x.float(), size, position, None if added is None else added.float())


def _plain(
    x: Tensor, size: tuple[int, int], position: Position | None, added: Tensor | None
) -> Tensor:
    """PyTorch's operators in the dtype of x."""
    y = F.interpolate(x, size, mode="bilinear", align_corners=True)
    if added is not None:
        y = y + added
    return y if position is None else add_position(y, position)


def add_position(
    x: Tensor,  # [N, C, h, w]
    position: Position,
) -> Tensor:  # [N, C, h, w], dtype of x
    """x plus the position signal, whose plane [C, h, w] is written out."""
    across, down = position
    columns = across.expand(len(down), -1, -1)
    rows = down[:, None].expand(-1, len(across), -1)
    return x + torch.cat([columns, rows], dim=-1).to(x.dtype).permute(2, 0, 1)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.size = inputs[0].shape[2:]  # type: ignore[attr-defined]


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    dx = resize_bilinear_backward(dy, *ctx.size) if needs[0] else None  # type: ignore[attr-defined]
    half = dy.shape[1] // 2
    across = dy[:, :half].sum((0, 2), dtype=torch.float32).T if needs[3] else None
    down = dy[:, half:].sum((0, 3), dtype=torch.float32).T if needs[4] else None
    return dx, None, None, across, down, dy if needs[5] else None


_resize.register_autograd(_differentiate, setup_context=_save)


def _check(
    x: Tensor, size: tuple[int, int], position: Position | None, added: Tensor | None
) -> None:
    if x.dim() != 4 or 0 in x.shape[2:] or min(size) < 1:
        raise ValueError(
            f"resize_bilinear: x of shape {list(x.shape)} to {size}; expected [N, C, h, w] with "
            "pixels and a size of at least 1 x 1"
        )
    expected = (*x.shape[:2], *size)
    if added is not None and added.shape != expected:
        raise ValueError(
            f"resize_bilinear: added has shape {list(added.shape)}; expected {list(expected)}"
        )
    if position is not None:
        half = x.shape[1] // 2
        shapes = tuple(tuple(t.shape) for t in position)
        if x.shape[1] % 2 or shapes != ((size[1], half), (size[0], half)):
            raise ValueError(
                f"resize_bilinear: position tables {shapes} do not fit {x.shape[1]} channels of "
                f"{size}; expected [{size[1]}, C / 2] and [{size[0]}, C / 2] of even C"
            )


def resize_bilinear(
    x: Tensor,  # [N, C, h, w]
    size: tuple[int, int],  # H, W
    *,
    position: Position | None = None,
    added: Tensor | None = None,  # [N, C, H, W]
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor:  # [N, C, H, W], dtype of x
    """Resize with aligned corners; add a map and a position signal to the result. Differentiable.

    ``auto`` takes the kernel for channels-last x on a GPU in half precision.

    Raises
    ------
    ValueError : shapes that do not fit; on the Triton path by name (`operators="triton"`) memory or
        dtypes that the kernel does not take.
    """
    _check(x, size, position, added)
    kernel = use_triton("resize_bilinear", x, x.dtype, backends)
    if backends.operators == "triton":
        x = x.contiguous(memory_format=LAST)
    elif kernel:
        kernel = x.is_contiguous(memory_format=LAST) and x.shape[1] <= MAX_CHANNELS
    if not kernel:
        return _plain(x, size, position, added)
    across, down = position or (None, None)
    return torch.ops.gen3r.resize_bilinear(
        x,
        *size,
        None if across is None else across.float().contiguous(),
        None if down is None else down.float().contiguous(),
        None if added is None else added.contiguous(memory_format=LAST),
    )


def compile_cases() -> list[CompileCase]:
    """Each of the depth head's uses: alone, with another level, with positions."""
    cases = []
    for name, channels, position, added in (
        ("256 channels", 256, False, False),
        ("256 channels, added", 256, False, True),
        ("128 channels, position", 128, True, False),
    ):
        config = Config.for_shape(channels)
        absent: dict[str, None] = {}
        pointers = {"x": "*bf16", "y": "*bf16"}
        for table in ("across", "down"):
            if position:
                pointers[table] = "*fp32"
            else:
                absent[table] = None
        if added:
            pointers["added"] = "*bf16"
        else:
            absent["added"] = None
        sizes = ("height", "width", "out_height", "out_width", "tiles")
        cases.append(
            CompileCase(
                name,
                _resize_kernel,
                pointers
                | dict.fromkeys(sizes, "i32")
                | dict.fromkeys(("row_scale", "column_scale"), "fp32"),
                {"C": channels, "BW": config.pixels, "BC": config.channels, **absent},
                {"num_warps": config.warps},
                tuple(pointers),
            )
        )
    return cases
