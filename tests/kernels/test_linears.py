"""linears: several linear layers of one input, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r_kernels import linears, linears_reference


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    layers = [(torch.randn(n, 5, dtype=dtype), torch.randn(n, dtype=dtype)) for n in (3, 7, 3)]
    return torch.randn(2, 4, 5, dtype=dtype), layers


def test_gradients() -> None:
    x, layers = operands()
    leaves = [x, *(t for layer in layers for t in layer)]
    for leaf in leaves:
        leaf.requires_grad_()
    outs = linears(x, layers)
    expected = [F.linear(x, w, b) for w, b in layers]
    for one, other in zip(outs, expected, strict=True):
        assert torch.equal(one, other)
    ours, theirs = (
        torch.autograd.grad(sum((y**2).sum() for y in ys), leaves) for ys in (outs, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_only_what_is_needed() -> None:
    """A frozen layer and an input without gradient get none."""
    x, layers = operands()
    layers[0][0].requires_grad_()
    total = sum(y.sum() for y in linears(x, layers))
    assert isinstance(total, Tensor)
    total.backward()
    assert x.grad is None and layers[0][0].grad is not None and layers[1][0].grad is None


def test_reference_is_float32() -> None:
    x, layers = operands(torch.bfloat16)
    for out in linears_reference(x, layers):
        assert out.dtype == torch.float32


def test_refusals() -> None:
    x, layers = operands()
    with pytest.raises(ValueError, match="no layers given"):
        linears(x, [])
    with pytest.raises(ValueError, match="does not fit weight"):
        linears(x[..., :4], layers)
