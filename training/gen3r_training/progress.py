"""What a running training shows: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

SMOOTHING = 0.95  # of loss and seconds per step: about the last twenty steps
LINE_EVERY = 10.0  # seconds between plain lines


@dataclass(frozen=True)
class Work:
    """What the bar needs to know of a run.

    first, total : finished steps at the start and at the end; steps_per_epoch, epochs
    flops : of one step over all ranks; peak : FLOP/s of all devices, None where it is not known
    """

    first: int
    total: int
    steps_per_epoch: int
    epochs: int
    flops: float
    peak: float | None


class Mean:
    """A running mean whose first values count in full: sum of w^i x_i over sum of w^i."""

    def __init__(self, smoothing: float = SMOOTHING) -> None:
        self._smoothing, self._sum, self._weight = smoothing, 0.0, 0.0

    def add(self, value: float) -> None:
        self._sum = self._smoothing * self._sum + value
        self._weight = self._smoothing * self._weight + 1

    @property
    def value(self) -> float | None:
        return self._sum / self._weight if self._weight else None


class TrainProgress:
    """Shows steps on the main rank; on the others (`shown` off) it does nothing.

    Use it in a `with` block, call `step` after each step and `say` for a line of text.
    """

    def __init__(
        self,
        work: Work,
        device: torch.device,
        *,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.work, self.device, self.shown, self._clock = work, device, shown, clock
        self.loss, self.seconds = Mean(), Mean()
        self._stream = stream or sys.stderr
        self._last_line = -LINE_EVERY
        self._bars: Bars | None = None
        if shown and self._stream.isatty():
            self._bars = Bars(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[facts]}", markup=False),
                console=Console(file=self._stream),
                redirect_stdout=False,  # what goes to a pipe there must get there
                expand=True,
            )
            self._task = self._bars.add_task(
                self._place(work.first), total=work.total, completed=work.first, facts=""
            )

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def step(self, finished: int, loss: float | None, seconds: float) -> None:
        """After step `finished` (from 1), which took `seconds`; loss None when it was skipped."""
        if loss is not None:
            self.loss.add(loss)
        self.seconds.add(seconds)
        if not self.shown:
            return
        if self._bars is not None:
            self._bars.update(
                self._task,
                completed=finished,
                description=self._place(finished),
                facts=self._facts(finished),
            )
            return
        now = self._clock()
        if now - self._last_line >= LINE_EVERY or finished == self.work.total:
            self._last_line = now
            print(
                f"{self._place(finished)}  {self._facts(finished)}", file=self._stream, flush=True
            )

    def say(self, text: str) -> None:
        """One line, above the bar where there is one."""
        if not self.shown:
            return
        if self._bars is not None:
            self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def mfu(self) -> float | None:
        """Model FLOP utilisation in 0..1: needed FLOP per second over the devices' peak."""
        seconds = self.seconds.value
        if not seconds or not self.work.peak:
            return None
        return self.work.flops / seconds / self.work.peak

    def _place(self, finished: int) -> str:
        # The step in hand, so that the first step of an epoch shows that epoch.
        epoch = min(max(finished - 1, 0) // self.work.steps_per_epoch + 1, self.work.epochs)
        return f"epoch {epoch}/{self.work.epochs}  step {finished}/{self.work.total}"

    def _facts(self, finished: int) -> str:
        loss, seconds, mfu = self.loss.value, self.seconds.value or 0.0, self.mfu()
        parts = [
            "loss -" if loss is None else f"loss {loss:.4g}",
            rate(seconds),
            "MFU -" if mfu is None else f"MFU {100 * mfu:.1f} %",
            f"{peak_memory(self.device) / 2**30:.1f} GiB",
            f"ETA {clock_time(seconds * (self.work.total - finished))}",
        ]
        return "  ".join(parts)


def rate(seconds: float) -> str:
    """Steps per second, or seconds per step where that is the larger number."""
    if seconds <= 0:
        return "- it/s"
    return f"{1 / seconds:.2f} it/s" if seconds <= 1 else f"{seconds:.2f} s/it"


def clock_time(seconds: float) -> str:
    """H:MM:SS."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors have taken on a GPU; on a CPU the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
