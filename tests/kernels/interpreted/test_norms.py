"""layer_norm_modulate, gated_residual, rms_norm and rms_norm_rope against their references."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gen3r_kernels as ops
import gen3r_kernels.rms_norm_rope_int8  # registers its operators
from gen3r_kernels import Backends
from gen3r_kernels.layer_norm_modulate_backward import LayerNormBackwardConfig
from gen3r_kernels.layer_norm_rows import LayerNormConfig
from gen3r_kernels.quantized import Quantized
from gen3r_kernels.rms_norm_rope import RmsNormRopeConfig
from gen3r_kernels.rms_norm_rope_backward import RmsNormRopeBackwardConfig

TRITON = Backends(operators="triton")
BATCH, ROWS, WIDTH = 2, 11, 760  # awkward on purpose: no power of two, no multiple of anything
CONFIGS = (
    LayerNormConfig,
    LayerNormBackwardConfig,
    RmsNormRopeConfig,
    RmsNormRopeBackwardConfig,
)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums of 760 float32 in another order


@pytest.fixture(autouse=True)
def _four_rows_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at real sizes: several rows a program, and a last program with fewer."""
    for config in CONFIGS:

        def for_shape(cls: type, *args: Any, chosen: Any = config.for_shape) -> Any:
            return dataclasses.replace(chosen(*args), steps=4)

        monkeypatch.setattr(config, "for_shape", classmethod(for_shape))


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def with_outliers(x: Tensor) -> Tensor:
    """A few channels 50 times as large, as real transformers have."""
    x[..., ::97] *= 50
    return x


def tables(*names: str) -> dict[str, Tensor]:
    """Random tables for the named arguments; the batch's tables are slices, as in the model."""
    modulation = normal(BATCH, 6, WIDTH)
    places = {"shift": 0, "scale": 1, "gate": 2}
    return {
        n: modulation[:, places[n] : places[n] + 1] if n in places else normal(WIDTH) for n in names
    }


def gradients(
    function: Callable[..., Any], given: dict[str, Tensor], weights: list[Tensor]
) -> dict[str, Tensor]:
    """Gradients of sum(output * weight) for every given tensor."""
    leaves = {n: t.detach().clone().requires_grad_() for n, t in given.items()}
    outs = function(**leaves)
    outs = (outs,) if isinstance(outs, Tensor) else outs
    total = sum((o.float() * w).sum() for o, w in zip(outs, weights, strict=True))
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape and ours[name].dtype == expected.dtype
        bound = 2e-5 * max(1.0, expected.abs().max().item())
        error = (ours[name] - expected).abs().max().item()
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


NORMS = [(), ("scale", "shift"), ("weight", "bias"), ("scale", "shift", "weight", "bias")]


@pytest.mark.parametrize("names", NORMS, ids="-".join)
def test_layer_norm_modulate(names: tuple[str, ...]) -> None:
    given = {"x": with_outliers(normal(BATCH, ROWS, WIDTH) + 3), **tables(*names)}
    expected = ops.layer_norm_modulate_reference(**given)
    out = ops.layer_norm_modulate(**given, backends=TRITON)
    torch.testing.assert_close(out, expected, **CLOSE)
    half = ops.layer_norm_modulate(**given, out_dtype=torch.float16, backends=TRITON)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=1e-3, atol=1e-4)
    weights = [normal(BATCH, ROWS, WIDTH)]
    same_gradients(
        gradients(lambda **g: ops.layer_norm_modulate(**g, backends=TRITON), given, weights),
        gradients(ops.layer_norm_modulate_reference, given, weights),
    )


