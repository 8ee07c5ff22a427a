"""How long the steps of a loop take on the device, without waiting for them one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StepClock:
    """CUDA events around every step; counts nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        if not self.cuda:
            yield
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.events.append((start, end))

    def wait(self, index: int) -> None:
        if self.cuda:
            self.events[index][1].synchronize()

    def finish(self) -> tuple[list[float], list[float]]:
        """Wait for the last step; milliseconds of every step, and between neighbours."""
        if self.events:
            self.events[-1][1].synchronize()
        times = [start.elapsed_time(end) for start, end in self.events]
        pairs = zip(self.events, self.events[1:], strict=False)
        return times, [before[1].elapsed_time(after[0]) for before, after in pairs]
