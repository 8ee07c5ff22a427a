"""The order of the stages over many batches: one after the other, or side by side in threads.

Side by side, with batches a, b, c:

    denoising    |  a denoise  |  b denoise  |  c denoise  |
    beside it    e(a)  e(b)    | e(c)  d(a)  |  d(b)       | d(c)
    host               |       |       f(a)  |       f(b)  |    f(c)      finished scenes

e encodes, d decodes, f finishes (waits for the copies, builds the scene). The next batch is encoded
before the last one is decoded: the denoising loop never waits for it. At most `WAITING` batches are
denoised or waiting to be taken, so a slow reader holds up the loop and not the memory.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gen3r.scene import Scene
from gen3r_engine.denoiser import Cancelled
from gen3r_engine.memory import OutOfMemory
from gen3r_engine.scene_batches import Batch, Decoded, Encoded, Sampling
from gen3r_engine.scene_stages import SceneStages

WAITING = 2
POLL_SECONDS = 0.05


class Flow:
    """One call's batches through the stages.

    Parameters
    ----------
    retry : a batch that runs out of memory is tried again in two halves, once.
    release_first : free the loop's graph and buffers before decoding (there is room for one).
    stop : set to end the call; the loop then raises `Cancelled` within a step.
    """

    def __init__(
        self,
        stages: SceneStages,
        sampling: Sampling,
        stop: threading.Event,
        *,
        retry: bool,
        release_first: bool = False,
    ) -> None:
        self.stages, self.sampling, self.stop = stages, sampling, stop
        self.retry, self.release_first = retry, release_first
        self.halt = threading.Event()  # set when a scene failed behind the loop

    def stopped(self) -> bool:
        """Whether the loop shall not go on."""
        return self.stop.is_set() or self.halt.is_set()

    def in_order(self, batches: Sequence[Batch]) -> Generator[Scene, None, None]:
        """Scene after scene, nothing beside anything."""
        todo = deque(batches)
        while todo:
            batch = todo.popleft()
            joint = self._trying(todo, batch, partial(self.stages.encode, batch, self.sampling))
            if joint is None:
                continue
            if self.release_first:
                self.stages.denoiser.release()
            for row in range(len(batch.requests)):
                self._check()
                yield self.stages.finish(self.stages.decode(batch, row, joint, self.sampling))

    def beside(self, batches: Sequence[Batch]) -> Generator[Scene, None, None]:
        """Scenes in order as they finish, later ones being worked on meanwhile.

        Closing the iterator stops the work and waits until it has stopped.
        """
        threads = _Threads(self, batches)
        try:
            yield from threads.scenes()
        finally:
            self.stop.set()
            threads.join()

    def _check(self) -> None:
        if self.stopped():
            raise Cancelled("stopped between two stages")

    def _trying(
        self, todo: deque[Batch], batch: Batch, encode: Callable[[], Encoded]
    ) -> Tensor | None:
        """Joint latents of a batch; None when its halves were put in front of `todo` instead."""
        try:
            self._check()
            encoded = encode()
            self._check()
            return self.stages.denoise(batch, encoded, self.sampling, self.stopped)
        except (OutOfMemory, torch.cuda.OutOfMemoryError):
            if not self.retry or batch.half or len(batch.requests) == 1:
                raise
        # Outside the handler: the error's frames hold the tensors that were too many.
        self.stages.denoiser.release()
        todo.extendleft(reversed(batch.halves()))
        return None


class _Threads:
    """The threads of one `Flow.beside`: the loop, the stages beside it, the host."""

    def __init__(self, flow: Flow, batches: Sequence[Batch]) -> None:
        self.flow, self.stages, self.sampling = flow, flow.stages, flow.sampling
        self.results: queue.SimpleQueue[Scene | BaseException | None] = queue.SimpleQueue()
        self.room = threading.Semaphore(WAITING)
        self.left: dict[int, int] = {}  # scenes not yet taken, by their batch's first index
        self.side = ThreadPoolExecutor(1, "gen3r-beside")
        self.host = ThreadPoolExecutor(1, "gen3r-host")
        # A daemon: a program that drops the iterator half-way must still be able to end.
        self.loop = threading.Thread(
            target=self._run, args=(batches,), name="gen3r-denoise", daemon=True
        )
        self.loop.start()

    def scenes(self) -> Generator[Scene, None, None]:
        """Finished scenes, then the error if there was one."""
        while (item := self.results.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            first = next(key for key in sorted(self.left, reverse=True) if key <= _index(item))
            self.left[first] -= 1
            if self.left[first] == 0:
                self.room.release()
            yield item

    def join(self) -> None:
        """Wait for all threads; what has not begun does not begin."""
        self.loop.join()
        self.side.shutdown(wait=True, cancel_futures=True)
        self.host.shutdown(wait=True, cancel_futures=True)

    def _run(self, batches: Sequence[Batch]) -> None:
        error: BaseException | None = None
        finishing: list[Future[None]] = []
        try:
            self._denoise_all(deque(batches), finishing)
        except BaseException as caught:
            error = caught
        # A scene that failed is why the loop was stopped: its error is the one to tell.
        for future in finishing:
            error = future.exception() or error
        self.results.put(error)

    def _denoise_all(self, todo: deque[Batch], finishing: list[Future[None]]) -> None:
        following: tuple[Batch, Future[Encoded]] | None = None
        decode: Callable[[], None] = _nothing
        try:
            while todo:
                self.flow._check()
                batch = todo.popleft()
                if following is None or following[0] is not batch:
                    following = batch, self._encode(batch)
                encoded = following[1]
                following = None
                self._wait_for_room()
                encoded.exception()  # wait: its successor is put behind it
                if todo:
                    following = todo[0], self._encode(todo[0])
                decode()
                decode = _nothing
                joint = self.flow._trying(todo, batch, encoded.result)
                del encoded
                if joint is None:
                    self.room.release()
                    continue
                self.left[batch.indices[0]] = len(batch.indices)
                decode = self._decoding(batch, joint, finishing)
                del joint
        finally:
            decode()

    def _encode(self, batch: Batch) -> Future[Encoded]:
        return self.side.submit(self.stages.encode, batch, self.sampling)

    def _wait_for_room(self) -> None:
        while not self.room.acquire(timeout=POLL_SECONDS):
            self.flow._check()

    def _decoding(
        self, batch: Batch, joint: Tensor, finishing: list[Future[None]]
    ) -> Callable[[], None]:
        """Queues the decoding of a batch when called."""

        def decode(row: int) -> None:
            if not self.flow.stopped():
                decoded = self.stages.decode(batch, row, joint, self.sampling)
                finishing.append(self.host.submit(self._guarded, self._finish, decoded))

        def queue_all() -> None:
            for row in range(len(batch.requests)):
                finishing.append(self.side.submit(self._guarded, decode, row))

        return queue_all

    def _finish(self, decoded: Decoded) -> None:
        # Not `stopped`: a later scene's failure does not take this one away.
        if not self.flow.stop.is_set():
            self.results.put(self.stages.finish(decoded))

    def _guarded(self, work: Callable[..., None], *arguments: Any) -> None:
        """Run a job; its error stops the loop."""
        try:
            work(*arguments)
        except BaseException:
            self.flow.halt.set()
            raise


def _index(scene: Scene) -> int:
    return int(scene.info["index"])


def _nothing() -> None:
    return None
