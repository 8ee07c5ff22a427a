"""rms_norm_rope_int8 on a GPU, in bf16: values and scales, eager and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r_kernels import Backends
from gen3r_kernels.rms_norm_rope import rms_norm_rope_reference
from gen3r_kernels.rms_norm_rope_int8 import (
    Int8QueriesKeys,
    rms_norm_rope_int8,
    rms_norm_rope_int8_reference,
    rope_key_mean,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def inputs(batch: int, rows: int, heads: int, dim: int, outliers: bool) -> list[Tensor]:
    q, k = torch.randn(2, batch, rows, heads * dim, device="cuda").unbind()
    if outliers:
        q[..., ::97] *= 50
        k[..., ::97] *= 50
    q, k = q.bfloat16(), (k + 1).bfloat16()
    angle = torch.randn(rows, dim // 2, device="cuda")
    weights = torch.rand(2, heads * dim, device="cuda").bfloat16() + 0.5
    return [q, k, *weights.unbind(), angle.cos(), angle.sin()]


def same(ours: Int8QueriesKeys, theirs: Int8QueriesKeys) -> None:
    for name in ("q_scale", "k_scale"):
        a, b = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    for name in ("q", "k"):
        # A value on the edge between two integers may fall either way.
        off = (getattr(ours, name).int() - getattr(theirs, name).int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-3, name


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("shape", [(2, 199, 5, 152), (2, 31850, 12, 128), (1, 3, 12, 128)])
def test_against_the_reference(shape: tuple[int, int, int, int], outliers: bool) -> None:
    given, heads = inputs(*shape, outliers), shape[2]
    poison = torch.full((2**28,), float("nan"), device="cuda")
    del poison
    mean = rope_key_mean(given[1], *given[3:], num_heads=heads)
    exact = rope_key_mean(
        given[1], *given[3:], num_heads=heads, backends=Backends(operators="reference")
    )
    # The keys are rounded to bf16 before they are averaged: half a unit, 2^-8 of the largest.
    keys = rms_norm_rope_reference(given[1], *given[3:], heads)
    assert (mean - exact).abs().max() <= 2**-8 * keys.abs().max()
    for k_mean in (None, mean):
        ours = rms_norm_rope_int8(*given, num_heads=heads, k_mean=k_mean)
        same(ours, rms_norm_rope_int8_reference(*given, num_heads=heads, k_mean=k_mean))


def test_compiled() -> None:
    given = inputs(2, 199, 4, 64, False)

    def run(q: Tensor, k: Tensor, *rest: Tensor) -> Int8QueriesKeys:
        mean = rope_key_mean(k, *rest[1:], num_heads=4)
        return rms_norm_rope_int8(q, k, *rest, num_heads=4, k_mean=mean)

    torch._dynamo.reset()
    for a, b in zip(torch.compile(run, fullgraph=True)(*given), run(*given), strict=True):
        assert torch.equal(a, b)
