"""SIGTERM unwinds a command as Ctrl-C does: unfinished folders go, finished ones stay."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143  # 128 + the signal's number, as shells report it


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived (a scheduler or `docker stop` ends the process)."""


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` in the main thread; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        # None: a handler that was not set from Python, which cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Terminated


def exit_code(stop: KeyboardInterrupt) -> int:
    """What the process returns after Ctrl-C or SIGTERM."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def told(stop: KeyboardInterrupt) -> str:
    """One line for the person: what was kept (the notes of the interruption) and that is all."""
    parts = ["interrupted", *getattr(stop, "__notes__", ())]
    return "; ".join([*parts, "no unfinished result was left behind"])
