"""rms_norm_rope_int8 and its key mean against their references, in Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from gen3r_kernels import Backends, rms_norm_rope_reference
from gen3r_kernels.rms_norm_rope_int8 import (
    RmsNormRopeInt8Config,
    rms_norm_rope_int8,
    rms_norm_rope_int8_reference,
    rope_key_mean,
)

TRITON, REFERENCE = Backends(operators="triton"), Backends(operators="reference")


@pytest.fixture(autouse=True)
def _four_rows_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at real sizes: several rows a program, and a last program with fewer."""
    chosen = RmsNormRopeInt8Config.for_shape

    def for_shape(cls: type, *args: int) -> RmsNormRopeInt8Config:
        return dataclasses.replace(chosen(*args), steps=4)

    monkeypatch.setattr(RmsNormRopeInt8Config, "for_shape", classmethod(for_shape))


def inputs(rows: int, heads: int, dim: int) -> list[Tensor]:
    """q, k (slices of one tensor), weights, tables; k has a common part and outliers."""
    q, k = torch.randn(2, rows, 2 * heads * dim).chunk(2, dim=-1)
    k += 2
    k[..., ::17] *= 50
    angle = torch.randn(rows, dim // 2)
    weights = torch.rand(2, heads * dim) + 0.5
    return [q, k, *weights.unbind(), angle.cos(), angle.sin()]


@pytest.mark.parametrize("with_mean", [False, True])
@pytest.mark.parametrize("shape", [(75, 3, 40), (64, 2, 16), (7, 1, 24)])
def test_values_and_scales(shape: tuple[int, int, int], with_mean: bool) -> None:
    given, heads = inputs(*shape), shape[1]
    mean = None
    if with_mean:
        mean = rope_key_mean(given[1], *given[3:], num_heads=heads, backends=TRITON)
        exact = rope_key_mean(given[1], *given[3:], num_heads=heads, backends=REFERENCE)
        torch.testing.assert_close(mean, exact, rtol=1e-5, atol=1e-5)
    options = {"num_heads": heads, "k_mean": mean, "block": 64}
    ours = rms_norm_rope_int8(*given, **options, backends=TRITON)
    theirs = rms_norm_rope_int8_reference(*given, **options)
    for name in ("q_scale", "k_scale"):
        a, b = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    for name in ("q", "k"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == torch.int8 and a.shape == b.shape
        # A value on the edge between two integers may fall either way.
        off = (a.int() - b.int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-3


def test_rows_of_zeros() -> None:
    given = inputs(40, 2, 16)
    given[0][:, 3], given[1][:] = 0, 0
    out = rms_norm_rope_int8(*given, num_heads=2, backends=TRITON)
    assert not out.q[:, 3].any() and not out.k.any() and not out.k_scale.any()
    assert not out.q_scale[..., 3].any() and out.q_scale[..., 4].all()


def test_the_mean_changes_no_softmax_and_spares_bits() -> None:
    q, k, *rest = inputs(75, 2, 32)
    k[..., ::17] /= 50  # the common part alone, and turns that leave some of it
    q_weight, k_weight, *_ = rest
    angle = 0.2 * torch.randn(75, 16)
    table = rest[2:] = [angle.cos(), angle.sin()]
    exact_q = rms_norm_rope_reference(q, q_weight, *table, 2).transpose(1, 2)
    exact_k = rms_norm_rope_reference(k, k_weight, *table, 2).transpose(1, 2)
    exact = torch.softmax(exact_q @ exact_k.mT / 32**0.5, dim=-1)
    errors = []
    for mean in (None, rope_key_mean(k, k_weight, *table, num_heads=2, backends=TRITON)):
        out = rms_norm_rope_int8(q, k, *rest, num_heads=2, k_mean=mean, block=64, backends=TRITON)
        per_token = out.k_scale.repeat_interleave(64, dim=-1)[..., :75]
        rough_q = out.q.transpose(1, 2) * out.q_scale[..., None]
        rough_k = out.k.transpose(1, 2) * per_token[..., None]
        rough = torch.softmax(rough_q @ rough_k.mT / 32**0.5, dim=-1)
        errors.append(((rough - exact).norm() / exact.norm()).item())
    print(f"without mean {errors[0]:.1e}, with {errors[1]:.1e}")
    assert errors[1] < errors[0] < 0.05


def test_refusals() -> None:
    given = inputs(9, 2, 16)
    with pytest.raises(ValueError, match="block 100 is not one of"):
        rms_norm_rope_int8(*given, num_heads=2, block=100, backends=TRITON)
    with pytest.raises(ValueError, match=r"k_mean \[2, 16\]"):
        rms_norm_rope_int8(*given, num_heads=2, k_mean=torch.zeros(2, 16), backends=TRITON)
    with pytest.raises(ValueError, match="do not fit"):
        rms_norm_rope_int8(*given, num_heads=4, backends=TRITON)
    given[0] = given[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="no backward"):
        rms_norm_rope_int8(*given, num_heads=2, backends=TRITON)
