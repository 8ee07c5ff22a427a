"""VGGT's operators on a GPU: bf16 against float32, compiled, and the heads and aggregator whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gen3r import stages
from gen3r.config import VGGTConfig
from gen3r.vggt import VGGT, token_list, token_views
from gen3r_kernels import (
    Backends,
    conv2d_add_relu,
    conv2d_add_relu_reference,
    dense_output,
    dense_output_reference,
    layer_norm_rope,
    layer_norm_rope_reference,
    resize_bilinear,
    resize_bilinear_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LAST = torch.channels_last
REFERENCE = Backends(operators="reference")
HALF_STEP = 2.0**-9  # a bf16 rounding of the reference, relative
SMALL = VGGTConfig(
    embed_dim=256,
    depth=4,
    num_heads=4,
    vit_depth=2,
    vit_num_heads=4,
    trunk_depth=1,
    features=64,
    out_channels=(64, 128, 128, 128),
    intermediate_layer_idx=(0, 1, 2, 3),
)


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references are float32, not TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def normal(*shape: int, last: bool = False) -> Tensor:
    x = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
    return x.contiguous(memory_format=LAST) if last else x


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def check(operator: Callable[..., Any], reference: Callable[..., Any]) -> None:
    """At most twice the error of PyTorch's operators in bf16; the same when compiled."""
    exact, plain = outputs(reference()), outputs(operator(backends=REFERENCE))
    torch.full((64 << 20,), float("nan"), device="cuda")  # what is not written shows
    ours = outputs(operator(backends=Backends()))
    torch.compiler.reset()  # recompile limits are per function
    graph = torch.compile(
        lambda: operator(backends=Backends()), fullgraph=True, backend="aot_eager"
    )
    compiled = outputs(graph())
    for mine, theirs, again, right in zip(ours, plain, compiled, exact, strict=True):
        slack = HALF_STEP * right.abs().max()
        assert mine.shape == right.shape
        for found in (mine, again):
            error = (found.float() - right).abs().max()
            assert error <= 2 * (theirs.float() - right).abs().max() + slack


def gradients(
    operator: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    backends: Backends,
) -> tuple[Tensor, ...]:
    """Of inputs in `dtype`, for the same random gradients of the outputs whatever the dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    results = outputs(operator(*leaves, backends=backends))
    torch.manual_seed(5)
    upstream = [normal(*y.shape).to(y) for y in results]
    return torch.autograd.grad(results, leaves, upstream)


def check_gradients(operator: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """At most twice the error of PyTorch's operators in bf16, and repeatable."""
    exact = gradients(operator, inputs, torch.float32, REFERENCE)
    plain = gradients(operator, inputs, torch.bfloat16, REFERENCE)
    torch.full((64 << 20,), float("nan"), device="cuda")  # what is not written shows
    ours, again = (gradients(operator, inputs, torch.bfloat16, Backends()) for _ in range(2))
    for mine, theirs, repeated, right in zip(ours, plain, again, exact, strict=True):
        error = (mine.float() - right).abs().max()
        slack = HALF_STEP * right.abs().max()
        assert error <= 2 * (theirs.float() - right).abs().max() + slack
        assert mine.stride() == repeated.stride() and mine.shape == right.shape
        torch.testing.assert_close(mine, repeated, rtol=2**-7, atol=float(slack))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_convolution(relu: bool, residual: bool) -> None:
    x, weight = normal(3, 64, 37, 41, last=True), normal(96, 64, 3, 3, last=True) / 24
    bias, added = normal(96), normal(3, 96, 37, 41, last=True) if residual else None
    check(
        lambda backends: conv2d_add_relu(
            x, weight, bias, residual=added, relu=relu, backends=backends
        ),
        lambda: conv2d_add_relu_reference(x, weight, bias, added, relu),
    )


@pytest.mark.parametrize("relu", [False, True])
def test_convolution_backward(relu: bool) -> None:
    x, weight = normal(3, 64, 37, 41, last=True), normal(96, 64, 3, 3, last=True) / 24
    inputs = x, weight, normal(96), normal(3, 96, 37, 41, last=True)

    def operator(*given: Tensor, backends: Backends) -> Tensor:
        x, weight, bias, added = given
        return conv2d_add_relu(x, weight, bias, residual=added, relu=relu, backends=backends)

    check_gradients(operator, inputs)


SIZES = [
    ((20, 20), (40, 40)),
    ((33, 40), (57, 71)),
    ((160, 160), (320, 320)),
    ((64, 40), (112, 70)),
]


@pytest.mark.parametrize("channels", [128, 256])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_resize_backward(sizes: tuple[tuple[int, int], tuple[int, int]], channels: int) -> None:
    small, size = sizes
    added = normal(3, channels, *size, last=True)

    def operator(x: Tensor, added: Tensor, backends: Backends) -> Tensor:
        return resize_bilinear(x, size, added=added, backends=backends)

    check_gradients(operator, (normal(3, channels, *small, last=True), added))


def test_resize_backward_repeats_bit_by_bit() -> None:
    x = normal(2, 128, 320, 320, last=True).requires_grad_()
    y = resize_bilinear(x, (560, 560))
    g = normal(*y.shape, last=True)
    first, second = (torch.autograd.grad(y, x, g, retain_graph=True)[0] for _ in range(2))
    assert first.is_contiguous(memory_format=LAST) and torch.equal(first, second)
    # The map's mean keeps: every row of weights sums to one.
    sums = first.double().sum((2, 3)) - g.double().sum((2, 3))
    assert sums.abs().max() <= 2**-7 * first.double().square().sum((2, 3)).sqrt().max()


