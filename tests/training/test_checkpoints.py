"""Checkpoints: whole or not there, verified when read, refused when they do not fit."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gen3r_training import checkpoints
from gen3r_training.checkpoints import found, load, read_state, save
from gen3r_training.config import DiffusionConfig
from gen3r_training.resume import check_output
from gen3r_training.stopping import TrainingError
from gen3r_training.summed_files import SummedFile
from tests.training.toy import (
    ONE,
    ToyStage,
    config,
    elsewhere,
    final_weights,
    free_port,
    losses,
    metrics,
    run,
    same,
    two_ranks_full,
)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints after 2, 4 and 6."""
    output = tmp_path_factory.mktemp("short") / "out"
    run(output, max_steps=6, save_every=2, batch_size=2)
    return output


@pytest.fixture
def copied(short: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short, tmp_path / "copied"))


def tensors(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "model.weight": torch.randn(40, 3),
        "model.bias": torch.randn(5).bfloat16(),
        "optimizer.steps": torch.tensor(17 + seed),
        "rng.0.cpu": torch.get_rng_state(),
    }


# ------------------------------------------------------------------------------- written and read


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 123, tensors(), {"format": 1}, ONE, keep=3)
    assert path == tmp_path / "step-00000123"
    assert read_state(path)["step"] == 123
    read = tensors(seed=1)
    assert load(path, read, ONE) == set(read)
    assert same(read, tensors())


def test_random_state_of_a_rank_may_be_absent(tmp_path: Path) -> None:
    path = save(tmp_path, 1, tensors(), {}, ONE, keep=3)
    read = tensors(seed=1) | {"rng.1.cpu": torch.zeros(3)}
    del read["rng.0.cpu"]
    assert "rng.1.cpu" not in load(path, read, ONE)


def test_newest_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / ".step-00000009.partial").mkdir()
    (tmp_path / ".step-00000001.old").mkdir()
    assert checkpoints.remove_leftovers(tmp_path) == 2
    for step in (3, 20, 100):
        save(tmp_path, step, tensors(), {}, ONE, keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000020", "step-00000100"]


# -------------------------------------------------------------------------------------- full disk


def test_full_disk_during_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up half through the second checkpoint: the first one serves."""
    run(tmp_path / "whole")
    write = SummedFile.write

    def full(self: Any, data: Any) -> int:
        if "step-00000006" in self.name and self.size > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(SummedFile, "write", _noting(full))
        with pytest.raises(TrainingError, match="step-00000006 was not saved") as caught:
            run(output)
    for part in ("are needed", "are free in", str(output / "checkpoints"), "--resume auto"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-00000003"]
    run(output, resume="auto")
    assert losses(output) == losses(tmp_path / "whole")
    assert same(final_weights(output), final_weights(tmp_path / "whole"))


def _noting(write: Callable[[Any, Any], int]) -> Callable[[Any, Any], int]:
    """As `SummedFile.write` does itself."""

    def noted(self: Any, data: Any) -> int:
        try:
            return write(self, data)
        except OSError as error:
            self.error = error
            raise

    return noted


def test_too_little_room_is_seen_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    stage = ToyStage()
    with pytest.raises(TrainingError, match=r"0\.06 GiB are needed and 0\.00 GiB are free"):
        run(tmp_path, stage)
    assert stage.seen == []


def test_full_disk_at_the_end(tmp_path: Path) -> None:
    """The last checkpoint is there, so that only the pipeline is written again."""

    class Full(ToyStage):
        def save_final(self, folder: Path, weights: dict[str, Tensor]) -> None:
            (tmp_path / "..final_pipeline.partial-x1").mkdir()  # as a killed writer leaves
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match="final_pipeline was not written") as caught:
        run(tmp_path, Full())
    for part in ("No space left on device", "step-00000008", "--resume auto"):
        assert part in str(caught.value)
    stage = ToyStage()
    run(tmp_path, stage, resume="auto")
    assert stage.seen == [] and final_weights(tmp_path)
    assert not list(tmp_path.glob(".*final*"))


def limited(output: Path) -> None:
    """Train where no file may be larger than 2000 bytes, and exit as the command does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        run(output, ToyStage(width=100))
    except TrainingError as error:
        (output / "told").write_text(str(error))
        raise SystemExit(1) from None


def test_limit_of_file_sizes_is_told_in_one_line(tmp_path: Path) -> None:
    assert elsewhere(limited, tmp_path) == [1]
    told = (tmp_path / "told").read_text()
    assert told.startswith("checkpoint step-00000003 was not saved: the disk is full: ")
    assert not list((tmp_path / "checkpoints").iterdir())


def test_full_disk_of_one_rank_ends_both(tmp_path: Path) -> None:
    assert elsewhere(two_ranks_full, tmp_path, free_port(), processes=2) == [1, 1]
    told = [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0].startswith("checkpoint step-00000003 was not saved: the disk is full: ")
    assert not list((tmp_path / "checkpoints").iterdir())


# ---------------------------------------------------------------------------------------- damaged


def cut(folder: Path) -> None:
    file = max(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-10])


