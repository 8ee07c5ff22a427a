"""linear and quantize where no GPU is needed: references, gradients, refusals, tracing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gen3r_kernels as ops
from gen3r_kernels import Backends
from gen3r_kernels.linear import _linear_gelu_op
from gen3r_kernels.quantized import Quantized

FLOAT8 = torch.float8_e4m3fn
M, N, K = 199, 152, 72  # awkward on purpose


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = torch.randn(2, M, K), torch.randn(N, K) / K**0.5, torch.randn(N)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_cpu_computes_as_pytorch_does(dtype: torch.dtype) -> None:
    x, weight, bias = operands(dtype)
    plain = F.linear(x, weight, bias)
    assert torch.equal(ops.linear(x, weight, bias), plain)
    assert torch.equal(ops.linear(x, weight), F.linear(x, weight))
    gelu = F.gelu(plain, approximate="tanh")
    assert torch.equal(ops.linear(x, weight, bias, activation="gelu_tanh"), gelu)
    assert ops.linear(x, weight, bias, out_dtype=torch.float32).dtype == torch.float32


def test_reference_is_float32() -> None:
    x, weight, bias = operands(torch.bfloat16)
    out = ops.linear_reference(x, weight, bias, "gelu_tanh")
    expected = F.gelu(x.double() @ weight.double().t() + bias.double(), approximate="tanh")
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=2e-6)


def test_the_gelu_operator() -> None:
    x, weight, bias = (t.double() for t in operands())
    torch.library.opcheck(_linear_gelu_op, (x[0], weight, bias))
    expected = F.gelu(F.linear(x[0], weight, bias), approximate="tanh")
    torch.testing.assert_close(_linear_gelu_op(x[0], weight, bias), expected)


def test_the_gradient_of_gelu() -> None:
    """With autograd recording the pre-activation is kept, whatever the backends say."""
    given = [t.requires_grad_() for t in operands()]
    expected = F.gelu(F.linear(*given), approximate="tanh")
    out = ops.linear(*given, activation="gelu_tanh")
    grads = [torch.autograd.grad(y.square().sum(), given) for y in (out, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_quantize() -> None:
    x = torch.randn(3, M, K, dtype=torch.bfloat16)
    x[0, 5] = 0
    q = ops.quantize(x)
    assert q.values.dtype == FLOAT8
    assert q.values.shape == x.shape
    assert q.scale.shape == q.length.shape == (3, M, 1)
    largest = x.float().abs().amax(-1, keepdim=True)
    torch.testing.assert_close(q.scale, largest / 448)
    torch.testing.assert_close(q.length, x.float().norm(dim=-1, keepdim=True))
    # Half a unit in the last place is 2^-4 of a normal number, 2^-10 below the smallest of them.
    bound = torch.maximum(x.float().abs() * 2**-4, q.scale * 2**-10)
    assert ((ops.dequantize(q) - x.float()).abs() <= bound * 1.0001).all()
    assert not q.values[0, 5].float().any()


def test_quantize_weight() -> None:
    weight = torch.nn.Parameter(torch.randn(N, K))
    q = ops.quantize_weight(weight)
    rounded = q.values.float() * q.scale[:, None]
    assert relative(rounded, weight.detach()) < 0.03
    torch.testing.assert_close(q.length, rounded.norm(dim=-1))
    assert not q.scale.requires_grad


def test_eight_bit_linear_is_the_product_of_the_rounded_operands() -> None:
    x, weight, bias = operands()
    q, w = ops.quantize(x), ops.quantize_weight(weight)
    exact = ops.linear_reference(ops.dequantize(q), w.values.float() * w.scale[:, None], bias)
    out = ops.linear(q, w, bias)
    assert isinstance(out, Tensor)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, exact.bfloat16())
    # Two roundings to 4 bits: about 2^-4 / sqrt(3) / 2 each.
    assert relative(out, ops.linear_reference(x, weight, bias)) < 0.05


def outliers(x: Tensor) -> Tensor:
    """A few channels x 50, as transformers have them."""
    x = x.clone()
    x[..., ::24] *= 50
    return x


@pytest.mark.parametrize("kind", ["normal", "outliers", "parallel"])
def test_eight_bit_output_with_the_bounded_scale(kind: str) -> None:
    """The scale known before the product: no overflow, and about the error of the row's own."""
    rows, width, wide = 256, 768, 3072
    x, weight, bias = torch.randn(rows, width), torch.randn(wide, width), 0.3 * torch.randn(wide)
    weight = weight / width**0.5
    if kind == "outliers":
        x = outliers(x)
    if kind == "parallel":  # Cauchy-Schwarz is an equality here
        weight[7] = x[3] / x[3].norm() * weight.norm(dim=1).max()
    q, w = ops.quantize(x), ops.quantize_weight(weight)
    out = ops.linear(q, w, bias, activation="gelu_tanh", out_dtype=FLOAT8)
    assert isinstance(out, Quantized)
    expected = ops.linear_fp8_reference(q, w, bias, gelu=True)
    assert (expected.abs() <= out.scale * 448).all()
    assert (expected.norm(dim=-1, keepdim=True) <= out.length).all()
    plain = ops.quantize_reference(expected)
    ours, best = (relative(ops.dequantize(y), expected) for y in (out, plain))
    print(
        f"{kind}: {ours:.5f} against {best:.5f}, scale {(out.scale / plain.scale).median():.1f} x"
    )
    assert ours <= 1.1 * best
    assert out.scale.shape == out.length.shape == (rows, 1)


def test_refusals() -> None:
    x, weight, bias = operands()
    q, w = ops.quantize(x), ops.quantize_weight(weight)
    with pytest.raises(ValueError, match="activation 'relu' is unknown; known: "):
        ops.linear(x, weight, bias, activation="relu")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="use quantize_weight"):
        ops.linear(q, weight, bias)
    with pytest.raises(ValueError, match=r"use quantize\(x\)"):
        ops.linear(x, w, bias)
    with pytest.raises(ValueError, match="does not fit weight"):
        ops.linear(x[..., :-1], weight, bias)
    with pytest.raises(ValueError, match="does not fit weight"):
        ops.linear(x, weight.double(), bias)
    with pytest.raises(ValueError, match="no backward; use bfloat16"):
        ops.quantize(x.requires_grad_())
    with pytest.raises(ValueError, match="no backward; use bfloat16"):
        ops.linear(q, w, bias.requires_grad_())
    with pytest.raises(ValueError, match="does not fit"):
        ops.linear(q, ops.quantize_weight(weight[:, :-8]), None)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs CUDA tensors"):
            ops.quantize(x.detach(), backends=Backends(operators="triton"))


def test_compiled_without_graph_breaks() -> None:
    x, weight, bias = operands(torch.bfloat16)
    w = ops.quantize_weight(weight)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = ops.linear(ops.quantize(x), w, bias, activation="gelu_tanh", out_dtype=FLOAT8)
        assert isinstance(hidden, Quantized)
        return ops.linear(x, weight, bias, activation="gelu_tanh"), hidden.scale

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x), both(x), strict=True):
        torch.testing.assert_close(ours, theirs)
