"""What a running engine tells: events, and the error that names the scene it belongs to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from gen3r.run import Progress


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Parameters
    ----------
    kind : ``progress`` of a stage, a scene ``finished`` or ``failed``, the call was ``cancelled``.
    index : position of the scene in the list of requests; of a batch, the first one's.
    stage : name of the stage, "" where there is none.
    done, total : parts of the stage (denoising: steps).
    """

    kind: str
    index: int
    stage: str = ""
    done: int = 0
    total: int = 0


OnEvent = Callable[[Event], None]


class SceneError(RuntimeError):
    """A request that could not be carried out; the cause is the error behind it.

    Parameters
    ----------
    indices : positions of the requests that were worked on together.
    stage : what was being done.
    """

    def __init__(self, indices: tuple[int, ...], stage: str, cause: BaseException) -> None:
        self.indices, self.stage = indices, stage
        listed = ", ".join(map(str, indices))
        name = f"request {listed}" if len(indices) == 1 else f"requests {listed} (one batch)"
        super().__init__(f"{name} failed while '{stage}' ran: {type(cause).__name__}: {cause}")


class Reporter:
    """Passes events on, one at a time, whichever thread they come from."""

    def __init__(self, progress: Progress | None = None, on_event: OnEvent | None = None) -> None:
        self.progress, self.on_event = progress, on_event
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return self.progress is not None or self.on_event is not None

    def tell(self, event: Event) -> None:
        """Call whoever listens."""
        with self._lock:
            if self.on_event is not None:
                self.on_event(event)
            if self.progress is not None and event.kind == "progress":
                self.progress(event.stage, event.done, event.total)

    def of(self, index: int) -> Progress:
        """The stage reports of one batch as events."""
        return lambda stage, done, total: self.tell(Event("progress", index, stage, done, total))
