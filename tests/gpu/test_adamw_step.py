"""adamw_step on the GPU against its reference, and training that goes on bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gen3r_kernels import AdamWPlan, AdamWStep, Moments, adamw_step, adamw_step_reference
from gen3r_training.optimizer import Optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
SHAPES = ((3,), (1536, 8960), (1, 6, 1536), (64, 32, 3, 3, 3), (4097,))


def make(masters: bool) -> tuple[list[Tensor], Moments]:
    torch.manual_seed(0)
    parameters = [torch.randn(*s, device="cuda").bfloat16() for s in SHAPES]
    parameters[3] = parameters[3].contiguous(memory_format=torch.channels_last_3d)
    wide = [p.float() for p in parameters]
    zeros = [torch.zeros_like(p) for p in wide]
    return parameters, Moments(zeros, [z.clone() for z in zeros], wide if masters else None)


def numbers(step: int) -> AdamWStep:
    return AdamWStep(1e-2, 0.9, 0.99, 1e-8, 0.1, step, scale=0.3, seed=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masters(dtype: torch.dtype) -> None:
    parameters, moments = make(True)
    expected, reference = make(True)
    assert moments.masters is not None and reference.masters is not None
    plan = AdamWPlan(parameters, moments)
    for step in (1, 2, 3):
        gradients = [torch.randn_like(p, dtype=dtype) for p in parameters]
        adamw_step(plan, gradients, numbers(step))
        for i, (p, g) in enumerate(zip(expected, gradients, strict=True)):
            lists = (reference.first, reference.second, reference.masters)
            adamw_step_reference(p, g, *(x[i] for x in lists), numbers(step))
    for i, p in enumerate(parameters):
        torch.testing.assert_close(moments.masters[i], reference.masters[i], rtol=2e-6, atol=1e-6)
        assert torch.equal(p, moments.masters[i].bfloat16())


def test_stochastic() -> None:
    """Neighbours only, no bias, and the same bits again."""
    results = []
    for _ in range(2):
        parameters = [torch.ones(2**20, device="cuda").bfloat16() for _ in range(2)]
        zeros = [torch.zeros(2**20, device="cuda") for _ in range(4)]
        plan = AdamWPlan(parameters, Moments(zeros[:2], zeros[2:], None))
        for step in range(1, 9):
            values = AdamWStep(2.0**-11, 0.9, 0.99, 1e-8, 0.0, step, seed=7)
            adamw_step(plan, [torch.ones_like(p) for p in parameters], values)
        results.append(parameters)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)
        assert abs(p.double().mean().item() - (1 - 2.0**-8)) < 3e-5
    first, second = results[0]
    # Tensors have streams of their own: alike values are rounded apart.
    assert (first != second).float().mean().item() > 0.05


@pytest.mark.parametrize("master", ["float32", "stochastic"])
def test_goes_on(master: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(64, 32, device="cuda", dtype=torch.bfloat16)
    twin = nn.Linear(64, 32, device="cuda", dtype=torch.bfloat16)
    ours, theirs = (Optimizer(m, lr=1e-3, master=master, seed=1) for m in (module, twin))
    x = torch.randn(16, 64, device="cuda").bfloat16()
    for step in range(6):
        if step == 3:
            for name, tensor in theirs.masters().items():
                tensor.copy_(ours.masters()[name])
            theirs.publish()
            theirs.load_state_dict({n: t.clone() for n, t in ours.state_dict().items()})
        for m, optimizer in ((module, ours), (twin, theirs)):
            m(x).float().square().mean().backward()
            optimizer.step(1e-3, 1.0)
    assert torch.equal(module.weight, twin.weight)
