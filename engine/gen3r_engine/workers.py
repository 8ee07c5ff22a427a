"""A thread that does jobs one after the other behind a program's back, and never many of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self


class BoundedWorker:
    """Jobs on one thread, in order. Use it in a `with` block, whose end waits for all of them.

    Parameters
    ----------
    waiting : jobs that may wait behind the one that runs; `submit` blocks while there are more.

    Attributes
    ----------
    stopping : set when the block is left by Ctrl-C; a long job looks at it and gives up.
    """

    def __init__(self, name: str, waiting: int = 1) -> None:
        self.stopping = threading.Event()
        self._room = threading.Semaphore(waiting + 1)
        self._pool = ThreadPoolExecutor(1, name)
        self._jobs: list[Future[None]] = []

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        """Queue `job(*arguments)`. Raises the error of an earlier job, if one failed."""
        self._raise_first()
        self._room.acquire()
        self._jobs.append(self._pool.submit(self._run, job, arguments))

    def _run(self, job: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        try:
            if not self.stopping.is_set():
                job(*arguments)
        finally:
            self._room.release()

    def _raise_first(self) -> None:
        waiting = []
        for future in self._jobs:
            if future.done():
                future.result()
            else:
                waiting.append(future)
        self._jobs = waiting

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            self.stopping.set()
        try:
            self._pool.shutdown(wait=True)
        except BaseException:  # Ctrl-C while the last job runs
            self.stopping.set()
            self._pool.shutdown(wait=True)
            raise
        if error is None:
            self._raise_first()