def flip(folder: Path) -> None:
    file = max(folder.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def lose(folder: Path) -> None:
    (folder / ".metadata").unlink()


def spoil(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 6, ')


@pytest.mark.parametrize("harm", [cut, flip, lose, spoil])
def test_damaged_newest_is_refused_and_the_one_before_named(
    copied: Path, harm: Callable[[Path], None]
) -> None:
    harm(copied / "checkpoints" / "step-00000006")
    with pytest.raises(ValueError, match="step-00000006 is damaged") as caught:
        run(copied, max_steps=8, batch_size=2, resume="auto")
    assert "goes on from step-00000004 before it" in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    run(copied, max_steps=8, batch_size=2, resume="auto")
    assert len(metrics(copied)) == 8


# ------------------------------------------------------------------------------------- does not fit


def test_another_size_names_the_first_tensor_that_differs(copied: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.0\.bias is float32 \[8\] in it and float32 \[9\]"
    ):
        run(copied, ToyStage(width=9), max_steps=8, batch_size=2, resume="auto")


def test_another_size_is_seen_without_weights(short: Path) -> None:
    path = short / "checkpoints" / "step-00000006"
    checkpoints.check_module(path, ToyStage().module.to("meta"))
    with pytest.raises(ValueError, match=r"model\.0\.bias is \[8\] in it and \[9\] here"):
        checkpoints.check_module(path, ToyStage(width=9).module.to("meta"))


def test_other_data_is_refused(copied: Path) -> None:
    with pytest.raises(ValueError, match=r"trained on \[6\] scenes per data root, here are \[7\]"):
        run(copied, ToyStage(scenes=7), max_steps=8, batch_size=2, resume="auto")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"learning_rate": 1e-3}, "was made with --learning_rate 0.01, not 0.001"),
        ({"seed": 1}, "was made with --seed 42, not 1"),
        ({"ema": 0.9}, "was made with --ema 0.0, not 0.9"),
        ({"data_weights": (1.0,)}, "was made with --data_weights (empty), not 1.0"),
        (
            {"batch_size": 3},
            "took 2 samples per step; --batch_size 3 x .* is 3; make the product 2",
        ),
    ],
)
def test_other_settings_are_refused(short: Path, changes: dict[str, Any], text: str) -> None:
    given = {"batch_size": 2, "resume": "auto", **changes}
    with pytest.raises(ValueError, match=text.replace("(", r"\(").replace(")", r"\)")):
        check_output(config(short, **given), 1)


def test_another_stage_is_refused(short: Path) -> None:
    other = DiffusionConfig(
        data_root=(Path("data"),), output_dir=short, pretrained_path=Path("p"), resume="auto"
    )
    with pytest.raises(ValueError, match="is of stage 'adapter', not of 'diffusion'"):
        check_output(other, 1)


def test_another_batch_with_the_same_samples_goes_on(copied: Path) -> None:
    stage = ToyStage()
    run(copied, stage, max_steps=8, batch_size=1, gradient_accumulation=2, resume="auto")
    assert stage.seen == [12, 13, 14, 15]
    start = check_output(config(copied, batch_size=1, resume="auto"), 2)  # or on two ranks
    assert start.step == 8 and "gradient_accumulation 2 -> 1" in start.notes[1]


def test_missing_or_wrong_path(short: Path) -> None:
    known = "step-00000002, step-00000004, step-00000006"
    with pytest.raises(ValueError, match=f"does not exist; checkpoints of --output_dir: {known}"):
        check_output(config(short, resume="elsewhere"), 1)
    with pytest.raises(ValueError, match=r"holds checkpoints and is none; use .*step-00000006"):
        check_output(config(short, resume=str(short)), 1)


def test_path_of_an_older_one(short: Path, tmp_path: Path) -> None:
    older = short / "checkpoints" / "step-00000004"
    asked: dict[str, Any] = {"batch_size": 2, "resume": str(older), "max_steps": 6}
    with pytest.raises(ValueError, match=r"holds step-00000006, which the run .* would meet"):
        check_output(config(short, **asked), 1)
    run(tmp_path, save_every=2, **asked)
    assert losses(tmp_path) == losses(short)[4:]
    assert same(final_weights(tmp_path), final_weights(short))
    assert list(found(tmp_path / "checkpoints")) == [6]


def test_state_is_plain_json(short: Path) -> None:
    state = json.loads((short / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["config"]["stage"] == "adapter" and state["config"]["batch_size"] == 2
    assert state["skipped"] == {"total": 0, "in_a_row": 0}
    assert {"torch", "python"} <= set(state["versions"])
    assert (state["samples_per_step"], state["scenes"], state["ranks"]) == (2, [6], 1)
