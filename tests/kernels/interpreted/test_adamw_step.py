"""adamw_step against its reference and PyTorch's AdamW; stochastic rounding has no bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r_kernels import AdamWPlan, AdamWStep, Backends, Moments, adamw_step
from gen3r_kernels.adamw_step import adamw_step_reference

TRITON = Backends(operators="triton")
SHAPES = ((3,), (17, 129), (2, 3, 5, 7), (2048,))


def make(masters: bool) -> tuple[list[Tensor], Moments]:
    torch.manual_seed(0)
    parameters = [torch.randn(*s).bfloat16() for s in SHAPES]
    parameters[2] = parameters[2].contiguous(memory_format=torch.channels_last)
    wide = [p.float() for p in parameters]
    moments = Moments(
        [torch.zeros_like(p) for p in wide],
        [torch.zeros_like(p) for p in wide],
        wide if masters else None,
    )
    return parameters, moments


def numbers(step: int, **changes: float) -> AdamWStep:
    values = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "weight_decay": 0.1}
    return AdamWStep(**(values | changes), step=step, seed=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masters(dtype: torch.dtype) -> None:
    """Three steps against the reference and, from float32, against torch.optim.AdamW."""
    parameters, moments = make(True)
    expected, reference = make(True)
    assert reference.masters is not None and moments.masters is not None
    theirs = [m.clone().requires_grad_() for m in reference.masters]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    plan = AdamWPlan(parameters, moments)
    for step in (1, 2, 3):
        gradients = [torch.randn_like(p, dtype=dtype) for p in parameters]
        adamw_step(plan, gradients, numbers(step, scale=0.5), backends=TRITON)
        for i, (p, g) in enumerate(zip(expected, gradients, strict=True)):
            first, second, master = (
                list[i] for list in (reference.first, reference.second, reference.masters)
            )
            adamw_step_reference(p, g, first, second, master, numbers(step, scale=0.5))
            theirs[i].grad = 0.5 * g.float()
        optimizer.step()
    for i, p in enumerate(parameters):
        torch.testing.assert_close(moments.masters[i], reference.masters[i], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(moments.masters[i], theirs[i].detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.second[i], reference.second[i], rtol=1e-6, atol=1e-9)
        # Triton's interpreter cuts float32 off where bf16 rounds.
        torch.testing.assert_close(p, expected[i], rtol=2**-7, atol=0)


@pytest.mark.parametrize("operators", ["triton", "reference"])
def test_stochastic(operators: str) -> None:
    """Each value is one of its two bf16 neighbours; repeated steps keep the sum of small ones."""
    parameter = torch.ones(4096).bfloat16()
    moments = Moments([torch.zeros(4096)], [torch.zeros(4096)], None)
    plan = AdamWPlan([parameter], moments)
    backends = Backends(operators=operators)
    for step in range(1, 9):
        # Alike gradients: every step is lr. A bf16 step below 1 is 2^-8, eight times as much.
        gradient = torch.ones(4096).bfloat16()
        values = numbers(step, lr=2.0**-11, weight_decay=0.0)
        adamw_step(plan, [gradient], values, backends=backends)
    assert set((parameter.float() * 256).unique().tolist()) <= set(range(248, 257))
    # Expected 1 - 8 * 2^-11; the deviation of 4096 independent walks is below 2^-8 * sqrt(8) / 64.
    assert abs(parameter.float().mean().item() - (1 - 2.0**-8)) < 5e-4
    again = torch.ones(4096).bfloat16()
    plan = AdamWPlan([again], Moments([torch.zeros(4096)], [torch.zeros(4096)], None))
    for step in range(1, 9):
        values = numbers(step, lr=2.0**-11, weight_decay=0.0)
        adamw_step(plan, [torch.ones(4096).bfloat16()], values, backends=backends)
    assert torch.equal(again, parameter)


def test_refusals() -> None:
    parameters, moments = make(True)
    with pytest.raises(ValueError, match="bfloat16"):
        AdamWPlan([p.float() for p in parameters], moments)
    plan = AdamWPlan(parameters, moments)
    with pytest.raises(ValueError, match="gradients for 4"):
        adamw_step(plan, [parameters[0]], numbers(1))
    wrong = [torch.zeros(1).bfloat16() for _ in parameters]
    with pytest.raises(ValueError, match=r"a gradient \(1,\)"):
        adamw_step(plan, wrong, numbers(1))