@pytest.mark.parametrize("channels", [128, 256])
def test_resize(channels: int) -> None:
    x, size = normal(3, channels, 33, 40, last=True), (57, 71)
    added = normal(3, channels, *size, last=True)
    position = tuple(torch.randn(n, channels // 2, device="cuda") for n in reversed(size))
    check(
        lambda backends: resize_bilinear(
            x, size, position=position, added=added, backends=backends
        ),
        lambda: resize_bilinear_reference(x, size, position, added),
    )


@pytest.mark.parametrize("count", [2, 4])
def test_output(count: int) -> None:
    x, weight, bias = normal(3, 32, 57, 71, last=True), normal(count, 32) / 6, normal(count)
    check(
        lambda backends: dense_output(x, weight, bias, exponential=True, backends=backends),
        lambda: dense_output_reference(x, weight, bias, True),
    )


@pytest.mark.parametrize("count", [2, 4])
def test_output_backward(count: int) -> None:
    inputs = normal(3, 32, 57, 71, last=True), normal(count, 32) / 6, normal(count)

    def operator(*given: Tensor, backends: Backends) -> tuple[Tensor, Tensor]:
        return dense_output(*given, exponential=count == 2, backends=backends)

    check_gradients(operator, inputs)


def test_norm_and_rotation() -> None:
    q, k, _ = (normal(2, 3 * 333, 3, 16, 64) + 2).unbind(2)
    norms = [(1 + normal(64) / 5, normal(64)) for _ in range(2)]
    angles = torch.randn(333, 2, 1, 16, device="cuda").expand(-1, -1, 2, -1).reshape(333, 64)
    tables = (angles.cos(), angles.sin())
    check(
        lambda backends: layer_norm_rope(q, k, *norms, tables, backends=backends),
        lambda: layer_norm_rope_reference(q, k, *norms, tables),
    )


def build(backends: Backends, dtype: torch.dtype) -> VGGT:
    torch.manual_seed(3)
    return VGGT(SMALL, backends).to("cuda", dtype).eval().requires_grad_(False)


@torch.no_grad()
def test_heads_and_aggregator() -> None:
    """No further from float32 than PyTorch's operators in bf16, within a factor of two."""
    exact, plain, ours = (
        build(b, d)
        for b, d in (
            (REFERENCE, torch.float32),
            (REFERENCE, torch.bfloat16),
            (Backends(), torch.bfloat16),
        )
    )
    for rounded in (plain, ours):
        rounded.load_state_dict(exact.state_dict())
    exact.load_state_dict(ours.state_dict())
    images = torch.rand(1, 3, 3, 560, 560, device="cuda")
    lists = [m.aggregator(images.to(next(m.parameters()).dtype)) for m in (exact, plain, ours)]
    for right, theirs, mine in zip(*lists, strict=True):
        assert (mine.float() - right).norm() <= 2 * (theirs.float() - right).norm()
    tokens = torch.randn(1, 5, 40, 40, 10 * SMALL.embed_dim, device="cuda").bfloat16()
    layers, camera = token_views(tokens)
    right = exact.depth_head(token_list(tokens.float()), 560, 560)
    theirs = plain.depth_head(token_list(tokens), 560, 560)
    mine = ours.depth_head(layers, 560, 560, patch_start_idx=0)
    for a, b, c in zip(right, theirs, mine, strict=True):
        assert (c - a).norm() <= 2 * (b - a).norm()
    pose = [m.camera_head(t)[-1] for m, t in ((exact, camera.float()), (ours, camera))]
    assert (pose[1] - pose[0]).norm() <= 0.02 * pose[0].norm()


@pytest.mark.parametrize("name", ["depth_head", "point_head"])
def test_gradient_of_a_whole_head(name: str) -> None:
    """Of a loss of the values alone, as in training: frozen weights, no gradient of confidences."""
    exact, ours = build(REFERENCE, torch.float32), build(Backends(), torch.bfloat16)
    plain = build(REFERENCE, torch.bfloat16)
    plain.load_state_dict(ours.state_dict())
    exact.load_state_dict(ours.state_dict())
    tokens = torch.randn(1, 3, 40, 40, 10 * SMALL.embed_dim, device="cuda").bfloat16()
    upstream = torch.randn(1, 3, 560, 560, 1 if name == "depth_head" else 3, device="cuda")
    found = []
    for model, dtype in ((exact, torch.float32), (plain, torch.bfloat16), (ours, torch.bfloat16)):
        given = tokens.to(dtype).requires_grad_()
        values, _ = getattr(model, name)(token_views(given)[0], 560, 560, patch_start_idx=0)
        found.append(torch.autograd.grad(values, given, upstream)[0].float())
    right, theirs, mine = found
    assert right.any() and (mine - right).norm() <= 2 * (theirs - right).norm()


@torch.no_grad()
def test_maps_of_any_memory_format() -> None:
    model = build(Backends(), torch.bfloat16)
    tokens = torch.randn(1, 5, 8, 8, 10 * SMALL.embed_dim, device="cuda").bfloat16()
    rows_first = tokens.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    need = frozenset({"depth", "cameras"})
    a, b = (stages.read_heads(model, t, 112, 112, need) for t in (tokens, rows_first))
    assert a.depth is not None and b.depth is not None and a.points is None
    assert (a.depth - b.depth).norm() <= 0.01 * a.depth.norm()
