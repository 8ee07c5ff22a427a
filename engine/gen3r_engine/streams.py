"""CUDA streams of the stages, and results copied to the host beside them. Plain off a GPU.

The denoising loop has a stream of high priority: whenever one of its blocks can start it does, and
the kernels of the other stages, on a stream of low priority, take what is left of the GPU. Copies
to the host have a third stream and pinned memory, so that they hold up neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

HIGH, LOW = -1, 0  # in CUDA a lower number goes first


class Streams:
    """Where the stages run. With `apart` false all stages share the caller's stream.

    Every stage ends by waiting for its own stream on the host, before its results are handed to a
    stage on another one and before its inputs are let go: memory never changes streams in flight.
    """

    def __init__(self, device: torch.device, apart: bool) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.apart = apart and self.cuda
        self._denoise = torch.cuda.Stream(device, priority=HIGH) if self.apart else None
        self._beside = torch.cuda.Stream(device, priority=LOW) if self.apart else None
        self._copies = torch.cuda.Stream(device, priority=LOW) if self.cuda else None

    def denoising(self) -> AbstractContextManager[object]:
        """Work in the block goes to the denoising stream."""
        return self._on(self._denoise)

    def beside(self) -> AbstractContextManager[object]:
        """Work in the block goes to the stream of encoding and decoding."""
        return self._on(self._beside)

    def _on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
        if stream is not None:
            return torch.cuda.stream(stream)
        return torch.cuda.device(self.device) if self.cuda else nullcontext()

    def wait(self) -> None:
        """Wait on the host for the work of the current stream."""
        if self.cuda:
            torch.cuda.current_stream(self.device).synchronize()

    def to_host(self, tensors: Mapping[str, Tensor | None]) -> HostCopy:
        """Start copying tensors of the current stream to the host."""
        return HostCopy(tensors, self._copies)


class HostCopy:
    """Tensors on their way to the host. Keeps what it copies from until the copy is done."""

    def __init__(
        self, tensors: Mapping[str, Tensor | None], stream: torch.cuda.Stream | None
    ) -> None:
        self._staged = stream is not None
        self._done: torch.cuda.Event | None = None
        self._sources: dict[str, Tensor | None] = {}
        self._host = dict(tensors)
        if stream is None:
            return
        self._sources = {name: _dense(value) for name, value in tensors.items()}
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        self._done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(stream):
            self._host = {name: _pinned_copy(value) for name, value in self._sources.items()}
            self._done.record(stream)

    def wait(self) -> None:
        """Wait for the copy; the GPU's memory can be used again then."""
        if self._done is not None:
            self._done.synchronize()
        self._sources = {}

    def result(self) -> dict[str, Tensor | None]:
        """The tensors in ordinary host memory; the pinned memory goes back to torch's cache."""
        self.wait()
        held, self._host = self._host, {}
        if not self._staged:
            return held
        return {name: None if value is None else value.clone() for name, value in held.items()}


def _dense(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def _pinned_copy(value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)
