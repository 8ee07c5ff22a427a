"""Wrong input told in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_LONGEST = 600  # characters; an error that lists many tensors is cut here


class UsageError(ValueError):
    """Wrong input: the command line prints its text as one line and exits with `code`."""

    def __init__(self, text: str, code: int = 2) -> None:
        super().__init__(text)
        self.code = code


def one_line(error: BaseException) -> str:
    """The error's text on one line, cut where it is very long."""
    parts = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "; ".join(parts).replace(":;", ":") or type(error).__name__
    if len(text) <= _LONGEST:
        return text
    return text[:_LONGEST].rstrip() + " ... (-v shows all of it)"


@contextlib.contextmanager
def plan_errors() -> Iterator[None]:
    """A scene that an exported plan made fail is told in one line; other failures stay errors."""
    from gen3r_engine.events import SceneError
    from gen3r_engine.planned import PlanError

    try:
        yield
    except SceneError as error:
        if not isinstance(error.__cause__, PlanError):
            raise
        raise UsageError(str(error), code=1) from error


@contextlib.contextmanager
def user_input(
    where: str = "", kinds: tuple[type[Exception], ...] = (ValueError, OSError), code: int = 2
) -> Iterator[None]:
    """Errors of these kinds inside the block are the input's, not the program's.

    `where` is put before the message (a file and line, say); the error's notes are kept.
    """
    try:
        yield
    except kinds as error:
        text = f"{where}: {error}" if where else str(error)
        told = UsageError(text or type(error).__name__, code)
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told from error
