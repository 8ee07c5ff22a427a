"""What all ranks do together: an action that fails on one of them fails on all, alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from gen3r_training.stopping import TrainingError

if TYPE_CHECKING:
    from gen3r_training.parallel import Parallel

_T = TypeVar("_T")


def on_all(what: str, action: Callable[[], _T]) -> _T:
    """Run `action`; when it fails on any rank, every rank raises `TrainingError`. Collective.

    The error's text is `what`, what could not be done, and the reason of the first rank that has
    one.
    """
    error: BaseException | None = None
    result: _T | None = None
    try:
        result = action()
    except (Exception, CheckpointException) as caught:  # the latter is a BaseException
        error = caught
    reasons = [text for text in from_all("" if error is None else _first_line(error)) if text]
    if reasons:
        raise TrainingError(f"{what}: {reasons[0]}") from error
    return cast(_T, result)


def on_main(parallel: Parallel, what: str, action: Callable[[], None]) -> None:
    """`on_all` of something that only the main rank does; the others wait for it."""
    on_all(what, action if parallel.is_main else lambda: None)


def from_all(value: _T) -> list[_T]:
    """Every rank's value, in the order of the ranks. Collective."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # its text is every rank's traceback
        error = next(iter(error.failures.values()))[0]
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"
