"""Files that know the size and CRC-32 of what was written into them."""

from __future__ import annotations

import contextlib
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

_CHUNK = 16 << 20


def crc32_of(path: Path) -> str:
    """CRC-32 of a file as 8 hexadecimal digits."""
    crc = 0
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, as fsync does for a file's bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SummedFile(io.FileIO):
    """A new file that keeps the size and CRC-32 of what was written and the error that ended it."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "wb")
        self.size, self.crc = 0, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            count = super().write(data)
        except OSError as error:  # torch reports it as an assertion about file positions
            self.error = error
            raise
        self.crc = zlib.crc32(memoryview(data).cast("B")[:count], self.crc)
        self.size += count
        return count


class SummedFiles(FileSystem):
    """The file system as torch.distributed.checkpoint sees it, with `SummedFile`s for writing."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}
        self.error: OSError | None = None

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        raw = SummedFile(os.fspath(path))
        try:
            with io.BufferedWriter(raw) as buffered:
                yield buffered
        finally:
            self.error = self.error or raw.error
        # The index is written under this name and then renamed.
        name = Path(path).name.removesuffix(".tmp")
        self.written[name] = {"bytes": raw.size, "crc32": f"{raw.crc:08x}"}
