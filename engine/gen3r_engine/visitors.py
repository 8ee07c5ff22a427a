"""Modules that live in host memory and visit the GPU: whole, or block by block while they run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gen3r_engine.transfers import Pack, Transfer

SLOTS = 2  # blocks on the GPU at once: one computes, the next arrives


class WholeVisitor:
    """A module that comes to the device as one copy and goes with its last user."""

    def __init__(self, module: nn.Module, transfer: Transfer) -> None:
        self.module = module
        self._transfer = transfer
        self._pack = Pack(module, transfer)
        self._lock = threading.Lock()
        self._users = 0
        self._here: tuple[Tensor, object] | None = None

    @property
    def size(self) -> int:
        """Bytes on the device during a visit."""
        return self._pack.size

    @contextmanager
    def visit(self) -> Iterator[nn.Module]:
        """The module on the device. Users on several threads and streams share one copy."""
        with self._lock:
            buffer, copied = self._fetch()
            self._transfer.wait(copied, buffer)
            self._users += 1
        try:
            yield self.module
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._leave()

    def _fetch(self) -> tuple[Tensor, object]:
        if self._here is None:
            buffer = self._transfer.empty(self._pack.size)
            copied = self._transfer.start(self._pack.host, buffer, None)
            self._pack.point(buffer)
            self._here = buffer, copied
        return self._here

    def _leave(self) -> None:
        self._pack.point(None)
        self._here = None


class StreamedVisitor:
    """A module whose blocks pass through two slots on the device while it runs.

    Parameters
    ----------
    blocks : run one after another, each once, in every forward of `module`.
    embedding : its table stays on the host; only the rows that are read come to the device.
    device : where the computation is.

    What is in neither (final norms) comes whole for the time of the visit.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module],
        embedding: nn.Module | None,
        device: torch.device,
        transfer: Transfer,
    ) -> None:
        self.module = module
        self._device = device
        self._transfer = transfer
        self._embedding = embedding
        self._blocks = list(blocks)
        self._packs = [Pack(block, transfer) for block in self._blocks]
        elsewhere = self._blocks if embedding is None else [*self._blocks, embedding]
        self._rest = Pack(module, transfer, elsewhere)
        self._lock = threading.Lock()
        self._slots: list[Tensor] = []
        self._free: list[object | None] = []  # per slot: the computation that read it last
        self._copied: dict[int, object] = {}  # per block on its way: what to wait for

    @property
    def size(self) -> int:
        """Bytes on the device during a visit."""
        return self._rest.size + SLOTS * max((pack.size for pack in self._packs), default=0)

    @contextmanager
    def visit(self) -> Iterator[nn.Module]:
        """The module, ready to be called with inputs on any device. One user at a time."""
        with self._lock:
            hooks: list[Any] = []
            try:
                self._arrive(hooks)
                yield self.module
            finally:
                for hook in hooks:
                    hook.remove()
                self._leave()

    def _arrive(self, hooks: list[Any]) -> None:
        largest = max((pack.size for pack in self._packs), default=0)
        self._slots = [self._transfer.empty(largest) for _ in range(SLOTS)]
        self._free = [None] * SLOTS
        rest = self._transfer.empty(self._rest.size)
        self._transfer.wait(self._transfer.start(self._rest.host, rest, None), rest)
        self._rest.point(rest)
        self._fetch(0)
        hooks.append(self.module.register_forward_pre_hook(self._inputs, with_kwargs=True))
        if self._embedding is not None:
            hooks.append(self._embedding.register_forward_pre_hook(_to_host))
            hooks.append(self._embedding.register_forward_hook(self._to_device))
        for index, block in enumerate(self._blocks):
            hooks.append(block.register_forward_pre_hook(self._before(index)))
            hooks.append(block.register_forward_hook(self._after(index)))

    def _leave(self) -> None:
        # A visit that was broken off may have a copy under way: the stream that frees the slots
        # waits for it.
        for index, copied in self._copied.items():
            self._transfer.wait(copied, self._slots[index % SLOTS])
        for pack in (*self._packs, self._rest):
            pack.point(None)
        self._slots, self._free, self._copied = [], [], {}

    def _fetch(self, index: int) -> None:
        """Start copying a block into its slot, once the slot's last reader is done."""
        pack, number = self._packs[index], index % SLOTS
        slot = self._slots[number][: pack.size]
        self._copied[index] = self._transfer.start(pack.host, slot, self._free[number])

    def _before(self, index: int) -> Callable[[nn.Module, Any], None]:
        def hook(block: nn.Module, inputs: Any) -> None:
            if index not in self._copied:  # the first block of a second forward
                self._fetch(index)
            slot = self._slots[index % SLOTS]
            self._transfer.wait(self._copied.pop(index), slot)
            self._packs[index].point(slot[: self._packs[index].size])
            if index + 1 < len(self._blocks) and index + 1 not in self._copied:
                self._fetch(index + 1)

        return hook

    def _after(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(block: nn.Module, inputs: Any, output: Any) -> None:
            self._packs[index].point(None)
            self._free[index % SLOTS] = self._transfer.mark()

        return hook

    def _inputs(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        # A forward that was broken off leaves a block in a slot and another on its way.
        self._free = [self._transfer.mark()] * SLOTS
        self._copied = {index: copied for index, copied in self._copied.items() if index == 0}
        moved = [_moved(value, self._device) for value in args]
        return tuple(moved), {name: _moved(value, self._device) for name, value in kwargs.items()}

    def _to_device(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.to(self._device)


def _to_host(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_moved(value, torch.device("cpu")) for value in inputs)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


Visitor = WholeVisitor | StreamedVisitor
