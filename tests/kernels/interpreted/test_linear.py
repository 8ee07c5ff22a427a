"""quantize and the row bound of the 8-bit linear layer in Triton's interpreter.

The product itself is a Gluon kernel for Hopper, which has no interpreter: tests/gpu/test_linear.py.
"""

from __future__ import annotations

import pytest
import torch

import gen3r_kernels as ops
from gen3r_kernels import Backends
from gen3r_kernels.linear_fp8 import _bound_op, row_bound_reference
from gen3r_kernels.quantize import _quantize_op
from gen3r_kernels.quantized import Quantized

TRITON = Backends(operators="triton")
FLOAT8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16), (199, 760), (2, 5, 1536), (3, 8960), (0, 64)])
def test_quantize(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    x[..., ::24] *= 50
    if x.numel():
        x.view(-1, shape[-1])[0] = 0
    ours, theirs = ops.quantize(x, backends=TRITON), ops.quantize_reference(x)
    assert ours.values.shape == x.shape
    assert ours.values.dtype == FLOAT8
    torch.testing.assert_close(ours.scale, theirs.scale)
    torch.testing.assert_close(ours.length, theirs.length)
    # The interpreter loses the carry when rounding reaches the next power of two: 2-4 % of values.
    wrong = ours.values.float() != theirs.values.float()
    assert not wrong.any() or wrong.float().mean() < 0.06


def test_quantize_strided_rows() -> None:
    wide = torch.randn(7, 96, dtype=torch.float16)
    x = wide[:, 16:48]
    ours, theirs = ops.quantize(x, backends=TRITON), ops.quantize_reference(x)
    torch.testing.assert_close(ours.scale, theirs.scale)
    transposed = ops.quantize(wide.t(), backends=TRITON)
    torch.testing.assert_close(transposed.scale, ops.quantize_reference(wide.t()).scale)


def test_quantize_operator() -> None:
    torch.library.opcheck(_quantize_op, (torch.randn(5, 48),), test_utils="test_faketensor")


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("channels", [7, 1536, 8960])
def test_row_bound(channels: int, has_bias: bool) -> None:
    x = ops.quantize_reference(torch.randn(600, 32))
    weight = ops.quantize_weight(torch.randn(channels, 32))
    bias = torch.randn(channels, dtype=torch.float16) if has_bias else None
    ours = _bound_op(x.length, weight.length, bias)
    for one, other in zip(ours, row_bound_reference(x, weight, bias), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, FLOAT8])
def test_linear_around_the_product(out_dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(3, 11, 64), torch.randn(48, 64) / 8, torch.randn(48)
    q, w = ops.quantize_reference(x), ops.quantize_weight(weight)
    gelu = {"activation": "gelu_tanh", "out_dtype": out_dtype}
    ours = ops.linear(q, w, bias, **gelu, backends=TRITON)
    theirs = ops.linear(q, w, bias, **gelu)
    if isinstance(ours, Quantized):
        assert isinstance(theirs, Quantized)
        torch.testing.assert_close(ops.dequantize(ours), ops.dequantize(theirs))
        torch.testing.assert_close(ours.length, theirs.length)
    else:
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="8-bit operands give"):
        ops.linear(q, w, bias, out_dtype=torch.float32, backends=TRITON)
    plain = ops.linear(x, weight, bias, activation="gelu_tanh", backends=TRITON)
    torch.testing.assert_close(plain, ops.linear_reference(x, weight, bias, "gelu_tanh"))
