"""Recomputation changes no gradient, and keeps what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gen3r.nano import ARCHITECTURE
from gen3r.transformer import RawConditions, WanTransformer
from gen3r_kernels import Backends
from gen3r_training.activations import checkpoint_blocks, recompute

FRAMES, ROWS, COLUMNS = 2, 14, 28
BLOCKS = ARCHITECTURE.transformer.num_layers


def build() -> WanTransformer:
    torch.manual_seed(0)
    model = WanTransformer(ARCHITECTURE.transformer, Backends())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def step(model: WanTransformer) -> tuple[list[Tensor], int]:
    """Gradients of all parameters, and the operations of forward and backward."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    config = model.config
    raw = RawConditions(
        [draw(7, config.text_dim)],
        draw(1, 65, config.clip_dim),
        draw(1, 20, FRAMES, ROWS, COLUMNS),
        draw(1, 24, FRAMES, 8 * ROWS, 8 * COLUMNS),
    )
    latents = draw(1, 16, FRAMES, ROWS, COLUMNS)
    with FlopCounterMode(display=False) as counter:
        model(latents, torch.tensor([500.0]), raw, side_by_side=True).square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients, int(counter.get_total_flops())


def test_modes() -> None:
    model = build()
    expected, plain = step(model)
    work = {}
    for mode, kept in (("selective", BLOCKS), ("selective", 3), ("selective", 0), ("full", 0)):
        checkpoint_blocks(model, mode, kept)
        gradients, work[mode, kept] = step(model)
        for actual, wanted in zip(gradients, expected, strict=True):
            assert torch.equal(actual, wanted)
    assert plain <= work["selective", BLOCKS] < work["selective", 3] < work["selective", 0]
    assert work["selective", 0] <= work["full", 0]  # sdpa is not counted on a CPU
    checkpoint_blocks(model, "none")
    assert step(model)[1] == plain


def test_without_gradients_nothing_is_kept() -> None:
    run = recompute("selective")
    with torch.no_grad():
        assert run(torch.add, torch.ones(1), torch.ones(1)).item() == 2


def test_refusals() -> None:
    model = build()
    with pytest.raises(ValueError, match=r"'some' is unknown; known: none, selective, full"):
        checkpoint_blocks(model, "some")
    with pytest.raises(
        ValueError, match=f"{BLOCKS + 1} blocks to keep: the transformer has {BLOCKS}"
    ):
        checkpoint_blocks(model, "selective", BLOCKS + 1)
    with pytest.raises(ValueError, match="only with 'selective', not with 'full'"):
        checkpoint_blocks(model, "full", 1)
