"""Threads that do jobs behind a program's back, from a queue of bounded length.

`worker_pool` makes a pool of any number of threads: the extension's where it is built (`native`),
whose queue and waiting need no interpreter's lock, else Python's. `BoundedWorker` is one thread for
a `with` block.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

from gen3r_engine.native import native


class Outcome(Protocol):
    """What becomes of a job; `concurrent.futures.Future` is one."""

    def done(self) -> bool:
        """Whether it has ended: finished, failed or cancelled."""

    def cancelled(self) -> bool:
        """Whether it was taken away before it began."""

    def cancel(self) -> bool:
        """Take a waiting job away, its place in the queue too; False when it had begun."""

    def result(self, timeout: float | None = None) -> Any:
        """What it returned; raises what it raised. TimeoutError, CancelledError."""

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What it raised, or None. TimeoutError, CancelledError."""


class WorkerPool(Protocol):
    """Jobs on several threads, begun in the order in which they came."""

    def submit(self, job: Callable[..., Any], *arguments: Any, **keywords: Any) -> Outcome:
        """Queue a job from any thread; waits while the queue is full.

        Raises
        ------
        RuntimeError : the pool is closed, belongs to the process that forked this one, or is given
            a job by one of its own while the queue is full (which would wait for itself).
        """

    def close(self, cancel: bool = False) -> None:
        """Take no more jobs and wait for the rest; `cancel` drops those that have not begun.

        Ctrl-C raises out of the wait; the pool may be closed again. At the interpreter's end pools
        that are open finish what they were given.
        """


def worker_pool(threads: int, waiting: int, name: str = "gen3r") -> WorkerPool:
    """A pool of threads.

    Parameters
    ----------
    threads, waiting : jobs that run, and jobs that may wait, at one time; both at least 1.
    name : of the threads, for debuggers.

    Raises
    ------
    ValueError : a number below 1.
    """
    module = native()
    if module is None:
        return PythonPool(threads, waiting, name)
    pool: WorkerPool = module.Pool(threads, waiting, name)
    return pool


class PythonPool:
    """`WorkerPool` on Python's own threads."""

    def __init__(self, threads: int, waiting: int, name: str = "gen3r") -> None:
        if threads < 1 or waiting < 1:
            raise ValueError(f"threads {threads} and waiting {waiting} must be at least 1")
        self._room = threading.Semaphore(threads + waiting)
        self._inside = threading.local()
        self._process = os.getpid()
        self._pool = ThreadPoolExecutor(threads, name, initializer=self._mark)

    def _mark(self) -> None:
        self._inside.marked = True

    def _check_here(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError(
                "this worker pool belongs to the process that forked this one and has no threads "
                "here; make a new one after the fork"
            )

    def submit(self, job: Callable[..., Any], *arguments: Any, **keywords: Any) -> Future[Any]:
        """As `WorkerPool.submit`."""
        self._check_here()
        inside = getattr(self._inside, "marked", False)
        if not self._room.acquire(blocking=not inside):
            raise RuntimeError(
                "a job gives its own pool a job while the queue is full and would wait for itself; "
                "let the pool's owner submit it"
            )
        try:
            future = self._pool.submit(job, *arguments, **keywords)
        except RuntimeError:
            self._room.release()
            raise RuntimeError("the worker pool is closed and takes no more jobs") from None
        future.add_done_callback(lambda _: self._room.release())
        return future

    def close(self, cancel: bool = False) -> None:
        """As `WorkerPool.close`."""
        self._check_here()
        if getattr(self._inside, "marked", False):
            raise RuntimeError("a job can not close its own pool; it would wait for itself")
        self._pool.shutdown(wait=True, cancel_futures=cancel)


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
        self._pool = worker_pool(1, waiting, name)
        self._jobs: list[Outcome] = []

    def submit(self, job: Callable[..., None], *arguments: Any) -> None:
        """Queue `job(*arguments)`. Raises the error of an earlier job, if one failed."""
        self._raise_first()
        self._jobs.append(self._pool.submit(self._run, job, arguments))

    def _run(self, job: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if not self.stopping.is_set():
            job(*arguments)

    def _raise_first(self) -> None:
        waiting = []
        for job in self._jobs:
            if job.done():
                job.result()
            else:
                waiting.append(job)
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
            self._pool.close()
        except BaseException:  # Ctrl-C while the last job runs
            self.stopping.set()
            self._pool.close()
            raise
        if error is None:
            self._raise_first()
