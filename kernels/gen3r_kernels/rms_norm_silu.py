# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""Channel RMSNorm of the VAEs, with SiLU: y = silu(x / max(|x|_2, 1e-12) * sqrt(C) * gamma).

The norm runs over channels (axis 1) at every position of a video [B, C, T, H, W] or an image
[B, C, H, W]. Source: Wan2.1 VAE (arXiv 2503.20314).

Real shapes: C 96 at 560x560 pixels, 192 at 280x280, 384 at 140x140 and 70x70, T 1 to 4 frames;
128 to 512 at 70x70 in the geometry adapter. Bytes: one read and one write of x, in the backward two
reads and one write. [1, 96, 4, 560, 560] in bf16 is 482 MB: 168 us at the 2.86 TB/s that a copy
reaches on an H100, 252 us backward.

Measured on an H100 (copy 2.97 TB/s in that run), channels-last: 168 us, 2.87 TB/s, 97 % of the copy
at [1, 96, 4, 560, 560] and 90 us, 90 % at [1, 192, 4, 280, 280]; channels-first 182 us, 89 %, and
84 %. Rearranging channels-first memory takes 537 us, so both formats have a kernel. Backward with
other tiles 280 us, 87 %; channels-first 569 us, 43 %.

Frames that a causal convolution needs before x (`lead`) are put in front of the result: the norm
writes behind them, so that no concatenation reads and writes everything once more.

The kernels read channels-last memory (a row of C values at each position, `torch.channels_last_3d`)
and channels-first memory (`torch.contiguous_format`) through the same tile of positions x channels;
statistics and arithmetic are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.carried import carrying, empty_last, launch, operator
from gen3r_kernels.dispatch import CompileCase, use_triton

SMALLEST_LENGTH = 1e-12
MAX_CHANNELS = 4096
LEAD_BLOCK = 4096


@triton.jit
def _offsets(
    block, positions, C: tl.constexpr, LAST: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):
    """Offsets and mask of the tile [BP, BC] that starts at position `block` * BP of its sample."""
    c = tl.arange(0, BC)
    p = block * BP + tl.arange(0, BP)
    if LAST:
        start = block.to(tl.int64) * (BP * C)
        offsets = start + tl.arange(0, BP)[:, None] * C + c[None, :]
    else:
        offsets = c[None, :].to(tl.int64) * positions + p[:, None]
    return offsets, (p < positions)[:, None] & (c < C)[None, :]


