"""The stream: the right samples in the right order, with workers and without."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gen3r.causal_video import Posterior
from gen3r_training.data import (
    CachedClip,
    Sample,
    SampleOrder,
    SampleStream,
    SceneDataset,
    Ticket,
    open_dataset,
)
from tests.training.plain_scenes import write_root

CLIP = {"num_frames": 1, "resolution": 56, "max_stride": 1}


@pytest.fixture
def dataset(tmp_path: Path) -> SceneDataset:
    return open_dataset([write_root(tmp_path, 5)], "train", **CLIP)


def stream(dataset: SceneDataset, **options: object) -> SampleStream:
    order = SampleOrder(dataset.counts, (), 3)
    return SampleStream(dataset, order, **({"batch_size": 1, "num_workers": 0} | options))


def take(stream: SampleStream, steps: int) -> list[list[Sample]]:
    with stream:
        return [batch for batch, _ in zip(stream, range(steps), strict=False)]


def same(a: Sample, b: Sample) -> bool:
    tensors = all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in ("frames", "c2w", "intrinsics")
    )
    names = ("prompt", "scene", "seed", "index")
    return tensors and all(getattr(a, n) == getattr(b, n) for n in names)


def alike(one: list[list[Sample]], other: list[list[Sample]]) -> bool:
    a, b = ([s for batch in part for s in batch] for part in (one, other))
    return len(a) == len(b) and all(map(same, a, b))


def test_two_ranks_see_what_one_sees(dataset: SceneDataset) -> None:
    options = {"accumulation": 2}
    alone = take(stream(dataset, batch_size=2, **options), 6)
    first = take(stream(dataset, rank=0, ranks=2, **options), 6)
    second = take(stream(dataset, rank=1, ranks=2, **options), 6)
    assert [[s.index for s in batch] for batch in alone] == [[2 * m, 2 * m + 1] for m in range(6)]
    for both, a, b in zip(alone, first, second, strict=True):
        assert same(both[0], a[0]) and same(both[1], b[0])
    scenes = [{s.scene for batch in part for s in batch} for part in (alone, first, second)]
    assert len(scenes[0]) == 5 and scenes[1] != {first[0][0].scene}


def test_workers_read_the_same_in_order_and_end(dataset: SceneDataset) -> None:
    here = take(stream(dataset, batch_size=2), 5)
    state = torch.get_rng_state()
    reading = stream(dataset, batch_size=2, num_workers=2)
    workers = set(multiprocessing.active_children())
    assert len(workers) == 2
    away = take(reading, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        same(a, b) for x, y in zip(here, away, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert not workers & set(multiprocessing.active_children())
    assert list(reading) == []


def test_a_later_start_goes_on_where_an_earlier_one_was(dataset: SceneDataset) -> None:
    options = {"batch_size": 2, "accumulation": 3, "rank": 1, "ranks": 2}
    whole = take(stream(dataset, **options), 12)
    rest = take(stream(dataset, first_step=3, **options), 3)
    assert alike(whole[9:], rest)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_replaced_scenes_are_told_once_and_counted(dataset: SceneDataset, num_workers: int) -> None:
    bad = dataset.scenes[0][2]
    (bad / "cameras.json").unlink()
    lines: list[str] = []
    reading = stream(dataset, num_workers=num_workers, report=lines.append)
    samples = [batch[0] for batch in take(reading, 15)]
    assert all("s2" not in sample.scene for sample in samples)
    (name,) = reading.skipped
    assert name.endswith("train/s2") and reading.skipped[name] == 3  # once an epoch
    assert len(lines) == 1 and "no cameras.json" in lines[0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_scene_left_is_one_line(dataset: SceneDataset, num_workers: int) -> None:
    for scene in dataset.scenes[0]:
        (scene / "cameras.json").unlink()
    with (
        stream(dataset, num_workers=num_workers) as reading,
        pytest.raises(ValueError, match="sample 0: none of 5 scenes") as caught,
    ):
        next(reading)
    assert "\n" not in str(caught.value)


def test_a_worker_names_the_scene_that_it_fell_over(
    dataset: SceneDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gen3r_training.data.dataset.read_clip", lambda *_: 1 // 0)
    with (
        stream(dataset, num_workers=1) as reading,
        pytest.raises(RuntimeError, match=r"train/s\d \(sample 0\): ZeroDivisionError"),
    ):
        next(reading)


def test_pinned_samples(dataset: SceneDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor goes through pin_memory, those of a cached clip too."""
    pinned: list[torch.Size] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.shape)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    one = Posterior(torch.zeros(1), torch.ones(1))
    clip = CachedClip(one, one, {"1view": one}, {}, torch.ones(2), text=torch.ones(3))
    sample = replace(dataset.fetch(Ticket(0, 0, 0, 0)), cached=clip)
    copy = sample.pin_memory()
    assert same(copy, sample) and copy.frames is not sample.frames
    assert copy.cached is not None and copy.cached.control("1view")[0].logvar == 1
    assert len(pinned) == 3 + 6 + 2


KEPT: list[SampleStream] = []


def leave_open(dataset: SceneDataset) -> None:
    KEPT.append(stream(dataset, num_workers=1))
    next(KEPT[0])


def test_a_process_that_forgets_to_close_ends(dataset: SceneDataset) -> None:
    process = multiprocessing.get_context("fork").Process(target=leave_open, args=(dataset,))
    process.start()
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 0),
        ("accumulation", 0),
        ("ranks", 0),
        ("rank", 1),
        ("first_step", -1),
        ("num_workers", -1),
    ],
)
def test_bad_numbers(dataset: SceneDataset, option: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{option} {value}"):
        stream(dataset, **{option: value})


def test_an_order_of_other_data(dataset: SceneDataset) -> None:
    with pytest.raises(ValueError, match=r"\(4,\) scenes"):
        SampleStream(dataset, SampleOrder([4], (), 0), batch_size=1)
