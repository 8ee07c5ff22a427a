"""A run's samples in order, read ahead by worker processes."""

from __future__ import annotations

import atexit
import itertools
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Self

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from gen3r_training.data.dataset import SceneDataset
from gen3r_training.data.sampler import SampleOrder
from gen3r_training.data.samples import Notice, Sample


def sample_places(
    micro_step: int, batch_size: int, rank: int, ranks: int
) -> range:  # of `batch_size` places in the stream of samples
    """Which samples a rank takes in a micro step, counted over all steps (step * A + micro)."""
    first = (micro_step * ranks + rank) * batch_size
    return range(first, first + batch_size)


@dataclass(frozen=True)
class _Batch:
    """What a worker hands over for one micro step; with `failure` there are no samples."""

    samples: list[Sample]
    notices: tuple[Notice, ...]
    failure: str | None = None

    def pin_memory(self) -> _Batch:
        return replace(self, samples=[sample.pin_memory() for sample in self.samples])


class _MicroSteps(Dataset[_Batch]):
    """Micro step -> its samples on this rank."""

    def __init__(
        self, dataset: SceneDataset, order: SampleOrder, batch_size: int, rank: int, ranks: int
    ) -> None:
        self.dataset, self.order = dataset, order
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks

    def __getitem__(self, micro_step: int) -> _Batch:
        places = sample_places(micro_step, self.batch_size, self.rank, self.ranks)
        try:
            found = [self.dataset.fetch_noticed(self.order.ticket(g)) for g in places]
        except ValueError as error:  # one line for people; the loader would wrap it in a traceback
            return _Batch([], (), str(error))
        notices = tuple(notice for _, noticed in found for notice in noticed)
        return _Batch([sample for sample, _ in found], notices)


class _From(Sampler[int]):
    """first, first + 1, ... without end."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


class SampleStream:
    """Iterator of the samples of one rank: a list of `batch_size` for every micro step, endless.

    Optimiser step s, micro step m of `accumulation`, rank r of `ranks`, row b take the sample
    g = ((s * accumulation + m) * ranks + r) * batch_size + b, so nothing but g matters, and a
    stream that begins at a later step gives what one from 0 gives there.

    Parameters
    ----------
    dataset, order : where samples come from and which comes when.
    first_step : optimiser steps that are done already.
    num_workers : processes that read ahead, two micro steps each; 0 reads in place. They pass
        samples through shared memory: at 49 frames of 560 px each takes 184 MB (without a cache).
    pin_memory : hand out page-locked tensors, for copies to a GPU that do not block.
    report : called with a line the first time that something is amiss with a scene; None: a
        warning.

    skipped : scene -> how often another one took its place; notices : everything that was amiss,
    with counts. Both count samples that were handed out.

    Raises
    ------
    ValueError : a number that is not positive (first_step, num_workers: negative), or a rank
        outside the ranks. While iterating, what `SceneDataset.fetch_noticed` raises; the message
        names the scene.
    """

    def __init__(
        self,
        dataset: SceneDataset,
        order: SampleOrder,
        *,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        ranks: int = 1,
        first_step: int = 0,
        num_workers: int = 2,
        pin_memory: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("accumulation", accumulation),
            ("ranks", ranks),
        ):
            if value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank {rank} must lie in 0..{ranks - 1}")
        if first_step < 0 or num_workers < 0:
            raise ValueError(
                f"first_step {first_step} and num_workers {num_workers} must not be negative"
            )
        if order.counts != dataset.counts:
            raise ValueError(
                f"the order is of {order.counts} scenes, the data sets have {dataset.counts}"
            )
        self.notices: Counter[Notice] = Counter()
        self._report = report or (lambda line: warnings.warn(line, stacklevel=3))
        self._told: set[tuple[str, str]] = set()
        loader = DataLoader(
            _MicroSteps(dataset, order, batch_size, rank, ranks),
            batch_size=None,
            sampler=_From(first_step * accumulation),
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_parent,
            # Else making an iterator draws from torch's global generator.
            generator=torch.Generator(),
        )
        self._batches: Iterator[_Batch] | None = iter(loader)
        # Workers do not heed SIGTERM, by which multiprocessing ends those left over at exit. So
        # they are ended when the stream is collected; at the exit of a child of multiprocessing
        # (Finalize, above the 10 at which queues close); and at that of the main process (atexit,
        # since by the time of its finalizers torch does nothing any more).
        self._end = Finalize(self, _end_workers, (self._batches,), exitpriority=20)
        atexit.register(self._end)

    @property
    def skipped(self) -> dict[str, int]:
        """Scene -> how often another one took its place."""
        found: Counter[str] = Counter()
        for notice, times in self.notices.items():
            if notice.kind == "replaced":
                found[notice.scene] += times
        return dict(found)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Sample]:
        if self._batches is None:
            raise StopIteration
        batch = next(self._batches)
        if batch.failure is not None:
            raise ValueError(batch.failure)
        for notice in batch.notices:
            self.notices[notice] += 1
            if (notice.kind, notice.scene) not in self._told:
                self._told.add((notice.kind, notice.scene))
                self._report(str(notice))
        return batch.samples

    def close(self) -> None:
        """End the workers; the stream gives nothing more."""
        self._batches = None
        atexit.unregister(self._end)
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _end_workers(batches: Iterator[_Batch]) -> None:
    # What the iterator does when it is collected, which an exception's traceback may put off.
    if isinstance(batches, _MultiProcessingDataLoaderIter):  # else it reads in place
        batches._shutdown_workers()


def _as_it_is(batch: _Batch | Sequence[_Batch]) -> _Batch | Sequence[_Batch]:
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process: the run ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
