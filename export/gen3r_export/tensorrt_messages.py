"""What TensorRT says while it works: its messages, and how far a build has come."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

from gen3r_export.graph import Tell
from gen3r_export.tensorrt_library import Library

KEPT = ("INTERNAL_ERROR", "ERROR", "WARNING")
TELL_EVERY = 10.0  # seconds between lines about a build's progress


class Logger(Protocol):
    """An ILogger that keeps warnings and errors in `kept`, as (severity, text)."""

    kept: list[tuple[str, str]]


@cache
def logger(library: Library) -> Logger:
    """The process's logger. There is one for each library, because TensorRT keeps the first that it
    is given and ignores all later ones."""
    base = library.module.ILogger

    class Kept(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.kept: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in KEPT:
                self.kept.append((severity.name, message))

    return Kept()


class Messages:
    """Warnings and errors since this object was made."""

    def __init__(self, library: Library) -> None:
        self.logger = logger(library)
        self.logger.kept.clear()

    @property
    def errors(self) -> list[str]:
        """Texts of the errors, in one line each."""
        return [one_line(text) for severity, text in self.logger.kept if severity != "WARNING"]

    @property
    def warnings(self) -> list[str]:
        """Texts of the warnings, in one line each, each once."""
        found = [one_line(text) for severity, text in self.logger.kept if severity == "WARNING"]
        return list(dict.fromkeys(found))

    def reason(self, otherwise: str) -> str:
        """All errors in one line, or `otherwise` where there are none."""
        return "; ".join(dict.fromkeys(self.errors)) or otherwise


def one_line(text: str) -> str:
    """White space made single blanks."""
    return " ".join(text.split())


@contextmanager
def interrupts_kept() -> Iterator[list[int]]:
    """Ctrl-C inside is kept in the list and raised at the end.

    TensorRT calls loggers and monitors from C++, which no exception may pass: the process would
    end there and then.
    """
    kept: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield kept  # signals are not handled on this thread
        return
    before = signal.signal(signal.SIGINT, lambda number, _: kept.append(number))
    try:
        yield kept
    finally:
        # None: it was set outside Python, and cannot be set again from here.
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
    if kept:
        raise KeyboardInterrupt


class Progress(Protocol):
    """An IProgressMonitor. failure : what `tell` raised."""

    failure: BaseException | None


def progress(library: Library, what: str, tell: Tell, interrupts: list[int]) -> Progress:
    """A monitor that tells the phase and the step at most once in `TELL_EVERY` seconds.

    The build stops at its next step when `interrupts` fills, or when `tell` raises, which is kept
    in `failure` for the caller.
    """
    base = library.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)
            self.failure: BaseException | None = None
            self.steps: dict[str, int] = {}
            self.told = time.monotonic()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if time.monotonic() - self.told >= TELL_EVERY:
                    self.told = time.monotonic()
                    tell(f"{what}: {phase}, step {step + 1} of {self.steps.get(phase, '?')}")
            except BaseException as error:  # for the caller, see `interrupts_kept`
                self.failure = error
            return self.failure is None and not interrupts

    return Monitor()
