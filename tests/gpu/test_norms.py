"""The norm operators on a GPU: bf16 and 8 bits against float32, compiled, backward, opcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gen3r_kernels as ops
from gen3r_kernels import Backends
from gen3r_kernels.quantized import Quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

TRITON = Backends(operators="triton")
BF16, FLOAT8 = torch.bfloat16, torch.float8_e4m3fn
SHAPES = [(2, 199, 760), (2, 31850, 1536), (1, 3, 1536)]
HALF_STEP = 2.0**-9  # a bf16 rounding of the reference, relative


@pytest.fixture(autouse=True)
def _poison() -> None:
    """Memory that the operators are given next holds NaN: what they do not write shows."""
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (2**28, 2**24, 2**18)]
    del blocks


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def stretch(x: Tensor, outliers: bool) -> Tensor:
    """A few channels 50 times as large, as real transformers have."""
    if outliers:
        x[..., ::97] *= 50
    return x


def tables(batch: int, width: int) -> dict[str, Tensor]:
    shift, scale, gate = normal(batch, 6, width)[:, :3].split(1, dim=1)
    return {"gate": gate, "scale": scale, "shift": shift}


def check(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Largest and root-mean-square error at most twice plain PyTorch's at the same dtype."""
    assert ours.shape == exact.shape and ours.dtype == plain.dtype
    mine, theirs = (x.float() - exact.float() for x in (ours, plain))
    slack = HALF_STEP * exact.abs().max()
    assert mine.abs().max() <= 2 * theirs.abs().max() + slack  # also fails on NaN
    slack = HALF_STEP * exact.float().square().mean().sqrt()
    assert mine.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + slack


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_modulate(shape: tuple[int, int, int], outliers: bool) -> None:
    x = stretch(normal(*shape), outliers)
    given = tables(shape[0], shape[2])
    del given["gate"]
    exact = ops.layer_norm_modulate_reference(x, **given)
    plain = F.layer_norm(x.to(BF16), x.shape[-1:], eps=1e-6)
    plain = plain * (1 + given["scale"].to(BF16)) + given["shift"].to(BF16)
    check(ops.layer_norm_modulate(x, **given, out_dtype=BF16), plain, exact)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_residual(shape: tuple[int, int, int], outliers: bool) -> None:
    stream, y = normal(*shape), stretch(normal(*shape), outliers).to(BF16)
    gate = tables(shape[0], shape[2])["gate"]
    weight, bias = normal(2, shape[2], dtype=BF16).unbind()
    given = {"gate": gate, "weight": weight, "bias": bias}
    exact, exact_normed = ops.gated_residual_reference(stream, y, **given)
    updated, normed = ops.gated_residual(stream, y, **given, out_dtype=BF16)
    torch.testing.assert_close(updated, exact, rtol=1e-6, atol=1e-6)
    plain = F.layer_norm((stream.to(BF16) + y * gate.to(BF16)), stream.shape[-1:], weight, bias)
    check(normed, plain, exact_normed)


