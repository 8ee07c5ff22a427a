"""The loop on a toy stage: what a run leaves, and that an interrupted one goes on bit for bit."""

from __future__ import annotations

import fcntl
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gen3r_training.checkpoints import found
from gen3r_training.ema import Ema, decay_at
from gen3r_training.stopping import Stopped, TrainingError
from tests.training.toy import (
    ToyStage,
    elsewhere,
    final_weights,
    free_port,
    kill_in_save,
    kill_in_step,
    losses,
    metrics,
    run,
    same,
    two_ranks,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that nothing interrupted, with averaged weights."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run(output, ema=0.9)
    return output


def test_what_a_run_leaves(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, 9))
    names = {"step", "loss", "lr", "grad_norm", "seconds", "error", "pixels"}
    assert all(names <= set(line) for line in lines)
    assert lines[0]["error"] == pytest.approx(math.sqrt(lines[0]["loss"]), rel=1e-6)
    assert list(found(whole / "checkpoints")) == [3, 6, 8]
    assert sorted(p.name for p in whole.iterdir()) == [
        ".lock",
        "checkpoints",
        "final_pipeline",
        "metrics.jsonl",
    ]
    assert not list((whole / "checkpoints").glob(".*"))


# ------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize(("kill", "place"), [(kill_in_step, 4), (kill_in_save, 6)])
def test_killed_run_resumes_bit_for_bit(
    whole: Path, tmp_path: Path, kill: Any, place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 in the middle of the fifth step; and half through the checkpoint of step 6."""
    output = tmp_path / "out"
    assert elsewhere(kill, output, place, {"ema": 0.9}) == [-signal.SIGKILL]
    assert list(found(output / "checkpoints")) == [3]
    half_written = list((output / "checkpoints").glob(".*"))
    assert len(half_written) == (kill is kill_in_save)
    stage = ToyStage()
    run(output, stage, ema=0.9, resume="auto")
    assert stage.seen == [3, 4, 5, 6, 7]
    assert losses(output) == losses(whole)
    assert same(final_weights(output), final_weights(whole))
    assert not list((output / "checkpoints").glob(".*"))
    assert "resuming" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_lets_the_step_finish_and_saves(
    whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    def hook(place: int, loss: Tensor) -> Tensor:
        if place == 4:
            os.kill(os.getpid(), number)
        return loss

    before = signal.getsignal(number)
    output = tmp_path / "out"
    with pytest.raises(Stopped, match=r"after step 5 of 8; checkpoint .*--resume") as caught:
        run(output, ToyStage(hook=hook), ema=0.9)
    assert caught.value.exit_code == code and "\n" not in str(caught.value)
    assert signal.getsignal(number) is before
    assert list(found(output / "checkpoints")) == [3, 5]
    assert not (output / "final_pipeline").exists()
    run(output, ema=0.9, resume="auto")
    assert losses(output) == losses(whole)
    assert same(final_weights(output), final_weights(whole))


def test_finished_run_only_writes_its_pipeline_again(whole: Path) -> None:
    before, stage = final_weights(whole), ToyStage()
    assert run(whole, stage, ema=0.9, resume="auto") == whole / "final_pipeline"
    assert stage.seen == [] and same(final_weights(whole), before)


def test_longer_run_goes_on(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"schedule": "constant"}
    run(tmp_path / "long", max_steps=8, **changes)
    run(tmp_path / "out", max_steps=4, **changes)
    run(tmp_path / "out", max_steps=8, resume="auto", **changes)
    assert losses(tmp_path / "out") == losses(tmp_path / "long")
    assert same(final_weights(tmp_path / "out"), final_weights(tmp_path / "long"))


def test_two_ranks_go_on_as_one(tmp_path: Path) -> None:
    """Sharded weights of two ranks, resumed by one process with twice the batch."""
    shared: dict[str, Any] = {"ema": 0.9, "schedule": "constant"}
    run(tmp_path / "one", ToyStage(noisy=False), batch_size=2, **shared)
    output = tmp_path / "two"
    changes = {**shared, "max_steps": 5, "validate_every": 5}
    assert elsewhere(two_ranks, output, free_port(), changes, processes=2) == [0, 0]
    stage = ToyStage(noisy=False)
    run(output, stage, batch_size=2, resume="auto", **shared)
    assert stage.seen == [10, 11, 12, 13, 14, 15]
    assert losses(output) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    weights = final_weights(tmp_path / "one")
    for name, weight in final_weights(output).items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ steps


def test_accumulated_micro_steps_are_one_batch(tmp_path: Path) -> None:
    wide, narrow = ToyStage(), ToyStage()
    run(tmp_path / "wide", wide, batch_size=4)
    run(tmp_path / "narrow", narrow, batch_size=2, gradient_accumulation=2)
    assert wide.seen == narrow.seen == list(range(32))
    weights = final_weights(tmp_path / "wide")
    for name, weight in final_weights(tmp_path / "narrow").items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"num_epochs": 2, "max_steps": None}, 12),
        ({"num_epochs": 2, "max_steps": None, "batch_size": 4}, 4),  # 6 scenes: 2 steps an epoch
        ({"num_epochs": 1, "max_steps": 100}, 6),
    ],
)
def test_number_of_steps(tmp_path: Path, changes: dict[str, Any], steps: int) -> None:
    run(tmp_path, save_every=0, **changes)
    assert len(metrics(tmp_path)) == steps
    assert list(found(tmp_path / "checkpoints")) == [steps]  # the end is always saved


def test_steps_that_are_not_finite_are_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hook(place: int, loss: Tensor) -> Tensor:
        if place == 3:
            return loss * math.nan
        # A finite loss whose gradient is not.
        return loss + (loss - loss.detach()).abs().sqrt() if place == 4 else loss

    run(tmp_path, ToyStage(hook=hook), save_every=1, keep=9)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if line.get("skipped")] == [4, 5]
    assert lines[3]["loss"] is None and lines[4]["loss"] is not None
    told = [line for line in capsys.readouterr().err.splitlines() if "step skipped" in line]
    assert len(told) == 2 and "(2 so far)" in told[1]
    assert all(torch.isfinite(w).all() for w in final_weights(tmp_path).values())


def test_ten_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    """Counted over a resume, too."""

    def hook(place: int, loss: Tensor) -> Tensor:
        return loss * math.inf if place >= 2 else loss

    run(tmp_path, ToyStage(hook=hook), max_steps=6, num_epochs=9)
    stage = ToyStage(hook=hook)
    with pytest.raises(TrainingError, match=r"10 steps in a row .*learning_rate") as caught:
        run(tmp_path, stage, max_steps=40, resume="auto")
    assert stage.seen == list(range(6, 12)) and "\n" not in str(caught.value)


def test_validation_leaves_no_trace_in_the_training(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, ema=0.9, validate_every=3)
    assert losses(tmp_path) == losses(whole)
    folders = sorted(p.name for p in (tmp_path / "validation").iterdir())
    assert folders == ["step-00000003", "step-00000006", "step-00000008"]
    assert (tmp_path / "validation" / "step-00000008" / "video.mp4").is_file()
    # The last one has seen what was written: the averaged weights.
    text = (tmp_path / "validation" / "step-00000008" / "validation.json").read_text()
    weight = float(final_weights(tmp_path)["0.weight"].sum())
    assert f"{weight}" in text


# -------------------------------------------------------------------------------------- the output


def test_output_of_another_run_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a run of 8 steps; add --resume auto"):
        run(whole)
    (tmp_path / "final_pipeline").mkdir()
    with pytest.raises(ValueError, match="final_pipeline exists; choose another --output_dir"):
        run(tmp_path)


def test_output_in_use_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is writing into --output_dir"):
            run(tmp_path)
    run(tmp_path, max_steps=1)


def test_auto_without_a_checkpoint_begins_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, max_steps=1, resume="auto")
    assert f"no checkpoint in {tmp_path}: starting anew" in capsys.readouterr().err


# ------------------------------------------------------------------------------- averaged weights


def test_average_follows_its_formula() -> None:
    torch.manual_seed(1)
    values = torch.randn(30, 4, dtype=torch.float64)
    module = torch.nn.Linear(4, 1, bias=False)
    ema = Ema({"weight": values[0].float()[None]}, 0.7)
    expected = values[0]
    for step in range(29):
        ema.update({"weight": values[step + 1].float()[None]}, step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * values[step + 1]
    assert decay_at(0, 0.7) == 0.1 and decay_at(28, 0.7) == 0.7
    torch.testing.assert_close(ema.average["weight"][0].double(), expected, rtol=1e-6, atol=1e-6)
    own = module.weight.detach().clone()
    with ema.applied(module):
        assert torch.equal(module.weight, ema.average["weight"])
    assert torch.equal(module.weight, own)


def test_average_of_bf16_weights_is_float32() -> None:
    module = torch.nn.Linear(4, 1, bias=False).bfloat16()
    masters = {"weight": module.weight.detach()}
    ema = Ema(masters, 0.999)
    with torch.no_grad():
        module.weight += 1
    ema.update(masters, 10_000)
    assert ema.average["weight"].dtype == torch.float32
    moved = (masters["weight"].float() - ema.average["weight"]).mean()
    assert 0.9 < float(moved) < 1.0  # a step of 1 / 1000, which bf16 would have lost
    own = module.weight.detach().clone()
    with ema.applied(module):
        assert torch.equal(module.weight, ema.average["weight"].bfloat16())
    assert torch.equal(module.weight, own)
