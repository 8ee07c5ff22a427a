"""Optimizer: against PyTorch's AdamW, accumulation, clipping, states that go on bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gen3r_training.optimizer import Optimizer, gradient_norm

MASTERS = ("none", "float32", "stochastic")


def build(master: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Conv1d(1, 2, 3))
    return module if master == "none" else module.bfloat16()


def backward(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(module.parameters()).dtype
    x = torch.randn(5, 1, 7, generator=generator).to(dtype)
    module(x).float().square().mean().backward()


def make(module: nn.Module, master: str, **changes: int) -> Optimizer:
    return Optimizer(module, lr=1e-2, weight_decay=0.1, master=master, seed=3, **changes)


def values(optimizer: Optimizer) -> list[Tensor]:
    return [t.clone() for t in (*optimizer.masters().values(), *optimizer.state_dict().values())]


def test_is_adamw() -> None:
    """float32: PyTorch's AdamW behind PyTorch's clipping."""
    module, twin = build("none"), build("none")
    ours = make(module, "none")
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        backward(module, step)
        backward(twin, step)
        expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        for group in theirs.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        theirs.step()
        theirs.zero_grad()
        assert ours.step(1e-2 / (1 + step), 0.05) == pytest.approx(expected.item(), rel=1e-6)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert p.grad is None


@pytest.mark.parametrize("master", ["float32", "stochastic"])
def test_bf16_follows_float32(master: str) -> None:
    """Small steps are not lost: after 40 steps bf16 weights are where float32 ones are."""
    module, wide = build(master), build("none")
    with torch.no_grad():
        for p, q in zip(wide.parameters(), module.parameters(), strict=True):
            p.copy_(q)
    ours, theirs = make(module, master), make(wide, "none")
    for step in range(40):
        for part, optimizer in ((module, ours), (wide, theirs)):
            backward(part, step % 4)
            optimizer.step(2e-4)
    start = build("none")
    with torch.no_grad():
        moved = torch.cat([(p - q).flatten() for p, q in _pairs(wide, start.bfloat16().float())])
        apart = torch.cat([(p - q).flatten() for p, q in _pairs(module, wide)])
    # The direction holds; a single weight is uncertain by a bf16 step with stochastic rounding.
    limit = 0.2 if master == "float32" else 0.6
    assert apart.norm() < limit * moved.norm()
    if master == "float32":
        for name, tensor in ours.masters().items():
            assert torch.equal(ours.parameters[name], tensor.bfloat16())


def _pairs(a: nn.Module, b: nn.Module) -> list[tuple[Tensor, Tensor]]:
    mine = [p.detach().float() for p in a.parameters()]
    return list(zip(mine, [p.detach().float() for p in b.parameters()], strict=True))


@pytest.mark.parametrize("master", MASTERS)
def test_goes_on_bit_for_bit(master: str) -> None:
    module = build(master)
    optimizer = make(module, master)
    for step in range(3):
        backward(module, step)
        optimizer.step(1e-2, 0.1)
    weights = {name: t.clone() for name, t in optimizer.masters().items()}
    state = {name: t.clone() for name, t in optimizer.state_dict().items()}
    other = build(master, seed=1)
    resumed = make(other, master)
    with torch.no_grad():
        for name, tensor in resumed.masters().items():
            tensor.copy_(weights[name])
    resumed.publish()
    resumed.load_state_dict(state)
    for step in range(3, 6):
        for part, one in ((module, optimizer), (other, resumed)):
            backward(part, step)
            one.step(1e-2, 0.1)
    for a, b in zip(values(optimizer), values(resumed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("master", MASTERS)
def test_accumulation(master: str) -> None:
    """Two backward passes make one step with their sum."""
    module, twin = build(master), build(master)
    ours, theirs = make(module, master, micro_steps=2), make(twin, master)
    for step in range(2):
        for micro in range(2):
            backward(module, 2 * step + micro)
            ours.accumulate()
            backward(twin, 2 * step + micro)  # .grad adds up by itself, in bf16 where it is bf16
        norm = ours.step(1e-2)
        assert norm == pytest.approx(theirs.step(1e-2), rel=1e-6 if master == "none" else 1e-2)
    for p, q in zip(ours.masters().values(), theirs.masters().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7 if master == "none" else 1e-2)


@pytest.mark.parametrize("master", MASTERS)
def test_not_finite(master: str) -> None:
    """Nothing changes, the norm says why, and the next step is unharmed."""
    module = build(master)
    optimizer = make(module, master)
    backward(module, 0)
    optimizer.step(1e-2)
    before = values(optimizer)
    backward(module, 1)
    parameter = next(module.parameters())
    assert parameter.grad is not None
    parameter.grad[0] = math.inf
    assert not math.isfinite(optimizer.step(1e-2, 0.5))
    for a, b in zip(before, values(optimizer), strict=True):
        assert torch.equal(a, b)
    assert optimizer.steps == 1 and parameter.grad is None


def test_refusals() -> None:
    module = build("none")
    with pytest.raises(ValueError, match=r"'twice' are unknown; known: none, float32, stochastic"):
        make(module, "twice")
    with pytest.raises(ValueError, match=r"train torch.bfloat16 parameters, 0.weight is torch.fl"):
        make(module, "float32")
    with pytest.raises(ValueError, match="nothing to train"):
        make(build("none").requires_grad_(False), "none")
    optimizer = make(module, "none")
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"first.0.weight is \(1,\), this model's is \(11, 7\)"):
        optimizer.load_state_dict(state | {"first.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="missing or unknown entries: more"):
        optimizer.load_state_dict(state | {"more": torch.zeros(1)})


def test_norm() -> None:
    parts = [torch.full((3,), 2.0), torch.full((2, 2), -1.0)]
    assert gradient_norm(parts) == 4.0
    assert gradient_norm([p.bfloat16() for p in parts]) == 4.0
