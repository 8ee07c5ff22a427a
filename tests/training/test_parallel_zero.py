"""DeepSpeed's ZeRO-2 in two processes (gloo, CPU) beside one process; needs DeepSpeed.

The first run compiles DeepSpeed's collectives for the CPU, which takes two minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import tiny
from tests.training.ranks import alone, assert_close, run_ranks
from tests.training.two_ranks import run_loop

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
SECONDS = 400
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Results:
    (folder / "bf16").mkdir()
    checks = ["zero", "zero_bf16", "zero_context", "zero_skips", "zero_looped"]
    return run_ranks(folder, checks, SECONDS)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return alone(tiny.transformer(), tiny.diffusion_loss)


@pytest.mark.parametrize("check", ["zero", "zero_context", "zero_skips"])
def test_steps_equal_one_process(check: str, ranks: Results, expected: dict[str, Any]) -> None:
    """Learning rate, betas, epsilon, weight decay and clipping are the command line's."""
    for one in ranks:
        assert one[check]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert one[check]["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    if check != "zero_context":
        assert_close(ranks[0][check]["weights"], expected["weights"])


@pytest.mark.parametrize("check", ["zero", "zero_bf16"])
def test_resume(check: str, ranks: Results) -> None:
    for one in ranks:
        assert one[check]["after"]["losses"] == one[check]["losses"][2:]
        assert one[check]["after"]["norms"] == one[check]["norms"][2:]
    straight, resumed = ranks[0][check]["weights"], ranks[0][check]["resumed"]
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_bf16_has_float32_masters(ranks: Results, expected: dict[str, Any]) -> None:
    """Two micro steps of bf16, float32 masters: as one float32 step, but for bf16's rounding."""
    assert {w.dtype for w in ranks[0]["zero_bf16"]["weights"].values()} == {torch.bfloat16}
    assert ranks[0]["zero_bf16"]["losses"] == pytest.approx(expected["losses"], rel=2e-3)
    assert ranks[0]["zero_bf16"]["norms"] == pytest.approx(expected["norms"], rel=1e-2)


def test_loop_resumes(ranks: Results, folder: Path) -> None:
    """Two steps and, after the checkpoint, one: averaged weights as of one process."""
    run_loop(folder / "straight", batch_size=2)
    outputs = [folder / name / "final_pipeline" / "weights.pt" for name in ("run", "straight")]
    assert_close(*(torch.load(path) for path in outputs))


def test_not_finite(ranks: Results) -> None:
    assert all(one["zero_skips"]["first"] == float("inf") for one in ranks)