def check_eight_bits(rows: Quantized, exact: Tensor) -> None:
    reference = ops.quantize_reference(exact)
    torch.testing.assert_close(rows.scale, reference.scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(rows.length, reference.length, rtol=1e-4, atol=0)
    ours, best = ((ops.dequantize(r) - exact).norm() for r in (rows, reference))
    assert ours <= 1.01 * best


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits(shape: tuple[int, int, int], outliers: bool) -> None:
    x, y = stretch(normal(*shape), outliers), normal(*shape, dtype=BF16)
    given = tables(shape[0], shape[2])
    updated, rows = ops.gated_residual(x, y, **given, out_dtype=FLOAT8)
    exact, normed = ops.gated_residual_reference(x, y, **given)
    torch.testing.assert_close(updated, exact, rtol=1e-6, atol=1e-6)
    check_eight_bits(rows, normed)
    del given["gate"]
    rows = ops.layer_norm_modulate(x, **given, out_dtype=FLOAT8)
    check_eight_bits(rows, ops.layer_norm_modulate_reference(x, **given))


def plain_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """bf16 throughout, as a plain implementation has it."""
    x = F.rms_norm(x, x.shape[-1:], weight, 1e-6).unflatten(-1, (heads, -1, 2))
    even, odd = x.unbind(-1)
    cos, sin = (t[:, None, :].to(x.dtype) for t in (cos, sin))
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("shape", [(2, 199, 5, 152), (2, 31850, 12, 128), (1, 3, 12, 128)])
def test_rms_norm_rope(shape: tuple[int, int, int, int], outliers: bool) -> None:
    batch, rows, heads, dim = shape
    q, k = (stretch(normal(batch, rows, heads * dim), outliers).to(BF16) for _ in range(2))
    weights = normal(2, heads * dim, dtype=BF16).unbind()
    angle = 100 * normal(rows, dim // 2)
    cos, sin = angle.cos(), angle.sin()
    outs = ops.rms_norm_rope(q, k, *weights, cos, sin, num_heads=heads)
    for x, weight, out in zip((q, k), weights, outs, strict=True):
        assert out.is_contiguous()
        exact = ops.rms_norm_rope_reference(x, weight, cos, sin, heads)
        check(out, plain_rope(x, weight, cos, sin, heads), exact)
    out = ops.rms_norm(q, weights[0])
    plain = F.rms_norm(q, q.shape[-1:], weights[0], 1e-6)
    check(out, plain, ops.rms_norm_reference(q, weights[0]))


Operators = Callable[..., tuple[Tensor, ...]]


def operators(backends: Backends) -> dict[str, Operators]:
    """Every differentiable operator as a function of tensors only."""

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        return (ops.layer_norm_modulate(x, scale, shift, out_dtype=BF16, backends=backends),)

    def residual(stream: Tensor, y: Tensor, gate: Tensor, w: Tensor, b: Tensor) -> Any:
        return ops.gated_residual(
            stream, y, gate, weight=w, bias=b, out_dtype=BF16, backends=backends
        )

    def summed(stream: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Any:
        return ops.gated_residual(
            stream, y, scale=scale, shift=shift, out_dtype=BF16, backends=backends
        )

    def rope(q: Tensor, k: Tensor, qw: Tensor, kw: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return ops.rms_norm_rope(q, k, qw, kw, cos, sin, num_heads=4, backends=backends)

    def rms(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (ops.rms_norm(x, weight, backends=backends),)

    return {"norm": norm, "residual": residual, "summed": summed, "rope": rope, "rms": rms}


def inputs(name: str, rows: int = 199, width: int = 760) -> tuple[list[Tensor], int]:
    """Arguments of one operator, and how many of them have gradients."""
    x, y = normal(2, rows, width), normal(2, rows, width, dtype=BF16)
    gate, scale, shift = tables(2, width).values()
    weight, bias = normal(2, width, dtype=BF16).unbind()
    angle = normal(rows, width // 8)
    given = {
        "norm": [x, scale, shift],
        "residual": [x, y, gate, weight, bias],
        "summed": [x, y, scale, shift],
        "rope": [y, x.to(BF16), weight, bias, angle.cos(), angle.sin()],
        "rms": [y, weight],
    }[name]
    return given, min(len(given), 4) if name == "rope" else len(given)


NAMES = ["norm", "residual", "summed", "rope", "rms"]


def gradients(run: Operators, given: list[Tensor], count: int, seeds: list[Tensor]) -> Any:
    leaves = [t.detach().clone().requires_grad_(i < count) for i, t in enumerate(given)]
    return torch.autograd.grad(run(*leaves), leaves[:count], seeds)


@pytest.mark.parametrize("name", NAMES)
def test_backward(name: str) -> None:
    """Against autograd of the reference in float32 on the same inputs."""
    given, count = inputs(name)
    run, plain = operators(TRITON)[name], operators(Backends(operators="reference"))[name]
    seeds = [torch.randn_like(out) for out in plain(*given)]
    exact = gradients(plain, [t.float() for t in given], count, seeds)
    ours = gradients(run, given, count, seeds)
    # Plain PyTorch here: the reference on rounded inputs, gradients rounded to the same dtypes.
    theirs = gradients(plain, given, count, seeds)
    for a, b, e in zip(ours, theirs, exact, strict=True):
        check(a, b, e)


def test_compiled() -> None:
    """All operators in one graph without a break, forward and backward, equal eager bit by bit."""
    given = {name: inputs(name) for name in NAMES}
    count = sum(n for _, n in given.values())
    order = [t[:n] for t, n in given.values()], [t[n:] for t, n in given.values()]
    flat = [t for group in order for part in group for t in part]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest, constants = list(tensors[:count]), list(tensors[count:])
        outs: list[Tensor] = []
        for name, (arguments, n) in given.items():
            mine, rest = rest[:n], rest[n:]
            extra = len(arguments) - n
            others, constants = constants[:extra], constants[extra:]
            outs += operators(TRITON)[name](*mine, *others)
        return tuple(outs)

    seeds = [torch.randn_like(out) for out in run(*flat)]
    eager = gradients(run, flat, count, seeds)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(compiled(*flat), run(*flat), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(compiled, flat, count, seeds), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # the sums may be added up anew
