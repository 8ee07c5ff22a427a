"""The dense head's operators in Triton's interpreter: convolution, resize, output layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r_kernels import (
    Backends,
    conv2d_add_relu,
    conv2d_add_relu_reference,
    dense_output,
    dense_output_reference,
    resize_bilinear,
    resize_bilinear_reference,
)

TRITON = Backends(operators="triton")
LAST = torch.channels_last

Case = tuple[tuple[int, int, int, int], tuple[int, int]]
# Enlarging, an odd factor, the same size, reducing, single rows, channels that fill no tile.
CASES: list[Case] = [
    ((2, 32, 4, 5), (8, 10)),
    ((1, 24, 5, 3), (7, 9)),
    ((2, 16, 3, 4), (3, 4)),
    ((1, 8, 6, 7), (2, 3)),
    ((1, 8, 1, 5), (4, 1)),
    ((1, 300, 3, 3), (4, 11)),
]


def tables(channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return torch.randn(size[1], channels // 2), torch.randn(size[0], channels // 2)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(2, 12, 20, 3, 3), (1, 5, 7, 33, 1)], ids=str)
def test_convolution(shape: tuple[int, ...], residual: bool, relu: bool) -> None:
    count, channels_in, channels_out, rows, side = shape
    x = torch.randn(count, channels_in, rows, 29)
    weight, bias = torch.randn(channels_out, channels_in, side, side), torch.randn(channels_out)
    added = torch.randn(count, channels_out, rows, 29) if residual else None
    for given in (bias, None):
        expected = conv2d_add_relu_reference(x, weight, given, added, relu)
        found = conv2d_add_relu(x, weight, given, residual=added, relu=relu, backends=TRITON)
        assert found.is_contiguous(memory_format=LAST)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=4e-5)


def test_convolution_keeps_nan_and_differentiates_through_pytorch() -> None:
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(4, 4, 1, 1)
    x[0, 0, 1, 1] = torch.nan
    found = conv2d_add_relu(x, weight, None, residual=x, relu=True, backends=TRITON)
    assert found[0, :, 1, 1].isnan().all() and found.isnan().sum() == 4
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    conv2d_add_relu(x, weight, None, relu=True).sum().backward()
    assert x.grad is not None and x.grad.any()
    with pytest.raises(ValueError, match="no derivative"):
        conv2d_add_relu(x, weight, None, backends=TRITON)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("extra", ["alone", "position", "added", "both"])
def test_resize(case: Case, extra: str) -> None:
    shape, size = case
    x = torch.randn(shape)
    position = tables(shape[1], size) if extra in ("position", "both") else None
    added = torch.randn(*shape[:2], *size) if extra in ("added", "both") else None
    expected = resize_bilinear_reference(x, size, position, added)
    result = resize_bilinear(x, size, position=position, added=added, backends=TRITON)
    assert result.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(result, expected, rtol=0, atol=4e-6)


def test_resize_in_half_precision_rounds_once() -> None:
    x, added = torch.randn(1, 16, 5, 5).half(), torch.randn(1, 16, 9, 8).half()
    position = tables(16, (9, 8))
    expected = resize_bilinear_reference(x, (9, 8), position, added)
    result = resize_bilinear(x, (9, 8), position=position, added=added, backends=TRITON)
    assert result.dtype == torch.float16
    assert ((result.float() - expected).abs() <= 2**-11 * expected.abs() + 1e-5).all()


def test_resize_differentiates_through_pytorch() -> None:
    x = torch.randn(1, 8, 3, 3, requires_grad=True)
    resize_bilinear(x, (5, 5)).sum().backward()
    assert x.grad is not None and x.grad.sum() == pytest.approx(8 * 25, rel=1e-5)
    with pytest.raises(ValueError, match="no derivative"):
        resize_bilinear(x, (5, 5), backends=TRITON)


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("exponential", [True, False])
@pytest.mark.parametrize("shape", [(2, 32, 3, 5), (1, 20, 7, 43)], ids=str)
def test_dense_output(shape: tuple[int, ...], outputs: int, exponential: bool) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(outputs, shape[1]) / 8, torch.randn(outputs)
    expected = dense_output_reference(x, weight, bias, exponential)
    found = dense_output(x, weight, bias, exponential=exponential, backends=TRITON)
    assert found[0].shape == (shape[0], *shape[2:], outputs - 1)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_dense_output_differentiates_through_pytorch() -> None:
    x = torch.randn(1, 8, 3, 3, requires_grad=True)
    weight, bias = torch.randn(2, 8), torch.randn(2)
    values, confidence = dense_output(x, weight, bias, exponential=True)
    (values.sum() + confidence.sum()).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no derivative"):
        dense_output(x, weight, bias, exponential=True, backends=TRITON)


def test_refusals() -> None:
    x = torch.randn(1, 8, 3, 3)
    with pytest.raises(ValueError, match="at least 1 x 1"):
        resize_bilinear(x, (0, 3))
    with pytest.raises(ValueError, match="added has shape"):
        resize_bilinear(x, (4, 4), added=x)
    with pytest.raises(ValueError, match="position tables"):
        resize_bilinear(x, (4, 5), position=tables(8, (5, 4)))
    with pytest.raises(ValueError, match="K of 2 or more"):
        dense_output(x, torch.randn(1, 8), torch.randn(1), exponential=True)
    with pytest.raises(ValueError, match="of odd k"):
        conv2d_add_relu(x, torch.randn(8, 8, 2, 2), None)
    with pytest.raises(ValueError, match="the result has"):
        conv2d_add_relu(x, torch.randn(8, 8, 3, 3), None, residual=torch.randn(1, 8, 4, 3))
    for operator, arguments in (
        (torch.ops.gen3r.resize_bilinear, (4, 4, None, None, None)),
        (torch.ops.gen3r.dense_output, (torch.randn(2, 8), torch.randn(2), True)),
    ):
        with pytest.raises(ValueError, match="channels-last"):
            operator(x, *arguments)


def test_opcheck() -> None:
    x = torch.randn(1, 8, 3, 4).contiguous(memory_format=LAST)
    across, down = tables(8, (5, 6))
    added = torch.randn(1, 8, 5, 6).contiguous(memory_format=LAST)
    torch.library.opcheck(torch.ops.gen3r.resize_bilinear, (x, 5, 6, across, down, added))
    weight = torch.randn(6, 8, 3, 3).contiguous(memory_format=LAST)
    residual = torch.randn(1, 6, 3, 4).contiguous(memory_format=LAST)
    arguments = (x, weight, torch.randn(6), residual, True)
    torch.library.opcheck(torch.ops.gen3r.conv2d_add_relu, arguments)
    torch.library.opcheck(
        torch.ops.gen3r.dense_output, (x, torch.randn(2, 8), torch.randn(2), True)
    )
