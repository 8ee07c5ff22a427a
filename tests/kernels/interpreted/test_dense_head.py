"""The dense head's operators in Triton's interpreter: convolution, resize, output layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

BACKWARD = "gen3r_kernels.resize_bilinear_backward"

TRITON = Backends(operators="triton")
REFERENCE = Backends(operators="reference")
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

# Backward: ratios above 2 by little, many rows and columns of y for one of x (loops over the
# loads), the same size, reducing, to a single pixel, strips of two rows, more channels.
BACKWARD_CASES: list[Case] = [
    ((2, 4, 3, 2), (5, 4)),
    ((1, 4, 1, 2), (6, 11)),
    ((1, 4, 2, 1), (3, 10)),
    ((1, 24, 3, 4), (3, 4)),
    ((1, 8, 6, 7), (2, 3)),
    ((1, 4, 2, 2), (1, 1)),
    ((1, 6, 7, 3), (12, 5)),
    ((1, 300, 2, 5), (3, 8)),
]


def tables(channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return torch.randn(size[1], channels // 2), torch.randn(size[0], channels // 2)


def gradients(
    operator: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],  # gradients of the outputs; None: not part of the loss
    dtype: torch.dtype,
    backends: Backends,
) -> tuple[Tensor, ...]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    result = operator(*leaves, backends=backends)
    outputs = (result,) if isinstance(result, Tensor) else result
    pairs = [(y, g.to(y)) for y, g in zip(outputs, upstream, strict=True) if g is not None]
    return torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs])


def check_gradients(
    operator: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
) -> None:
    """Float32 sums of the kernels against float64 autograd through PyTorch's operators."""
    found = gradients(operator, inputs, upstream, torch.float32, TRITON)
    exact = gradients(operator, inputs, upstream, torch.float64, REFERENCE)
    for ours, right in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2e-5, atol=2e-5 * right.abs().max())


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


def test_convolution_keeps_nan() -> None:
    x, weight = torch.randn(1, 4, 3, 3), torch.randn(4, 4, 1, 1)
    x[0, 0, 1, 1] = torch.nan
    found = conv2d_add_relu(x, weight, None, residual=x, relu=True, backends=TRITON)
    assert found[0, :, 1, 1].isnan().all() and found.isnan().sum() == 4


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("side", [1, 3])
def test_convolution_backward(side: int, relu: bool) -> None:
    inputs = [
        torch.randn(2, 6, 5, 7),
        torch.randn(10, 6, side, side),
        torch.randn(10),
        torch.randn(2, 10, 5, 7),
    ]

    def operator(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor, **how: Backends) -> Tensor:
        return conv2d_add_relu(x, weight, bias, residual=added, relu=relu, **how)

    check_gradients(operator, inputs, [torch.randn(2, 10, 5, 7)])


def test_frozen_convolution_keeps_neither_x_nor_residual() -> None:
    x, added = (torch.randn(1, n, 3, 3).contiguous(memory_format=LAST) for n in (8, 4))
    weight = torch.randn(4, 8, 3, 3).contiguous(memory_format=LAST)
    kept: list[int] = []

    def note(t: Tensor) -> Tensor:
        kept.append(t.data_ptr())
        return t

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        plain = conv2d_add_relu(x, weight, None, residual=added, backends=TRITON)
        assert kept == [weight.data_ptr()]
        active = conv2d_add_relu(x, weight, None, residual=added, relu=True, backends=TRITON)
    assert sorted(kept[1:]) == sorted([weight.data_ptr(), active.data_ptr()])
    for y in (plain, active):
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert dx.is_contiguous(memory_format=LAST)


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


@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_resize_backward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, size = case
    monkeypatch.setattr(f"{BACKWARD}.PROGRAMS", 3)

    def operator(x: Tensor, added: Tensor, *position: Tensor, backends: Backends) -> Tensor:
        across, down = position
        return resize_bilinear(x, size, position=(across, down), added=added, backends=backends)

    inputs = [torch.randn(shape), torch.randn(*shape[:2], *size), *tables(shape[1], size)]
    check_gradients(operator, inputs, [torch.randn(*shape[:2], *size)])


def test_resize_backward_in_half_precision_rounds_once() -> None:
    x = torch.randn(1, 8, 3, 4).half().contiguous(memory_format=LAST).requires_grad_()
    g = torch.randn(1, 8, 5, 7).half()
    y = resize_bilinear(x, (5, 7), backends=TRITON)
    (found,) = torch.autograd.grad(y, x, g)
    (exact,) = torch.autograd.grad(resize_bilinear_reference(x, (5, 7)), x, g.float())
    assert found.dtype == torch.float16 and found.is_contiguous(memory_format=LAST)
    assert ((found - exact).abs() <= 2**-10 * exact.abs() + 1e-5).all()  # both rounded to float16


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


@pytest.mark.parametrize("wanted", ["both", "values", "confidence"])
@pytest.mark.parametrize(("outputs", "exponential"), [(2, True), (4, False), (3, True)])
def test_dense_output_backward(outputs: int, exponential: bool, wanted: str) -> None:
    inputs = [torch.randn(2, 20, 7, 11), torch.randn(outputs, 20) / 8, torch.randn(outputs)]
    upstream = [
        None if wanted == "confidence" else torch.randn(2, 7, 11, outputs - 1),
        None if wanted == "values" else torch.randn(2, 7, 11),
    ]

    def operator(*given: Tensor, backends: Backends) -> tuple[Tensor, Tensor]:
        x, weight, bias = given
        if x.dtype == torch.float32:
            return dense_output(x, weight, bias, exponential=exponential, backends=backends)
        raw = torch.einsum("nchw,kc->nhwk", x, weight) + bias
        return raw[..., :-1].exp() if exponential else raw[..., :-1], 1 + raw[..., -1].exp()

    check_gradients(operator, inputs, upstream)


def test_frozen_dense_output_gives_channels_last_gradients() -> None:
    x = torch.randn(1, 8, 3, 5).half().contiguous(memory_format=LAST).requires_grad_()
    weight, bias = torch.randn(2, 8).half(), torch.randn(2).half()
    values, _ = dense_output(x, weight, bias, exponential=True, backends=TRITON)
    (dx,) = torch.autograd.grad(values, x, torch.ones_like(values))
    assert dx.dtype == torch.float16 and dx.is_contiguous(memory_format=LAST)


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
    x = torch.randn(1, 8, 2, 3).contiguous(memory_format=LAST).requires_grad_()
    across, down = tables(8, (4, 3))
    added = torch.randn(1, 8, 4, 3).contiguous(memory_format=LAST)
    torch.library.opcheck(torch.ops.gen3r.resize_bilinear, (x, 4, 3, across, down, added))
    weight = torch.randn(6, 8, 3, 3).contiguous(memory_format=LAST)
    residual = torch.randn(1, 6, 2, 3).contiguous(memory_format=LAST).requires_grad_()
    arguments = (x, weight, torch.randn(6), residual, True)
    torch.library.opcheck(torch.ops.gen3r.conv2d_add_relu, arguments)
    given = (x, torch.randn(2, 8), torch.randn(2), True)
    torch.library.opcheck(torch.ops.gen3r.dense_output, given)
    maps = torch.randn(1, 2, 3, 1), torch.randn(1, 2, 3)
    quick = ("test_schema", "test_faketensor")
    for operator, inputs in (
        (torch.ops.gen3r.resize_bilinear_backward, (added, 2, 3)),
        (torch.ops.gen3r.dense_output_backward, (*maps, *maps, given[1], True, torch.float32)),
    ):
        torch.library.opcheck(operator, inputs, test_utils=quick)
