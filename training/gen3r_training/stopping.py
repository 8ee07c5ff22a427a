"""How a run ends early: signals that let the current step finish, and errors told in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

# EFBIG is what a limit on the size of files (RLIMIT_FSIZE) gives.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A launcher passes on the Ctrl-C that the terminal has sent to its workers too: that is one wish.
_SAME_WISH = 1.0  # seconds


class TrainingError(RuntimeError):
    """Training cannot go on, whatever its arguments; the text is one line. Exit code 1."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C came and the run was saved; the text is one line.

    exit_code : 143 or 130, 128 + the signal's number as shells report it
    """

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + number


class StopSignals:
    """Inside, SIGTERM and Ctrl-C are only noted (`number`), so that a step can finish.

    A second Ctrl-C, more than a second later, raises KeyboardInterrupt at once. Outside the main
    thread, which alone gets signals, nothing changes.
    """

    def __init__(self, *, told: bool = True) -> None:
        self.number: int | None = None
        self._told = told
        self._first = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not set from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._first = number, now
            if self._told:
                # print() may be what was interrupted, and does not enter itself.
                os.write(2, b"\nstopping after this step; Ctrl-C again stops at once, unsaved\n")
        elif number == signal.SIGINT and now - self._first > _SAME_WISH:
            raise KeyboardInterrupt


def is_full(error: BaseException | None) -> bool:
    """Whether the error says that the disk, a quota or a limit has no room left."""
    return isinstance(error, OSError) and error.errno in _FULL


@contextlib.contextmanager
def full_disk_told(folder: Path, what: str) -> Iterator[None]:
    """Turns "no space left" inside into a `TrainingError` that says what was written where."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise TrainingError(
            f"{what} in {folder} could not be written ({error.strerror}); "
            "make room and go on with --resume auto"
        ) from error
