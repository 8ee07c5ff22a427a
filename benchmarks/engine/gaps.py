"""How long the GPU runs nothing between two replays of the captured step.

CUDA events around a replay cannot tell: what passes between the first event and the graph's first
kernel counts as the step. The profiler has the kernels' own times, and all kernels of one replay
carry the number of its launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Kernel = tuple[int, int, int]  # number of its launch, start and end in ns
FEWEST = 20  # kernels of a launch that is a replay; a kernel launched alone has one


def profiled_gaps(run: Callable[[], object]) -> list[float]:
    """Milliseconds between the replays in `run`; empty where the profiler sees no kernels."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        run()
        torch.cuda.synchronize()
    results: Any = profiled.profiler
    events = results.kineto_results.events() if results is not None else []
    kernels = [
        (event.correlation_id(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    return gaps_between(kernels)


def gaps_between(kernels: Iterable[Kernel], fewest: int = FEWEST) -> list[float]:
    """Milliseconds without any kernel between neighbouring launches of many kernels.

    What other kernels (a copy of the latents for a listener, say) take between them is not counted.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel[1])
    launches: dict[int, list[Kernel]] = {}
    for kernel in ordered:
        launches.setdefault(kernel[0], []).append(kernel)
    replays = sorted(
        (min(k[1] for k in own), max(k[2] for k in own))
        for own in launches.values()
        if len(own) >= fewest
    )
    gaps = []
    for (_, end), (start, _) in pairwise(replays):
        busy = sum(k[2] - k[1] for k in ordered if k[1] >= end and k[2] <= start)
        gaps.append(max(0, start - end - busy) / 1e6)
    return gaps
