"""upsample_conv2d's kernel in Triton's interpreter, against the library's two steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r_kernels import Backends, upsample_conv2d, upsample_conv2d_reference

TRITON = Backends(operators="triton")
# Images, channels in and out, height and width.
CASES = [(2, 16, 96, (9, 5)), (1, 24, 64, (5, 17)), (1, 16, 192, (3, 4)), (3, 8, 32, (8, 16))]


def make(case: tuple) -> tuple[Tensor, Tensor, Tensor]:
    count, channels_in, channels_out, sides = case
    x = torch.randn(count, channels_in, *sides).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels_out, channels_in, 3, 3) / channels_in**0.5
    return x, weight, torch.randn(channels_out)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: tuple) -> None:
    x, weight, bias = make(case)
    out = upsample_conv2d(x, weight, bias, backends=TRITON)
    expected = upsample_conv2d_reference(x, weight, bias)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out = upsample_conv2d(x.contiguous(), weight, None, backends=TRITON)
    torch.testing.assert_close(out, expected - bias[:, None, None], rtol=1e-4, atol=1e-4)


def test_gradients() -> None:
    inputs = make(CASES[1])
    leaves = [[t.clone().requires_grad_() for t in inputs] for _ in range(2)]
    out = upsample_conv2d(*leaves[0], backends=TRITON)
    expected = upsample_conv2d_reference(*leaves[1])
    dy = torch.randn_like(expected)
    actual = torch.autograd.grad(out, leaves[0], dy)
    for a, e in zip(actual, torch.autograd.grad(expected, leaves[1], dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


def test_half_precision() -> None:
    x, weight, bias = (t.half() for t in make(CASES[0]))
    out = upsample_conv2d(x, weight, bias, backends=TRITON)
    assert out.dtype == torch.float16
    expected = upsample_conv2d_reference(x, weight, bias)
    torch.testing.assert_close(out.float(), expected, rtol=4e-3, atol=4e-3)


def test_widths_that_no_program_can_own_go_to_the_library() -> None:
    x, weight, bias = torch.randn(1, 6, 4, 5), torch.randn(3, 6, 3, 3), torch.randn(3)
    out = upsample_conv2d(x, weight, bias, backends=TRITON)
    torch.testing.assert_close(out, upsample_conv2d_reference(x, weight, bias))


def test_refusals() -> None:
    x, weight, bias = make(CASES[0])
    with pytest.raises(ValueError, match="do not fit; expected"):
        upsample_conv2d(x[:, :8], weight, bias, backends=TRITON)
    with pytest.raises(ValueError, match="tensors of one dtype"):
        upsample_conv2d(x, weight.half(), bias, backends=TRITON)


def test_opcheck() -> None:
    x, weight, bias = make((1, 8, 16, (3, 4)))
    arguments = (x.requires_grad_(), weight.requires_grad_(), bias)
    torch.library.opcheck(torch.ops.gen3r.upsample_conv2d.default, arguments)
