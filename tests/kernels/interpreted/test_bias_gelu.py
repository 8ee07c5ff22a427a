"""bias_gelu against its reference, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from gen3r_kernels import Backends, bias_gelu, bias_gelu_reference
from gen3r_kernels.bias_gelu import _bias_gelu_op

TRITON = Backends(operators="triton")


@pytest.mark.parametrize("shape", [(2, 199, 300), (1, 1, 7), (1030, 16)])
def test_gradients(shape: tuple[int, ...]) -> None:
    x, bias = (3 * torch.randn(*shape)).requires_grad_(), torch.randn(shape[-1]).requires_grad_()
    out, expected = bias_gelu(x, bias, backends=TRITON), bias_gelu_reference(x, bias)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn(*shape)
    ours = torch.autograd.grad(out, (x, bias), grad)
    theirs = torch.autograd.grad(expected, (x, bias), grad)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=2e-4)


def test_opcheck() -> None:
    x, bias = torch.randn(5, 7).requires_grad_(), torch.randn(7).requires_grad_()
    torch.library.opcheck(_bias_gelu_op, (x, bias))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"bias \[3\] does not fit x \[2, 4\]"):
        bias_gelu(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="is not contiguous"):
        bias_gelu(torch.zeros(4, 2).t(), torch.zeros(4), backends=TRITON)