@triton.jit
def _forward_kernel(
    x,  # [B, positions, C] (LAST) or [B, C, positions]
    gamma,  # [C]
    y,  # [B, lead + positions, C] (LAST) or [B, C, lead + positions]
    positions,
    lead,  # positions of y that are not written here
    C: tl.constexpr,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
    ROOT_C: tl.constexpr,
    SMALLEST: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    offsets, mask = _offsets(tl.program_id(0), positions, C, LAST, BP, BC)
    sample = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BC)
    if LAST:
        y += (sample * (lead + positions) + lead) * C
        target = offsets
    else:
        y += sample * (lead + positions) * C + lead
        target = offsets + c[None, :].to(tl.int64) * lead
    offsets += sample * positions * C
    g = tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(values * values, axis=1)), SMALLEST)
    n = values * (ROOT_C / length)[:, None] * g[None, :]
    if SILU:
        n = n * tl.sigmoid(n)
    tl.store(y + target, n.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _lead_kernel(
    lead,  # [runs, length]
    y,  # [runs, apart], of which the first `length` are written
    length,
    apart,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    run = tl.program_id(1).to(tl.int64)
    values = tl.load(lead + run * length + place, mask=place < length, other=0.0)
    tl.store(y + run * apart + place, values.to(y.dtype.element_ty), mask=place < length)


@triton.jit
def _backward_kernel(
    x,  # [B, positions, C] (LAST) or [B, C, positions]
    gamma,  # [C]
    dy,  # as x
    dx,  # as x
    dgamma,  # [programs, C] float32, partial sums
    positions,
    blocks,  # tiles in a sample
    tiles,  # tiles in all
    C: tl.constexpr,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
    ROOT_C: tl.constexpr,
    SMALLEST: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    STAGES: tl.constexpr,
):
    c = tl.arange(0, BC)
    g = tl.load(gamma + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros([BP, BC], tl.float32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        batch = tile // blocks
        offsets, mask = _offsets(tile - batch * blocks, positions, C, LAST, BP, BC)
        offsets += batch.to(tl.int64) * positions * C
        values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        dn = tl.load(dy + offsets, mask=mask, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(values * values, axis=1))
        scale = (ROOT_C / tl.maximum(length, SMALLEST))[:, None]
        unit = values * scale
        if SILU:
            n = unit * g[None, :]
            s = tl.sigmoid(n)
            dn = dn * s * (1.0 + n * (1.0 - s))
        total += dn * unit
        dn = dn * g[None, :]
        # Below the smallest length the divisor is a constant: no second term.
        inner = tl.where(length < SMALLEST, 0.0, tl.sum(dn * unit, axis=1) / C)
        result = scale * (dn - unit * inner[:, None])
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=mask)
    row = tl.program_id(0) * C
    tl.store(dgamma + row + c, tl.sum(total, axis=0), mask=c < C)


@dataclass(frozen=True)
class Config:
    """Tile of positions x channels, warps, and of the backward the stages of its loads."""

    positions: int
    channels: int
    warps: int
    stages: int

    @classmethod
    def for_shape(cls, channels: int, last: bool) -> Config:
        """All channels of some positions, by what was fastest on an H100.

        Channels-last tiles are one run in memory: 2,048 values. Channels-first rows are read along
        positions, of which 32 are one 64-byte run in bf16: up to 16,384 values.
        """
        width = triton.next_power_of_2(channels)
        if last:
            return cls(max(1, 2048 // width), width, 2, 3)
        return cls(max(1, (8192 if width <= 128 else 16384) // width), width, 8, 1)


def _layout(x: Tensor, name: str) -> bool:
    """Whether x is channels-last; ValueError when it is neither that nor contiguous."""
    if x.dim() not in (4, 5):
        raise ValueError(
            f"rms_norm_silu: {name} of shape {tuple(x.shape)}; expected [B, C, T, H, W] or "
            "[B, C, H, W]"
        )
    if x.shape[1] > MAX_CHANNELS:
        raise ValueError(
            f"rms_norm_silu: {x.shape[1]} channels are above {MAX_CHANNELS}; "
            "use operators='reference'"
        )
    if x.is_contiguous(memory_format=_channels_last(x)):
        return True
    if not x.is_contiguous():
        raise ValueError(
            f"rms_norm_silu: {name} has strides {x.stride()} for shape {tuple(x.shape)}; make it "
            "contiguous in channels-last or channels-first memory"
        )
    return False


def _channels_last(x: Tensor) -> torch.memory_format:
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def _programs(x: Tensor) -> int:
    """Programs of the backward: 16 a multiprocessor, each with one row of partial sums."""
    if x.is_cuda:
        return 16 * torch.cuda.get_device_properties(x.device).multi_processor_count
    return 8


@operator("rms_norm_silu")
def _forward(
    x: Tensor,  # [B, C, T, H, W] or [B, C, H, W], channels-last or contiguous
    gamma: Tensor,  # [C, ...] of C values
    silu: bool,
    out_dtype: torch.dtype,
    lead: Tensor | None,  # [B, C, P, H, W] or [B, C, P, W]
) -> Tensor:  # as x, in out_dtype; with P more entries in front on axis 2
    last = _layout(x, "x")
    y = _empty_output(x, out_dtype, lead)
    if lead is not None and carrying():
        _put(lead, y, last)
    elif lead is not None:
        y[:, :, : lead.shape[2]] = lead
    batch, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    config = Config.for_shape(channels, last)
    grid = (triton.cdiv(positions, config.positions), batch)
    launch(_forward_kernel)[grid](
        x,
        gamma.contiguous(),
        y,
        positions,
        0 if lead is None else math.prod(lead.shape[2:]),
        channels,
        last,
        silu,
        channels**0.5,
        SMALLEST_LENGTH,
        config.positions,
        config.channels,
        num_warps=config.warps,
    )
    return y


def _put(lead: Tensor, y: Tensor, last: bool) -> None:
    """y begins with `lead` on axis 2: a kernel, where Inductor would write all of y once more."""
    memory = _channels_last(y) if last else torch.contiguous_format
    length, apart = (math.prod(t.shape[1 if last else 2 :]) for t in (lead, y))
    grid = (triton.cdiv(length, LEAD_BLOCK), y.shape[0] * (1 if last else y.shape[1]))
    launch(_lead_kernel)[grid](
        lead.contiguous(memory_format=memory), y, length, apart, BLOCK=LEAD_BLOCK, num_warps=4
    )


def _empty_output(x: Tensor, dtype: torch.dtype, lead: Tensor | None) -> Tensor:
    # One position is both; `_layout` decides alike.
    last = x.is_contiguous(memory_format=_channels_last(x))
    if lead is None:
        size = tuple(x.shape)
        return empty_last(size, dtype, x.device) if last else x.new_empty(size, dtype=dtype)
    if lead.shape[:2] != x.shape[:2] or lead.shape[3:] != x.shape[3:]:
        raise ValueError(
            f"rms_norm_silu: lead of shape {tuple(lead.shape)} does not fit x {tuple(x.shape)}"
        )
    size = (*x.shape[:2], lead.shape[2] + x.shape[2], *x.shape[3:])
    return empty_last(size, dtype, x.device) if last else x.new_empty(size, dtype=dtype)


@_forward.register_fake
def _(x: Tensor, gamma: Tensor, silu: bool, out_dtype: torch.dtype, lead: Tensor | None) -> Tensor:
    return _empty_output(x, out_dtype, lead)


@torch.library.custom_op("gen3r::rms_norm_silu_backward", mutates_args=())
def _backward(
    dy: Tensor,  # as x
    x: Tensor,  # [B, C, T, H, W] or [B, C, H, W], channels-last or contiguous
    gamma: Tensor,  # [C, ...] of C values
    silu: bool,
) -> tuple[Tensor, Tensor]:  # dx as x, dgamma [C] float32
    last = _layout(x, "x")
    if dy.stride() != x.stride():
        dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
    dx = torch.empty_like(x)
    batch, channels = x.shape[:2]
    positions = math.prod(x.shape[2:])
    config = Config.for_shape(channels, last)
    blocks = triton.cdiv(positions, config.positions)
    programs = min(_programs(x), blocks * batch)
    partial = x.new_empty(programs, channels, dtype=torch.float32)
    _backward_kernel[(programs,)](
        x,
        gamma.contiguous(),
        dy,
        dx,
        partial,
        positions,
        blocks,
        blocks * batch,
        channels,
        last,
        silu,
        channels**0.5,
        SMALLEST_LENGTH,
        config.positions,
        config.channels,
        config.stages,
        num_warps=config.warps,
    )
    return dx, partial.sum(0)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, gamma: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[1], dtype=torch.float32)


def rms_norm_silu_reference(
    x: Tensor,  # [B, C, T, H, W] or [B, C, H, W]
    gamma: Tensor,  # [C, 1, 1, 1] or [C, 1, 1]
    silu: bool = True,
    lead: Tensor | None = None,  # [B, C, P, H, W]
) -> Tensor:  # shape of x, float32; with P frames more
    """The definition in float32."""
    x = x.float()
    # A plain sum of squares: on a CPU torch's vector norm over a strided axis is far slower.
    length = (x * x).sum(1, keepdim=True).sqrt().clamp(min=SMALLEST_LENGTH)
    y = x / length * (x.shape[1] ** 0.5 * gamma.float())
    y = F.silu(y) if silu else y
    return y if lead is None else torch.cat([lead.float(), y], dim=2)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, gamma, ctx.silu, _, lead = inputs  # type: ignore[attr-defined]
    ctx.lead = None if lead is None else (lead.shape[2], lead.dtype)  # type: ignore[attr-defined]
    ctx.save_for_backward(x, gamma)


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, dy: Tensor
) -> tuple[Tensor | None, ...]:
    x, gamma = ctx.saved_tensors  # type: ignore[attr-defined]
    dlead = None
    if ctx.lead is not None:  # type: ignore[attr-defined]
        frames, dtype = ctx.lead  # type: ignore[attr-defined]
        dlead, dy = dy[:, :, :frames].to(dtype), dy[:, :, frames:]
    dx, dgamma = _backward(dy, x, gamma, ctx.silu)  # type: ignore[attr-defined]
    return dx, dgamma.view_as(gamma).to(gamma.dtype), None, None, dlead


_forward.register_autograd(_differentiate, setup_context=_save)


def rms_norm_silu(
    x: Tensor,  # [B, C, T, H, W] or [B, C, H, W]
    gamma: Tensor,  # [C, 1, 1, 1] or [C, 1, 1]
    silu: bool = True,
    *,
    out_dtype: torch.dtype | None = None,
    lead: Tensor | None = None,  # [B, C, P, H, W]
    backends: Backends = DEFAULT_BACKENDS,
) -> Tensor:  # shape and memory format of x, in out_dtype (None: that of x); with P frames more
    """RMSNorm over channels, followed by SiLU unless `silu` is False (attention's norm).

    lead : frames that stand before the result as they are.

    x : channels-last memory is read at full bandwidth; other strides than these and contiguous
    ones are copied into channels-last memory first.

    Raises
    ------
    ValueError : more than 4,096 channels or other than four or five axes on the Triton path.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if not use_triton("rms_norm_silu", x, out_dtype, backends):
        y = rms_norm_silu_reference(x, gamma, silu).to(out_dtype)
        return y if lead is None else torch.cat([lead.to(out_dtype), y], dim=2)
    if not (x.is_contiguous() or x.is_contiguous(memory_format=_channels_last(x))):
        x = x.contiguous(memory_format=_channels_last(x))
    return torch.ops.gen3r.rms_norm_silu(x, gamma, silu, out_dtype, lead)


def compile_cases() -> list[CompileCase]:
    """Both kernels at every width of the two autoencoders, in both memory formats."""
    copied: dict[str, str] = {"lead": "*bf16", "y": "*bf16", "length": "i32", "apart": "i32"}
    cases = [
        CompileCase(
            "lead, carried", _lead_kernel, copied, {"BLOCK": LEAD_BLOCK}, {"num_warps": 4}, ("y",)
        )
    ]
    for last in (True, False):
        for channels in (96, 128, 192, 256, 384, 512):
            config = Config.for_shape(channels, last)
            name = f"{channels} channels {'last' if last else 'first'}"
            constants = {
                "C": channels,
                "LAST": last,
                "SILU": True,
                "ROOT_C": channels**0.5,
                "SMALLEST": SMALLEST_LENGTH,
                "BP": config.positions,
                "BC": config.channels,
            }
            forward = {n: "*bf16" for n in ("x", "gamma", "y")}
            backward = {n: "*bf16" for n in ("x", "gamma", "dy", "dx")} | {"dgamma": "*fp32"}
            counts = {n: "i32" for n in ("positions", "blocks", "tiles")}
            options = {"num_warps": config.warps}
            cases += [
                CompileCase(
                    f"forward, {name}",
                    _forward_kernel,
                    forward | {"positions": "i32", "lead": "i32"},
                    constants,
                    options,
                    (*forward, "positions"),
                ),
                CompileCase(
                    f"backward, {name}",
                    _backward_kernel,
                    backward | counts,
                    constants | {"STAGES": config.stages},
                    options,
                    (*backward, "positions"),
                ),
            ]
    return cases
