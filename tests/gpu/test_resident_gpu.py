"""Resident stages on a GPU: a replayed step gives what a plain one gives, in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gen3r_training.resident.adapter import AdapterObjective
from gen3r_training.resident.config import ResidentConfig
from gen3r_training.resident.diffusion import DiffusionObjective
from gen3r_training.resident.steps import Stepper
from tests.training.resident_tiny import tiny_clips, tiny_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]


@pytest.mark.parametrize(
    ("stage", "make"), [("adapter", AdapterObjective), ("diffusion", DiffusionObjective)]
)
def test_a_captured_step_is_a_plain_one(stage: str, make: Any) -> None:
    options = ResidentConfig(stage=stage, data=Path("data"), output=Path("out"))
    pipeline = tiny_pipeline().to("cuda", torch.bfloat16)
    clips = tiny_clips(4).to("cuda")
    objective = make(pipeline, clips, clips, options)
    generator = torch.Generator("cuda").manual_seed(0)
    captured, plain = (Stepper(objective, captured=how) for how in (True, False))
    for _ in range(2):  # the second batch is a replay alone
        batch = objective.draw(generator, 4)
        found, ours = taken(captured, batch)
        wanted, theirs = taken(plain, batch)
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, rel=2e-2, abs=1e-4), name
        # Sums in another order, rounded to bf16.
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
    assert objective.evaluate()


def taken(stepper: Stepper, batch: Any) -> tuple[dict[str, float], Tensor]:
    """Loss and logs, and all gradients in one row, which are gone from the parameters."""
    loss, logs = stepper.run(batch)
    rows = []
    for parameter in stepper.trained.values():
        if parameter.grad is not None:
            rows.append(parameter.grad.float().flatten())
        parameter.grad = None
    return {name: value.item() for name, value in (logs | {"loss": loss}).items()}, torch.cat(rows)
