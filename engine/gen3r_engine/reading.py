"""safetensors files into memory by several threads: to the GPU through pinned buffers, or the host.

A file is cut into chunks. A thread reads a chunk from the page cache into one of its two pinned
buffers and starts the copies of the tensors' parts in it; while those run it reads the next chunk
into the other. So reading (about 8 GB/s a thread) and the bus (about 50 GB/s) work at once, and
the file is never mapped: nothing of it counts as the process's memory. A target on the host is
filled directly, all parts of a chunk in one call of the extension where it is built (`native`):
that reads small tensors twice as fast as a call a tensor, and long ones as fast.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gen3r.checkpoint import CheckpointError, TensorFile, read_tensors
from gen3r_engine.native import native
from gen3r_engine.safetensors_header import Span, read_spans, shown

CHUNK = 2**26  # bytes: 64 MiB, long enough that starting a copy costs nothing beside it
THREADS = 8
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool},
}


class Piece(NamedTuple):
    """Bytes of a chunk that belong to one tensor: where in the chunk, and their target."""

    begin: int
    target: Tensor  # [bytes] uint8


@dataclass
class _Staging:
    """One thread's pinned buffers, and for each the copy that reads it last."""

    buffers: list[Tensor]
    busy: list[torch.cuda.Event | None]
    stream: torch.cuda.Stream | None
    turn: int = 0


class ParallelReader:
    """A reader for `gen3r.checkpoint.load_component`; several files may be read at once.

    Parameters
    ----------
    dtype : files whose tensors are all of this dtype are read by chunks; others tensor by tensor
        (`read_tensors`), so that they are never on the device in both dtypes as a whole.
    threads, chunk : how many read at once, bytes of a chunk.
    staged : through buffers although the target is on the host (tests).

    Use it as a context manager: leaving it ends its threads and frees its buffers.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        threads: int = THREADS,
        chunk: int = CHUNK,
        staged: bool = False,
    ) -> None:
        self._dtype = dtype
        self._chunk = chunk
        self._staged = staged
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self._local = threading.local()

    def __enter__(self) -> ParallelReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(
        self, file: TensorFile, wanted: Container[str], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """The wanted tensors of a file under upstream's names; they come when all are there.

        Raises
        ------
        CheckpointError : a header that can not be trusted (`safetensors_header`), or a file that is
            shorter than it says.
        """
        names = {name: upstream for upstream, name in file.names.items() if upstream in wanted}
        spans = None
        if file.path.suffix == ".safetensors":
            spans = [span for span in read_spans(file.path) if span.name in names]
        if spans is None or any(DTYPES.get(s.dtype) != self._dtype for s in spans):
            for name, tensor in read_tensors(file, wanted, device):
                mapped = tensor.device.type == "cpu" and tensor.dtype == self._dtype
                yield name, tensor.clone() if mapped else tensor
            return
        tensors = {s.name: torch.empty(s.shape, dtype=self._dtype, device=device) for s in spans}
        self._fill(file.path, spans, tensors, device)
        for name in list(tensors):
            yield names[name], tensors.pop(name)

    def _fill(
        self, path: Path, spans: list[Span], tensors: dict[str, Tensor], device: torch.device
    ) -> None:
        flat = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}
        ready = None
        if device.type == "cuda":
            # The memory may have been another tensor's, which the current stream still reads.
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
        descriptor = os.open(path, os.O_RDONLY)
        try:
            tasks: list[Future[torch.cuda.Event | None]] = [
                self._pool.submit(self._read, descriptor, path, begin, size, pieces, device, ready)
                for begin, size, pieces in _chunks(spans, flat, self._chunk)
            ]
            # All of them end before the file is closed, also when one fails.
            errors = [error for task in tasks if (error := task.exception()) is not None]
        finally:
            os.close(descriptor)
        if errors:
            raise errors[0]
        for task in tasks:
            copied = task.result()
            if copied is not None:
                copied.synchronize()

    def _read(
        self,
        descriptor: int,
        path: Path,
        begin: int,
        size: int,
        pieces: list[Piece],
        device: torch.device,
        ready: torch.cuda.Event | None,
    ) -> torch.cuda.Event | None:
        if device.type != "cuda" and not self._staged:
            _read_into(descriptor, path, [(begin + p.begin, p.target) for p in pieces])
            return None
        staging = self._staging(device)
        turn = staging.turn = (staging.turn + 1) % len(staging.buffers)
        buffer, busy = staging.buffers[turn], staging.busy[turn]
        if busy is not None:
            busy.synchronize()
        _read_into(descriptor, path, [(begin, buffer[:size])])
        if staging.stream is None or ready is None:
            for piece in pieces:
                piece.target.copy_(buffer[piece.begin : piece.begin + piece.target.numel()])
            return None
        staging.stream.wait_event(ready)
        with torch.cuda.stream(staging.stream):
            for piece in pieces:
                part = buffer[piece.begin : piece.begin + piece.target.numel()]
                piece.target.copy_(part, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(staging.stream)
        staging.busy[turn] = copied
        return copied

    def _staging(self, device: torch.device) -> _Staging:
        found: _Staging | None = getattr(self._local, "staging", None)
        if found is None:
            cuda = device.type == "cuda"
            buffers = [
                torch.empty(self._chunk, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)
            ]
            stream = torch.cuda.Stream(device) if cuda else None
            found = self._local.staging = _Staging(buffers, [None, None], stream)
        return found


def _chunks(
    spans: list[Span], flat: dict[str, Tensor], limit: int
) -> Iterator[tuple[int, int, list[Piece]]]:
    """Begin, size and pieces of chunks of at most `limit` bytes that cover the spans."""
    begin, end = 0, 0
    pieces: list[Piece] = []
    for span in spans:
        position = span.begin
        while position < span.end:
            # A gap (tensors that are not wanted) or a full chunk begins a new one.
            if pieces and (position != end or position - begin >= limit):
                yield begin, end - begin, pieces
                pieces = []
            if not pieces:
                begin = position
            taken = min(span.end, begin + limit) - position
            offset = position - span.begin
            pieces.append(Piece(position - begin, flat[span.name][offset : offset + taken]))
            position = end = position + taken
    if pieces:
        yield begin, end - begin, pieces


def _read_into(descriptor: int, path: Path, targets: list[tuple[int, Tensor]]) -> None:
    """Fill uint8 tensors on the host from where they begin in a file."""
    module = native()
    if module is not None:
        arrays = [(begin, target.numpy()) for begin, target in targets]
        try:
            module.read_ranges(descriptor, arrays, 1, shown(path))
        except EOFError as error:
            raise CheckpointError(f"{error}; download it again") from None
        return
    for begin, target in targets:
        view = memoryview(target.numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], begin + done)
            if count == 0:
                length = os.fstat(descriptor).st_size
                raise CheckpointError(f"{path} ends after {length} bytes; download it again")
            done += count
