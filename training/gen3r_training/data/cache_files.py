"""Files of a latent cache: entries that appear whole, carry a checksum and are found by an index.

Made for writers that are killed and for several at a time. An entry is written beside its place and
renamed. The index is one file of JSON lines per writer, so that no two append to the same file;
a line that a killed writer left half is ignored. Claims keep two writers from the same entry; they
are record locks, which end with the process that holds them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

FORMAT = "gen3r latent cache 1"
HEADER_BYTES = 8  # length of a safetensors file's JSON header, little endian
NO_CHECKSUM = "0" * 64
TEMPORARY = ".writing-"
SUFFIX = ".safetensors"


class DamagedEntry(ValueError):
    """A file of the cache that is not what was written."""


def digest(*parts: object) -> str:
    """sha256 of some values' JSON, in hexadecimal."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def entry_path(folder: Path, kind: str, key: str) -> Path:
    """Where the entry with this key lies; a folder holds 1/256 of them."""
    return folder / kind / key[:2] / f"{key}{SUFFIX}"


def write_entry(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write an entry in one step. Tensors are on the CPU and contiguous.

    Raises
    ------
    OSError : the disk is full, or the folder cannot be written; nothing is left behind.
    """
    marks = {"format": FORMAT, "key": path.stem, "checksum": NO_CHECKSUM}
    raw = bytearray(save(dict(tensors), marks))
    start = HEADER_BYTES + int.from_bytes(raw[:HEADER_BYTES], "little")
    checksum = hashlib.sha256(memoryview(raw)[start:]).hexdigest().encode()
    place = raw.index(NO_CHECKSUM.encode(), 0, start)
    raw[place : place + len(checksum)] = checksum
    write_whole(path, raw)


def read_entry(path: Path) -> dict[str, Tensor]:
    """The tensors of an entry, once its checksum is found right.

    Raises
    ------
    FileNotFoundError : there is none.
    DamagedEntry : it is not what was written under this name.
    """
    raw = path.read_bytes()
    start = HEADER_BYTES + int.from_bytes(raw[:HEADER_BYTES], "little")
    try:
        header = json.loads(raw[HEADER_BYTES:start])
        marks = header.get("__metadata__", {})
        right = marks.get("checksum") == hashlib.sha256(memoryview(raw)[start:]).hexdigest()
        if not right or (marks.get("format"), marks.get("key")) != (FORMAT, path.stem):
            raise DamagedEntry(f"{path} is damaged (its checksum is not that of its contents)")
        return load(raw)
    except (ValueError, AttributeError, SafetensorError) as error:
        if isinstance(error, DamagedEntry):
            raise
        raise DamagedEntry(f"{path} is damaged (its header cannot be read)") from error


def write_whole(path: Path, contents: bytes | bytearray) -> None:
    """A file that appears whole or not at all, and stays after a power cut. Errors: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def read_index(folder: Path) -> dict[str, str]:
    """Clip -> key of its entry; where writers disagree, the latest counts."""
    found: dict[str, tuple[int, str]] = {}
    for file in sorted((folder / "index").glob("*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                record = json.loads(line)
                clip, when, key = record["clip"], int(record["time"]), record["entry"]
            except (ValueError, KeyError, TypeError):
                continue  # the half line of a killed writer: its clip counts as not there
            if clip not in found or found[clip][0] <= when:
                found[clip] = when, key
    return {clip: key for clip, (_, key) in found.items()}


class CacheWriter:
    """One process that fills a cache folder; use it in a ``with`` block.

    When no other writer is at work, what killed ones left half is removed first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        (folder / "index").mkdir(parents=True, exist_ok=True)
        self._lines = folder / "index" / f"{uuid.uuid4().hex}.jsonl"
        self._present = open(folder / "writers.lock", "ab")  # noqa: SIM115 - held until close
        self._claims = open(folder / "claims.lock", "ab")  # noqa: SIM115
        self._announce()

    def _announce(self) -> None:
        try:
            fcntl.flock(self._present, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # others are writing, and half files may be theirs
        else:
            for half in self.folder.rglob(f"{TEMPORARY}*"):
                half.unlink(missing_ok=True)
        fcntl.flock(self._present, fcntl.LOCK_SH)

    def note(self, clip: str, key: str) -> None:
        """Enter a clip into the index, unless it is there already. Errors: OSError."""
        if self.index.get(clip) == key:
            return
        record = {"clip": clip, "entry": key, "time": time.time_ns()}
        with self._lines.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.index[clip] = key

    def claim(self, key: str, *, wait: bool = False) -> bool:
        """Claim an entry for this process; False when another one is at it now.

        wait : rather wait until the other one has finished or died. Hold no claim then: two that
            wait for each other would wait for ever.
        """
        flags = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self._claims, flags, 1, _place(key))
        except (BlockingIOError, PermissionError):  # POSIX allows either for a lock that is held
            return False
        return True

    def release(self, key: str) -> None:
        """Give up a claim; nothing happens without one."""
        fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, _place(key))

    def close(self) -> None:
        """Give up the locks."""
        self._present.close()
        self._claims.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _place(key: str) -> int:
    """A byte of the claims' file for every entry; record locks reach to 2^63."""
    return int(key[:15], 16)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises
    ------
    ValueError : the file holds something else. OSError : it cannot be read.
    """
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold an object")
    return values
