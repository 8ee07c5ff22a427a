"""A block of the embedded model's sizes with int8 scores and every operator in Triton.

In float32: Triton's interpreter does not compute in bfloat16, which 8-bit products give.
"""

from __future__ import annotations

import torch

from gen3r.nano import build_untrained
from gen3r.precision import Precision, apply_precision
from gen3r.transformer import StepConstants, WanTransformer
from gen3r_kernels import Backends


def build(backends: Backends) -> WanTransformer:
    model = build_untrained(backends=backends).transformer
    model.blocks = model.blocks[:1]
    apply_precision(model, Precision(scores="int8"))
    return model


def prepare(model: WanTransformer) -> StepConstants:
    rng = torch.Generator().manual_seed(0)
    text = [torch.randn(n, model.config.text_dim, generator=rng) for n in (3, 5)]
    image = torch.randn(2, 17, model.config.clip_dim, generator=rng)
    control = torch.randn(1, 20, 1, 4, 8, generator=rng).repeat(2, 1, 1, 1, 1)
    return model.prepare(model.condition(text, image, control, None), scenes=1)


@torch.no_grad()
def test_a_step() -> None:
    latents = torch.randn(1, 16, 1, 4, 8)
    steps = []
    for mode in ("triton", "reference"):
        model = build(Backends(attention="reference", operators=mode))
        tables = model.tables(torch.tensor([500.0]))
        steps.append(model.velocity(latents, tables, prepare(model)))
    ours, theirs = steps
    # A value on the edge between two integers may fall either way.
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4
