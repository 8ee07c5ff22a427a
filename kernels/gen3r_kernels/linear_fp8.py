# mypy: allow-untyped-defs, allow-incomplete-defs
"""The linear layer in 8 bits: y = (x w^T) * scale_x * scale_w + b, then GELU, in bf16 or 8 bits.

An 8-bit result needs its row's scale before the row is complete. Cauchy-Schwarz bounds the row:
|x . w_j| <= |x| |w_j| and |gelu(z)| <= |z|, so that scale = (|x| max_j |w_j| + max |b|) / 448 never
overflows. It is about 10 times looser than the row's own maximum asks for; e4m3 is a floating-point
format with 15 binades of normal numbers, so a looser scale moves the values down the binades and
costs accuracy only where they fall under 2^-6, at 1 / 28,672 of the bound.

FLOPs: 2 M N K, see `linear.py`. The GELU output [63700, 8960] leaves the product's epilogue in
8 bits (0.57 GB, 0.2 ms); as bf16 with its own pass to quantise it would move 2.9 GB (1.0 ms).

Measured on an H100 at M = 63,700, with bias, ms (TFLOP/s): 1536 -> 1536 0.251 (1,199), 1536 -> 4608
0.753 (1,197) and 8960 -> 1536 1.395 (1,257) with bf16 results (library), 1536 -> 8960 with GELU and
8-bit result 1.534 (1,143, `linear_fp8_hopper.py`). Error of that 8-bit result against float32:
2.64 % with the bounded scale, 2.65 % with the row's own scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels.backends import Backends
from gen3r_kernels.dispatch import FLOAT8, CompileCase, use_triton
from gen3r_kernels.linear_fp8_hopper import gemm_fp8
from gen3r_kernels.quantize import FLOAT8_MAX, QuantizedWeight, dequantize
from gen3r_kernels.quantized import Quantized

# A rounded row may be longer than the row itself: each element moves by at most 2^-4 of itself.
# (Weight lengths are those of the rounded weights.)
ROUNDED_LENGTH = tl.constexpr(17 / 16)
BOUND_ROWS = 512  # rows a program
BOUND_CHANNELS = 1024  # channels reduced at a time
OUT_DTYPES = (torch.bfloat16, FLOAT8)
ALIGNMENT = 16  # elements; what tensor descriptors and the matrix units ask of K and N


@triton.jit
def _bound_kernel(
    length_ptr,  # [rows] float32, |x|
    weight_length_ptr,  # [channels] float32, |w_j|
    bias_ptr,  # [channels], or a null pointer's stand-in
    scale_ptr,  # [rows] float32 out
    bound_ptr,  # [rows] float32 out, of |y|
    rows,
    channels,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    longest = tl.zeros([BLOCK_CHANNELS], tl.float32)
    largest = tl.zeros([BLOCK_CHANNELS], tl.float32)
    weight_squares = tl.zeros([BLOCK_CHANNELS], tl.float32)
    bias_squares = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for start in range(0, channels, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        inside = channel < channels
        weight = tl.load(weight_length_ptr + channel, mask=inside, other=0.0)
        longest = tl.maximum(longest, weight)
        weight_squares += weight * weight
        if HAS_BIAS:
            bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(bias))
            bias_squares += bias * bias
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    length = tl.load(length_ptr + row, mask=row < rows, other=0.0) * ROUNDED_LENGTH
    scale = (length * tl.max(longest) + tl.max(largest)) / 448.0
    bound = length * tl.sqrt(tl.sum(weight_squares)) + tl.sqrt(tl.sum(bias_squares))
    tl.store(scale_ptr + row, scale, mask=row < rows)
    tl.store(bound_ptr + row, bound, mask=row < rows)


@torch.library.custom_op("gen3r::linear_fp8_bound", mutates_args=())
def _bound_op(
    length: Tensor,  # [M, 1]
    weight_length: Tensor,  # [N]
    bias: Tensor | None,  # [N]
) -> tuple[Tensor, Tensor]:  # [M, 1] float32 each: scale of y's rows, bound of their norms
    rows, channels = length.shape[0], weight_length.shape[0]
    scale, bound = torch.empty_like(length), torch.empty_like(length)
    if rows > 0:
        _bound_kernel[(triton.cdiv(rows, BOUND_ROWS),)](
            length,
            weight_length,
            weight_length if bias is None else bias,
            scale,
            bound,
            rows,
            channels,
            HAS_BIAS=bias is not None,
            BLOCK_ROWS=BOUND_ROWS,
            BLOCK_CHANNELS=BOUND_CHANNELS,
            num_warps=4,
        )
    return scale, bound


@_bound_op.register_fake
def _(length: Tensor, weight_length: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(length), torch.empty_like(length)


def row_bound_reference(
    x: Quantized,  # [..., K]
    weight: QuantizedWeight,  # [N, K]
    bias: Tensor | None = None,  # [N]
) -> tuple[Tensor, Tensor]:  # [..., 1] float32 each
    """Before the product: the scale that y's rows fit in, and a bound of their Euclidean norms."""
    length = x.length * ROUNDED_LENGTH.value
    scale, bound = length * weight.length.amax(), length * weight.length.norm()
    if bias is not None:
        scale, bound = scale + bias.float().abs().amax(), bound + bias.float().norm()
    return scale / FLOAT8_MAX, bound


