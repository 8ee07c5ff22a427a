"""Measuring: repeats on a cold cache, peak memory, and the ceilings of the machine.

On a GPU time is that between two CUDA events around the call. A buffer larger than the L2 cache is
overwritten before every repeat: inputs then come from memory, and as many dirty lines wait to be
written back when the call begins as it leaves behind (the steady state of a long run). The
overwriting also keeps the GPU busy while the call is being launched, so that launch latency is not
counted. On a CPU it is wall time, after the same overwriting.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], Any]
Prepare = Callable[[], Work]  # untimed work of a repeat; returns what is timed

# 20 times the L2 cache of an H100; 0.35 ms, in which the processor launches what is timed.
FLUSH_BYTES = 2**30
CPU_FLUSH_BYTES = 32 * 2**20
SECONDS = 0.15
CPU_SECONDS = 0.1
LONG_MS = 10.0  # calls longer than this are repeated fewer than FEWEST times
FEWEST, FEWEST_LONG, MOST, CPU_MOST = 20, 5, 60, 20


def repeats(estimate_ms: float, seconds: float = SECONDS, most: int = MOST) -> int:
    """How often to run a call of that length: about `seconds` in all, within limits."""
    fewest = FEWEST_LONG if estimate_ms > LONG_MS else FEWEST
    return max(fewest, min(most, math.ceil(1000 * seconds / max(estimate_ms, 1e-6))))


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = FLUSH_BYTES if device.type == "cuda" else CPU_FLUSH_BYTES
        self.buffer = torch.empty(size, dtype=torch.int8, device=device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def flush(self) -> None:
        """Push everything out of the cache."""
        self.buffer.zero_()

    def first(self, prepare: Prepare) -> float:
        """Seconds of the first call and its preparation: what has to be compiled is compiled."""
        self.synchronize()
        start = time.perf_counter()
        prepare()()
        self.synchronize()
        return time.perf_counter() - start

    def times(self, prepare: Prepare) -> list[float]:
        """Milliseconds of every repeat, each on a cold cache, after a warm-up."""
        if self.device.type == "cuda":
            return self._events(prepare, repeats(min(self._events(prepare, 3))))
        count = repeats(min(self._wall(prepare, 3)), CPU_SECONDS, CPU_MOST)
        return self._wall(prepare, count)

    def _events(self, prepare: Prepare, count: int) -> list[float]:
        pairs = []
        for _ in range(count):
            work = prepare()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush()
            start.record()
            work()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def _wall(self, prepare: Prepare, count: int) -> list[float]:
        times = []
        for _ in range(count):
            work = prepare()
            self.flush()
            start = time.perf_counter()
            work()
            times.append(1000 * (time.perf_counter() - start))
        return times

    def peak_gib(self, prepare: Prepare) -> float | None:
        """GiB that the call allocates at its peak, outputs included; None on a CPU."""
        if self.device.type != "cuda":
            return None
        work = prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 products without TF32, for references."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.backends.cuda.matmul.allow_tf32 = products


@dataclass(frozen=True)
class Ceiling:
    """The best rate the machine reaches: `samples` in GB/s (copy) or TFLOP/s (a large product)."""

    name: str
    shape: str
    dtype: str
    unit: str
    samples: list[float]

    @property
    def value(self) -> float:
        """The median."""
        return sorted(self.samples)[len(self.samples) // 2]


def measure_ceilings(watch: Stopwatch) -> dict[str, Ceiling]:
    """Copy bandwidth (read + written bytes), and products of n x n matrices per dtype.

    On a GPU `bf16` and, from compute capability 8.9, `fp8` (fast accumulation); on a CPU `bf16`
    stands for the float32 product that its small cases run in.
    """
    cuda = watch.device.type == "cuda"
    found = {"copy": _copy(watch, 2**32 if cuda else 2**27)}
    n = 8192 if cuda else 768
    dtype = torch.bfloat16 if cuda else torch.float32
    a, b = (torch.randn(n, n, device=watch.device, dtype=dtype) for _ in range(2))
    # Both layouts of the second operand: which one is faster depends on the library's kernels.
    products = [
        _product(watch, "bf16", n, dtype, run) for run in (lambda: a @ b, lambda: a @ b.t())
    ]
    found["bf16"] = max(products, key=lambda ceiling: ceiling.value)
    if cuda and torch.cuda.get_device_capability() >= (8, 9):
        found["fp8"] = _product(watch, "fp8", n, torch.float8_e4m3fn, _fp8_product(a, b))
    return found


def _copy(watch: Stopwatch, size: int) -> Ceiling:
    source = torch.empty(size // 4, dtype=torch.float32, device=watch.device).normal_()
    target = torch.empty_like(source)
    times = watch.times(lambda: lambda: target.copy_(source))
    samples = [2e-6 * size / ms for ms in times]
    return Ceiling("copy", f"{size} bytes", "float32", "GB/s", samples)


def _product(watch: Stopwatch, name: str, n: int, dtype: torch.dtype, run: Work) -> Ceiling:
    times = watch.times(lambda: run)
    return Ceiling(
        name, f"{n}x{n}x{n}", dtype_name(dtype), "TFLOP/s", [2e-9 * n**3 / t for t in times]
    )


def _fp8_product(a: Tensor, b: Tensor) -> Work:
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(
        left, right, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_name(*sizes: int) -> str:
    return "x".join(map(str, sizes))
