"""The order of the stages, with made-up stages: who runs beside whom, what a fault costs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gen3r.scene import Scene, SceneRequest
from gen3r_engine.denoiser import Cancelled
from gen3r_engine.events import SceneError
from gen3r_engine.flow import WAITING, Flow
from gen3r_engine.memory import OutOfMemory, guard
from gen3r_engine.scene_batches import Batch, failing
from gen3r_engine.workers import BoundedWorker
from tests.engine.scenes import made_scene

CPU = torch.device("cpu")
REQUEST = SceneRequest([torch.zeros(56, 56, 3, dtype=torch.uint8)], num_frames=5)


@dataclass
class MadeStages:
    """Stages that note when they run, the loop for 6 times `seconds`; `faults` by "stage index"."""

    faults: dict[str, Callable[[], None]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    seconds: float = 0.0
    released: int = 0

    def __post_init__(self) -> None:
        self.denoiser = SimpleNamespace(release=self._release)

    def _release(self) -> None:
        self.released += 1

    def _work(self, stage: str, indices: tuple[int, ...]) -> None:
        name = f"{stage} {'+'.join(map(str, indices))}"
        self.log.append(name)
        time.sleep(self.seconds * (6 if stage == "denoise" else 1))
        with failing(indices, stage), guard(stage, 1.5, "resident", batch=len(indices)):
            self.faults.get(name, lambda: None)()
        self.log.append(f"{name} done")

    def encode(self, batch: Batch, sampling: Any) -> Any:
        self._work("encode", batch.indices)
        return batch

    def denoise(self, batch: Batch, encoded: Any, sampling: Any, stop: Callable[[], bool]) -> Any:
        assert encoded is batch
        self._work("denoise", batch.indices)
        if stop():
            raise Cancelled("stopped")
        return batch

    def decode(self, batch: Batch, row: int, joint: Any, sampling: Any) -> Any:
        assert joint is batch
        self._work("decode", (batch.indices[row],))
        return batch.indices[row]

    def finish(self, index: int) -> Scene:
        self._work("finish", (index,))
        scene = made_scene()
        scene.info["index"] = index
        return scene


def batches(count: int, size: int = 1) -> list[Batch]:
    starts = range(0, count * size, size)
    return [Batch(tuple(range(s, s + size)), (REQUEST,) * size, CPU) for s in starts]


def scenes(
    stages: MadeStages, work: list[Batch], way: str = "beside", retry: bool = False
) -> Generator[Scene, None, None]:
    flow = Flow(stages, SimpleNamespace(), threading.Event(), retry=retry)  # type: ignore[arg-type]
    return flow.beside(work) if way == "beside" else flow.in_order(work)


def taken(found: Iterator[Scene]) -> tuple[list[int], BaseException | None]:
    """Indices of the scenes that came, and the error behind them."""
    got = []
    try:
        for scene in found:
            got.append(scene.info["index"])
    except (Exception, KeyboardInterrupt) as error:
        return got, error
    return got, None


def test_in_order_is_one_after_the_other() -> None:
    stages = MadeStages()
    assert taken(scenes(stages, batches(2), "in order")) == ([0, 1], None)
    names = [f"{stage} {i}" for i in (0, 1) for stage in ("encode", "denoise", "decode", "finish")]
    assert stages.log == [text for name in names for text in (name, f"{name} done")]


def test_stages_run_beside_the_loop() -> None:
    stages = MadeStages(seconds=0.05)
    assert taken(scenes(stages, batches(3))) == ([0, 1, 2], None)
    place = {name: i for i, name in enumerate(stages.log)}
    assert place["encode 1"] < place["denoise 0 done"], "the next one is encoded meanwhile"
    assert place["decode 0"] < place["denoise 1 done"], "the last one is decoded meanwhile"
    assert place["encode 2"] < place["decode 0"], "the loop's next input comes first"


def test_a_slow_reader_holds_up_the_loop() -> None:
    stages = MadeStages()
    found = scenes(stages, batches(8))
    next(found)
    time.sleep(0.3)
    denoised = [name for name in stages.log if name.startswith("denoise") and "done" in name]
    assert len(denoised) == 1 + WAITING
    assert taken(found) == ([1, 2, 3, 4, 5, 6, 7], None)


@pytest.mark.parametrize("way", ["beside", "in order"])
@pytest.mark.parametrize("stage", ["encode", "denoise", "decode", "finish"])
def test_scenes_before_a_fault_come_out(way: str, stage: str) -> None:
    def fault() -> None:
        raise ValueError("broken")

    stages = MadeStages({f"{stage} 2": fault}, seconds=0.01)
    got, error = taken(scenes(stages, batches(5), way))
    assert got == [0, 1]
    assert isinstance(error, SceneError) and isinstance(error.__cause__, ValueError)
    assert (error.indices, error.stage) == ((2,), stage)
    assert str(error) == f"request 2 failed while '{stage}' ran: ValueError: broken"


@pytest.mark.parametrize("way", ["beside", "in order"])
@pytest.mark.parametrize("stage", ["encode", "denoise", "decode"])
def test_an_interruption_stays_one(way: str, stage: str) -> None:
    def fault() -> None:
        raise KeyboardInterrupt

    got, error = taken(scenes(MadeStages({f"{stage} 1": fault}), batches(4), way))
    assert isinstance(error, KeyboardInterrupt) and got == [0]


def out_of_memory() -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("way", ["beside", "in order"])
@pytest.mark.parametrize("stage", ["encode", "denoise"])
def test_out_of_memory_is_told_and_not_tried_again_unasked(way: str, stage: str) -> None:
    stages = MadeStages({f"{stage} 2+3": out_of_memory})
    got, error = taken(scenes(stages, batches(3, 2), way))
    assert got == [0, 1] and isinstance(error, OutOfMemory)
    for words in (f"stage '{stage}'", "1.5 GiB needed", "a batch of 1", "residency '24gb'"):
        assert words in str(error)


@pytest.mark.parametrize("way", ["beside", "in order"])
@pytest.mark.parametrize("stage", ["encode", "denoise"])
def test_half_the_batch_once_when_asked(way: str, stage: str) -> None:
    stages = MadeStages({f"{stage} 2+3": out_of_memory})
    assert taken(scenes(stages, batches(3, 2), way, retry=True)) == ([0, 1, 2, 3, 4, 5], None)
    assert stages.released >= 1
    for half in ("denoise 2", "denoise 3", "denoise 4+5"):
        assert f"{half} done" in stages.log


@pytest.mark.parametrize("way", ["beside", "in order"])
def test_halves_are_not_halved_again(way: str) -> None:
    faults = {"denoise 0+1+2+3": out_of_memory, "denoise 2+3": out_of_memory}
    stages = MadeStages(faults)
    got, error = taken(scenes(stages, batches(1, 4), way, retry=True))
    assert got == [0, 1] and isinstance(error, OutOfMemory)


def test_closing_early_leaves_no_thread() -> None:
    before = threading.active_count()
    with closing(scenes(MadeStages(seconds=0.02), batches(9))) as found:
        next(found)
    assert threading.active_count() == before


# ---------------------------------------------------------------------------------- BoundedWorker


def test_worker_does_all_jobs_in_order() -> None:
    done: list[int] = []
    with BoundedWorker("test") as worker:
        for i in range(6):
            worker.submit(done.append, i)
    assert done == [0, 1, 2, 3, 4, 5]


def test_worker_holds_up_who_gives_too_much() -> None:
    go, given = threading.Event(), []

    def giver() -> None:
        with BoundedWorker("test", waiting=1) as worker:
            for i in range(4):
                worker.submit(go.wait)
                given.append(i)

    thread = threading.Thread(target=giver)
    thread.start()
    time.sleep(0.2)
    assert given == [0, 1]
    go.set()
    thread.join()
    assert given == [0, 1, 2, 3]


def test_worker_tells_an_error_at_the_next_job_or_the_end() -> None:
    def broken() -> None:
        raise OSError("disk full")

    for more in (0, 1):
        with pytest.raises(OSError, match="disk full"), BoundedWorker("test") as worker:
            worker.submit(broken)
            for _ in range(more):
                time.sleep(0.1)
                worker.submit(list)


def test_worker_finishes_after_an_error_and_stops_after_ctrl_c() -> None:
    for error, expected in ((ValueError(), [1, 2]), (KeyboardInterrupt(), [1])):
        done: list[int] = []
        begun = threading.Event()

        def slow(
            worker: BoundedWorker, done: list[int] = done, begun: threading.Event = begun
        ) -> None:
            begun.set()
            worker.stopping.wait(0.2)
            done.append(1)

        with pytest.raises(type(error)), BoundedWorker("test") as worker:
            worker.submit(slow, worker)
            worker.submit(done.append, 2)
            assert begun.wait(10)
            raise error
        assert done == expected