@torch.library.custom_op("gen3r::linear_fp8", mutates_args=())
def _linear_fp8_op(
    values: Tensor,  # [M, K] float8
    scale: Tensor,  # [M, 1] float32
    weight: Tensor,  # [N, K] float8
    weight_scale: Tensor,  # [N] float32
    bias: Tensor | None,  # [N]
    gelu: bool,
    out_scale: Tensor | None,  # [M, 1] float32: y leaves in 8 bits, divided by it
) -> Tensor:  # [M, N] bfloat16, or float8
    if values.is_cuda:
        product = (values, scale, weight, weight_scale, bias, gelu)
        return _library_product(*product) if out_scale is None else gemm_fp8(*product, out_scale)
    # Gluon kernels have no interpreter: in it, only the kernels around the product are run.
    x = Quantized(values, scale, scale)
    y = linear_fp8_reference(x, QuantizedWeight(weight, weight_scale, weight_scale), bias, gelu)
    return y.bfloat16() if out_scale is None else _divide(y, out_scale)


@_linear_fp8_op.register_fake
def _(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: bool,
    out_scale: Tensor | None,
) -> Tensor:
    dtype = torch.bfloat16 if out_scale is None else FLOAT8
    return values.new_empty((values.shape[0], weight.shape[0]), dtype=dtype)


def _library_product(
    values: Tensor,  # [M, K] float8
    scale: Tensor,  # [M, 1] float32
    weight: Tensor,  # [N, K] float8
    weight_scale: Tensor,  # [N] float32
    bias: Tensor | None,  # [N]
    gelu: bool,
) -> Tensor:  # [M, N] bfloat16
    """The library's product with row scales, faster than ours for bf16 results.

    Its fast accumulation keeps about 14 bits: at K = 8960 the error against float32 is 0.27 %
    instead of the 0.17 % of rounding to bf16 (the operands' own rounding costs 3.7 %), for 1.40
    instead of 1.68 ms.
    """
    y = torch._scaled_mm(
        values,
        weight.t(),
        scale_a=scale,
        scale_b=weight_scale[None],
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return F.gelu(y, approximate="tanh") if gelu else y


def _divide(y: Tensor, scale: Tensor) -> Tensor:
    """y / scale as float8; a scale of 0 comes with a row of zeros."""
    values = torch.where(scale > 0, y / scale, 0.0)
    return values.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def linear_fp8_reference(
    x: Quantized,  # [..., K]
    weight: QuantizedWeight,  # [N, K]
    bias: Tensor | None = None,  # [N]
    gelu: bool = False,
) -> Tensor:  # [..., N] float32
    """The definition in float32, on the rounded operands."""
    wide = weight.values.float() * weight.scale[:, None]
    y = F.linear(dequantize(x), wide, None if bias is None else bias.float())
    return F.gelu(y, approximate="tanh") if gelu else y


def _check(x: Quantized, weight: QuantizedWeight, bias: Tensor | None) -> None:
    if x.values.shape[-1] != weight.values.shape[-1]:
        raise ValueError(
            f"linear: x {list(x.values.shape)} does not fit weight {list(weight.values.shape)}; "
            "they must share the last dimension"
        )
    given = [t for t in (*x, *weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise ValueError("linear: 8-bit operands have no backward; use bfloat16 to train")


def linear_fp8(
    x: Quantized,  # [..., K]
    weight: QuantizedWeight,  # [N, K]
    bias: Tensor | None,  # [N]
    gelu: bool,
    out_dtype: torch.dtype,
    backends: Backends,
) -> Tensor | Quantized:  # [..., N]
    """`linear` for 8-bit operands; see there. Only inference: rounding has no derivative."""
    _check(x, weight, bias)
    fused = use_triton("linear", x.values, out_dtype, backends)
    if not fused:
        y = linear_fp8_reference(x, weight, bias, gelu)
        if out_dtype != FLOAT8:
            return y.to(out_dtype)
        scale, bound = row_bound_reference(x, weight, bias)
        return Quantized(_divide(y, scale), scale, bound)
    if out_dtype not in OUT_DTYPES:
        raise ValueError(
            f"linear: 8-bit operands give {OUT_DTYPES}, not {out_dtype}; "
            "use operators='reference' or convert the result"
        )
    lead = x.values.shape[:-1]
    channels, width = weight.values.shape
    if channels % ALIGNMENT or width % ALIGNMENT:
        raise ValueError(
            f"linear: 8-bit weight [{channels}, {width}]: both must be multiples of {ALIGNMENT}; "
            "use bfloat16 for this layer"
        )
    rows = x.values.reshape(-1, width).contiguous(), x.scale.reshape(-1, 1).contiguous()
    product = (*rows, weight.values, weight.scale, bias, gelu)
    if out_dtype != FLOAT8:
        return _linear_fp8_op(*product, None).view(*lead, channels)
    scale, bound = _bound_op(x.length.reshape(-1, 1), weight.length, bias)
    values = _linear_fp8_op(*product, scale)
    return Quantized(values.view(*lead, channels), scale.view(*lead, 1), bound.view(*lead, 1))


def compile_cases() -> list[CompileCase]:
    """The kernel here, with and without a bias."""
    return [
        CompileCase(
            name=f"bound-{'bias' if has_bias else 'plain'}",
            kernel=_bound_kernel,
            signature={
                "length_ptr": "*fp32",
                "weight_length_ptr": "*fp32",
                "bias_ptr": "*bf16" if has_bias else "*fp32",
                "scale_ptr": "*fp32",
                "bound_ptr": "*fp32",
                "rows": "i32",
                "channels": "i32",
            },
            constexprs={
                "HAS_BIAS": has_bias,
                "BLOCK_ROWS": BOUND_ROWS,
                "BLOCK_CHANNELS": BOUND_CHANNELS,
            },
            options={"num_warps": 4},
            divisible=("length_ptr", "weight_length_ptr", "bias_ptr", "scale_ptr", "channels"),
        )
        for has_bias in (False, True)
    ]
