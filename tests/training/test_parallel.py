"""Training in two processes (gloo, CPU) beside the same in one: launch, FSDP, Ulysses, resume."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gen3r_training import checkpoints
from gen3r_training.parallel import shard, start
from tests.training import tiny
from tests.training.ranks import alone, assert_close, run_ranks
from tests.training.toy import metrics
from tests.training.two_ranks import run_loop

SECONDS = 120  # two processes on two slow cores take 25
Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Results:
    """What both processes saw."""
    checks = "launched fsdp full selective adapter context bf16 unsharded_once looped"
    return run_ranks(folder, checks.split(), SECONDS)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return alone(tiny.transformer(), tiny.diffusion_loss)


def test_ranks_find_each_other(ranks: Results) -> None:
    first, second = (one["launched"] for one in ranks)
    for rank, seen in enumerate((first, second)):
        assert seen["strategy"] == "fsdp" and seen["device"] == "cpu"
        assert (seen["rank"], seen["world"], seen["is_main"]) == (rank, 2, rank == 0)
        assert (seen["data_rank"], seen["data_ranks"], seen["context_ranks"]) == (rank, 2, 1)
        assert seen["mean"] == {"all": 0.5, "only-0": 5.0, "only-1": 5.0}
        assert seen["agree"] == [True, False]
    assert first["order"] == ["first-0"] and second["order"] == ["first-0", "first-1"]
    assert torch.equal(first["full"]["a"], torch.arange(3.0)) and second["full"] == {}


@pytest.mark.parametrize("check", ["fsdp", "full", "selective"])
def test_sharded_steps_equal_one_process(
    check: str, ranks: Results, expected: dict[str, Any]
) -> None:
    """Losses, norms and weights after three steps, whatever is recomputed."""
    for one in ranks:
        assert one[check]["sharded"]
        assert one[check]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert one[check]["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert ranks[0][check]["norms"] == ranks[1][check]["norms"]  # both clip alike
    assert min(expected["norms"]) > 2 * tiny.MAX_NORM  # and do clip
    assert_close(ranks[0][check]["weights"], expected["weights"])


def test_sharded_adapter_equals_one_process(ranks: Results) -> None:
    wanted = alone(tiny.adapter(), tiny.adapter_loss, batch=4)
    for one in ranks:
        assert one["adapter"]["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert one["adapter"]["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
    assert_close(ranks[0]["adapter"]["weights"], wanted["weights"])


def test_spread_tokens_give_the_same_gradients(ranks: Results) -> None:
    """23 and 22 tokens on two ranks: loss and every gradient as with 45 on one."""
    model = tiny.transformer()
    loss = tiny.diffusion_loss(model, [0, 1])
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for rank, one in enumerate(ranks):
        assert one["context"]["places"] == (0, 1, rank)
        assert one["context"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_close(ranks[0]["context"]["gradients"], gradients)


def test_bf16_inside_float32_shards(ranks: Results) -> None:
    for one in ranks:
        assert one["bf16"]["same"]
        assert one["bf16"]["masters"] == one["bf16"]["gradients"] == {torch.float32}
        assert one["bf16"]["count"] == len(list(tiny.transformer().parameters()))


def test_weights_changed_between_passes_are_seen(ranks: Results) -> None:
    model = tiny.transformer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
        halved = tiny.diffusion_loss(model, [0]).item()
    for one in ranks:
        assert one["unsharded_once"]["after"] == pytest.approx(halved, rel=1e-5)
        assert one["unsharded_once"]["before"] != pytest.approx(halved, rel=1e-2)


def final_weights(output: Path) -> dict[str, Any]:
    return torch.load(output / "final_pipeline" / "weights.pt")


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """One process, two samples a step, three steps at once."""
    run_loop(folder / "straight", batch_size=2)
    return folder / "straight"


def test_ranks_share_the_samples(ranks: Results) -> None:
    """Three steps of two ranks are the samples 0..5, each once, with seeds of their own."""
    assert [one["looped"]["places"] for one in ranks] == [[[0, 2], [4]], [[1, 3], [5]]]
    assert len({seed for one in ranks for seed in one["looped"]["seeds"]}) == 6


def test_two_ranks_resume(ranks: Results, folder: Path, straight: Path) -> None:
    """Two steps and, after the checkpoint, one: averaged weights as of one process."""
    assert_close(final_weights(folder / "run"), final_weights(straight))
    losses = [[m["loss"] for m in metrics(output)] for output in (folder / "run", straight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_one_rank_resumes_what_two_saved(ranks: Results, folder: Path, straight: Path) -> None:
    name = f"checkpoints/{checkpoints.folder_name(2)}"
    shutil.copytree(folder / "run" / name, folder / "one" / name)
    stage = run_loop(folder / "one", batch_size=2)
    assert stage.places == [4, 5]
    assert_close(final_weights(folder / "one"), final_weights(straight))


def test_one_process_needs_no_group() -> None:
    config = tiny.diffusion_config(mixed_precision="bf16")
    parallel = start(config)
    assert (parallel.world, parallel.strategy, parallel.mesh) == (1, "none", None)
    with parallel.main_first():
        parallel.barrier()
    assert parallel.mean({"a": 2.0}) == {"a": 2.0} and parallel.agree(True)
    model = tiny.transformer()
    shard(model, parallel, config)
    assert model.spread is None and type(model).__name__ == "WanTransformer"
    parallel.close()