@pytest.mark.parametrize("names", [(), ("gate", "weight", "bias"), ("scale", "shift"), ("gate",)])
def test_gated_residual(names: tuple[str, ...]) -> None:
    shape = (BATCH, ROWS, WIDTH)
    given = {"stream": normal(*shape), "y": with_outliers(normal(*shape)), **tables(*names)}
    expected = ops.gated_residual_reference(**given)
    for ours, theirs in zip(ops.gated_residual(**given, backends=TRITON), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    weights = [normal(*shape), normal(*shape)]
    same_gradients(
        gradients(lambda **g: ops.gated_residual(**g, backends=TRITON), given, weights),
        gradients(ops.gated_residual_reference, given, weights),
    )


def test_only_the_gradients_asked_for() -> None:
    shape = (BATCH, ROWS, WIDTH)
    given = {"stream": normal(*shape), "y": normal(*shape), **tables("gate", "scale", "shift")}
    leaf = given["stream"].requires_grad_()
    _, normed = ops.gated_residual(**given, backends=TRITON)
    weight = normal(*shape)
    (ours,) = torch.autograd.grad((normed * weight).sum(), leaf)  # nothing flows into the stream
    reference = ops.gated_residual_reference(**given)[1]
    (expected,) = torch.autograd.grad((reference * weight).sum(), leaf)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_strided_rows_and_shared_tables() -> None:
    wide = normal(BATCH, ROWS, 2 * WIDTH)
    x, y = wide.chunk(2, dim=-1)
    scale = normal(1, 1, WIDTH)
    for source in (x, normal(ROWS, WIDTH, BATCH).permute(2, 0, 1)):
        given = {"stream": source, "y": y, "scale": scale}
        pairs = zip(
            ops.gated_residual(**given, backends=TRITON),
            ops.gated_residual_reference(**given),
            strict=True,
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, **CLOSE)
    weights = [normal(BATCH, ROWS, WIDTH), normal(BATCH, ROWS, WIDTH)]
    given = {"stream": x, "y": y, "gate": normal(1, 1, WIDTH), "scale": scale}
    same_gradients(
        gradients(lambda **g: ops.gated_residual(**g, backends=TRITON), given, weights),
        gradients(ops.gated_residual_reference, given, weights),
    )


def share_within_a_step(rows: Quantized, exact: Tensor) -> float:
    """Entries off by no more than e4m3's spacing. Triton's interpreter truncates, and halves 2-4 %
    of the values; a GPU rounds (tests/gpu/test_norms.py)."""
    spacing = exact.abs() / 8 + rows.scale * 2**-9
    return ((ops.dequantize(rows) - exact).abs() <= 1.01 * spacing).float().mean().item()


def test_eight_bits() -> None:
    """Values, scale and length in one pass."""
    given = {"x": with_outliers(normal(BATCH, ROWS, WIDTH)), **tables("scale", "shift")}
    given["x"][0, 3] = 0
    given["shift"][0], given["scale"][0] = 0, 0
    exact = ops.layer_norm_modulate_reference(**given)
    reference = ops.quantize_reference(exact)
    out = ops.layer_norm_modulate(**given, out_dtype=torch.float8_e4m3fn, backends=TRITON)
    torch.testing.assert_close(out.scale, reference.scale, **CLOSE)
    torch.testing.assert_close(out.length, reference.length, **CLOSE)
    assert not out.values[0, 3].float().any() and out.scale[0, 3] == 0
    assert share_within_a_step(out, exact) > 0.95
    stream, y = normal(2, BATCH, ROWS, WIDTH).unbind()
    updated, out = ops.gated_residual(stream, y, out_dtype=torch.float8_e4m3fn, backends=TRITON)
    torch.testing.assert_close(updated, stream + y)
    exact = ops.layer_norm_modulate_reference(updated)
    torch.testing.assert_close(out.length, exact.norm(dim=-1, keepdim=True), **CLOSE)
    assert share_within_a_step(out, exact) > 0.95


HEADS, HEAD_DIM = 3, 40


def rope_inputs(rows: int = ROWS) -> dict[str, Tensor]:
    width = HEADS * HEAD_DIM
    q, k = normal(2, BATCH, rows, width).unbind()
    q_weight, k_weight = normal(2, width).unbind()
    return {"q": with_outliers(q), "k": k, "q_weight": q_weight, "k_weight": k_weight}


def angles(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    a = normal(rows, HEAD_DIM // 2)
    return a.cos(), a.sin()


def rope_reference(table: tuple[Tensor, Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        return (
            ops.rms_norm_rope_reference(q, q_weight, *table, HEADS),
            ops.rms_norm_rope_reference(k, k_weight, *table, HEADS),
        )

    return run


def test_rms_norm_rope() -> None:
    given, table = rope_inputs(), angles()

    def run(**g: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = table
        return ops.rms_norm_rope(**g, cos=cos, sin=sin, num_heads=HEADS, backends=TRITON)

    for ours, theirs in zip(run(**given), rope_reference(table)(**given), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    weights = [normal(BATCH, ROWS, HEADS, HEAD_DIM) for _ in range(2)]
    same_gradients(gradients(run, given, weights), gradients(rope_reference(table), given, weights))


def test_rms_norm_rope_takes_slices_and_transposed_gradients() -> None:
    given, table = rope_inputs(), angles()
    both = torch.cat([given.pop("q"), given.pop("k")], dim=-1).requires_grad_()
    q, k = both.chunk(2, dim=-1)
    out = ops.rms_norm_rope(
        q, k, **given, cos=table[0], sin=table[1], num_heads=HEADS, backends=TRITON
    )
    expected = rope_reference(table)(q, k, **given)
    upstream = normal(BATCH, HEADS, ROWS, HEAD_DIM)  # attention's own order
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
        a = torch.autograd.grad(ours, both, upstream.transpose(1, 2), retain_graph=True)[0]
        b = torch.autograd.grad(theirs, both, upstream.transpose(1, 2), retain_graph=True)[0]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(BATCH, ROWS, WIDTH), (7, WIDTH), (2, 3, 4, 24)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    given = {"x": with_outliers(normal(*shape)), "weight": normal(shape[-1])}
    out = ops.rms_norm(**given, backends=TRITON)
    torch.testing.assert_close(out, ops.rms_norm_reference(**given), **CLOSE)
    weights = [normal(*shape)]
    same_gradients(
        gradients(lambda **g: ops.rms_norm(**g, backends=TRITON), given, weights),
        gradients(ops.rms_norm_reference, given, weights),
    )


def test_no_rows() -> None:
    x = normal(BATCH, 0, WIDTH).requires_grad_()
    weight = normal(WIDTH).requires_grad_()
    out = ops.rms_norm(
        ops.layer_norm_modulate(x, weight=weight, backends=TRITON), weight, backends=TRITON
    )
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and not weight.grad.any()


def test_refusals() -> None:
    x = normal(BATCH, ROWS, WIDTH)
    with pytest.raises(ValueError, match=r"scale .* does not fit rows"):
        ops.layer_norm_modulate(x, normal(BATCH, 1, 4), backends=TRITON)
    with pytest.raises(ValueError, match=r"takes \[B, S, C\]"):
        ops.layer_norm_modulate(x[0], backends=TRITON)
    with pytest.raises(ValueError, match="out_dtype"):
        ops.layer_norm_modulate(x, out_dtype=torch.int8, backends=TRITON)
    with pytest.raises(ValueError, match=r"y .* does not fit the stream"):
        ops.gated_residual(x, x[:, 1:], backends=TRITON)
    with pytest.raises(ValueError, match="8-bit rounding has no backward"):
        ops.layer_norm_modulate(x.requires_grad_(), out_dtype=torch.float8_e4m3fn, backends=TRITON)
    with pytest.raises(ValueError, match="up to float32, got float64"):
        ops.rms_norm(x.double(), normal(WIDTH), backends=TRITON)
    given, table = rope_inputs(), angles()
    given["k"] = given["k"].half()
    with pytest.raises(ValueError, match="differ"):
        ops.rms_norm_rope(**given, cos=table[0], sin=table[1], num_heads=HEADS, backends=TRITON)


def test_opcheck() -> None:
    """Schemas, fakes, autograd registration and tracing of every operator, 8-bit ones included."""
    x, y = normal(2, 2, 5, 48).unbind()
    scale, shift, gate = normal(3, 2, 1, 48).unbind()
    weight, bias = normal(2, 48).unbind()
    cos, sin = normal(2, 5, 8).unbind()
    leaf, y_leaf = (t.clone().requires_grad_() for t in (x, y))
    tables, gen3r = (scale, shift, weight, bias), torch.ops.gen3r
    rope = (weight, bias, cos, sin, 3, 1e-6)
    grad = y.unflatten(-1, (3, 16))
    check = torch.library.opcheck
    check(gen3r.layer_norm_modulate.default, (leaf, *tables, 1e-6, torch.float16))
    check(gen3r.layer_norm_modulate_float8.default, (x, *tables, 1e-6))
    check(gen3r.gated_residual.default, (leaf, y_leaf, gate, *tables, 1e-6, torch.float16))
    check(gen3r.gated_residual_float8.default, (x, y, gate, *tables, 1e-6))
    check(gen3r.rms_norm_rope.default, (leaf, y_leaf, *rope))
    check(gen3r.rms_norm.default, (leaf, weight, 1e-6))
    check(gen3r.rms_norm_rope_int8.default, (x, y, *rope, None, 64))
    check(gen3r.rope_key_mean.default, (x, weight, cos, sin, 3, 1e-6))
    dtypes = (torch.float32, torch.float32, True)
    check(gen3r.layer_norm_backward.default, (y, None, x, y, gate, scale, weight, 1e-6, *dtypes))
    check(gen3r.rms_norm_rope_backward.default, (grad, x, weight, cos, sin, 1e-6, True))


def test_one_graph() -> None:
    """torch.compile traces the public functions without a break."""
    x, y = normal(2, 2, 5, 48).unbind()
    weight, (cos, sin) = normal(48), normal(2, 5, 8).unbind()

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        stream, normed = ops.gated_residual(x, y, weight=weight, backends=TRITON)
        q, k = ops.rms_norm_rope(
            normed, stream, weight, weight, cos, sin, num_heads=3, backends=TRITON
        )
        rows = ops.layer_norm_modulate(x, out_dtype=torch.float8_e4m3fn, backends=TRITON)
        return stream, ops.rms_norm(normed, weight, backends=TRITON), q, k, rows.scale

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(x, y), run(x, y), strict=True):
        assert torch.equal(ours, eager)
