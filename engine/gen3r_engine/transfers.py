"""Weights between pinned host memory and the GPU: what is copied, where, and who waits for whom.

A `Pack` lays the tensors of a module end to end in one buffer, so that a visit is one copy at the
speed of the bus. `Transfer` is the order of copies and computation; the one for the CPU computes
the same with nothing beside it, and tests watch it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU, whichever is this thread's
ALIGNMENT = 256  # bytes; what kernels with vector loads and tensor descriptors ask of an address


class Transfer(Protocol):
    """Copies from the host to the device beside the current stream."""

    def empty(self, size: int) -> Tensor:
        """A buffer of bytes on the device, for the current stream."""
        ...

    def pinned(self, size: int) -> Tensor:
        """A buffer of bytes on the host that copies can read without the processor."""
        ...

    def start(self, host: Tensor, device: Tensor, after: object | None) -> object:
        """Start a copy once `after` (from `mark`) has passed; returns what `wait` takes.

        Without `after` the copy waits for everything that the current stream was given so far.
        """
        ...

    def wait(self, copied: object, device: Tensor) -> None:
        """The current stream goes on when the copy is there; `device` is in its use from now."""
        ...

    def mark(self) -> object:
        """The current stream's work so far."""
        ...


class CudaTransfer:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pinned(self, size: int) -> Tensor:
        return pinned_bytes(size)

    def start(self, host: Tensor, device: Tensor, after: object | None) -> torch.cuda.Event:
        if isinstance(after, torch.cuda.Event):
            self._stream.wait_event(after)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            device.copy_(host, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        # Dropped before the copy ran, the memory must not be handed out under it.
        device.record_stream(self._stream)
        return copied

    def wait(self, copied: object, device: Tensor) -> None:
        stream = torch.cuda.current_stream(self.device)
        if isinstance(copied, torch.cuda.Event):
            stream.wait_event(copied)
        # The buffer may have been made for another thread's stream.
        device.record_stream(stream)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event


class HostTransfer:
    """The same on the CPU: every copy is done when `start` returns."""

    def empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def start(self, host: Tensor, device: Tensor, after: object | None) -> object:
        device.copy_(host)
        return None

    def wait(self, copied: object, device: Tensor) -> None:
        return None

    def mark(self) -> object:
        return None


def pinned_bytes(size: int) -> Tensor:
    """Pinned host memory of exactly `size` bytes; torch's own is rounded up to a power of two.

    Raises
    ------
    RuntimeError : the system does not let so much memory be pinned.
    """
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    # Pages of its own: two pinned ranges must not share one.
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without large pages pins small ones, slower
        pages.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(pages, np.uint8)
    address, runtime = array.ctypes.data, torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(address, size, PORTABLE))
    if status != 0:
        raise RuntimeError(
            f"{size / 2**30:.2f} GiB of host memory could not be pinned (CUDA error {status}); "
            "raise the limit of locked memory, or use residency 'resident'"
        )
    # The tensor's storage holds the array, and the array the pages: unpinned, then unmapped.
    weakref.finalize(array, runtime.cudaHostUnregister, address).atexit = False
    return torch.from_numpy(array)


class Pack:
    """The parameters and buffers of a module, end to end in one host buffer.

    Making it moves the module's tensors into the buffer. `point(None)` lets the module use the
    host's copy, `point(device)` a copy of the buffer on the device. Weights are read only: what is
    written to the device's copy is lost.

    `without` : parts of the module whose tensors are left where they are.
    """

    def __init__(
        self, module: nn.Module, transfer: Transfer, without: Iterable[nn.Module] = ()
    ) -> None:
        left_out = {id(entry[2]) for part in without for entry in _tensors(part)}
        places: dict[int, tuple[Tensor, list[tuple[nn.Module, str, bool]]]] = {}
        for owner, name, tensor, is_parameter in _tensors(module):
            if id(tensor) in left_out:
                continue
            places.setdefault(id(tensor), (tensor, []))[1].append((owner, name, is_parameter))
        self._entries: list[tuple[list[tuple[nn.Module, str, bool]], int, Tensor]] = []
        self.size = 0
        tensors = []
        for tensor, owners in places.values():
            tensors.append((tensor, owners, self.size))
            taken = tensor.numel() * tensor.element_size()
            self.size += math.ceil(taken / ALIGNMENT) * ALIGNMENT
        self.host = transfer.pinned(self.size)
        for tensor, owners, offset in tensors:
            tensor = _dense(tensor)
            view = _view(self.host, offset, tensor)
            view.copy_(tensor.detach())
            self._entries.append((owners, offset, view))
        self.point(None)

    def point(self, device: Tensor | None) -> None:
        """Let the module's tensors be those of a device buffer of `size` bytes, or the host's."""
        for owners, offset, host in self._entries:
            value = host if device is None else _view(device, offset, host)
            for owner, name, is_parameter in owners:
                if is_parameter:
                    owner._parameters[name].data = value  # type: ignore[union-attr]
                else:
                    owner._buffers[name] = value


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor, bool]]:
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield owner, name, parameter, True
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                yield owner, name, buffer, False


def _dense(tensor: Tensor) -> Tensor:
    """The tensor without gaps or overlaps in its memory, in its own order of axes."""
    kept = torch.empty_like(tensor, device="meta")  # of a dense tensor it has the strides
    return tensor if kept.stride() == tensor.stride() else tensor.contiguous()


def _view(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    taken = like.numel() * like.element_size()
    flat = buffer[offset : offset + taken].view(like.dtype)
    if like.is_contiguous():
        return flat.view(like.shape)
    return flat.as_strided(like.shape, like.stride())  # channels-last weights stay so
