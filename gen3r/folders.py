"""Result folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class PendingFolder:
    """`path` is the temporary folder inside the `with` block and the final one after it."""

    path: Path


@contextlib.contextmanager
def whole_folder(parent: Path, name: str, *, numbered: bool = False) -> Iterator[PendingFolder]:
    """A folder parent/name that appears whole or not at all.

    The block fills a temporary folder beside the target, which is renamed at the end. On any error,
    Ctrl-C included, the temporary folder goes, and so do parents that were made for it.

    Parameters
    ----------
    numbered : when `name` is taken, use name-2, name-3, ... instead of raising.

    Raises
    ------
    FileExistsError : the folder exists and `numbered` is off.
    """
    target = parent / name
    if not numbered:
        _refuse_existing(target)
    made = [p for p in (parent, *parent.parents) if not p.exists()]
    temporary: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
        temporary.chmod(0o755)
        pending = PendingFolder(temporary)
        yield pending
        pending.path = _publish(temporary, target, numbered)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # another process may have put something there
                folder.rmdir()
        raise


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another folder or remove it")


def _publish(temporary: Path, target: Path, numbered: bool) -> Path:
    number = 1
    while True:
        final = target if number == 1 else target.with_name(f"{target.name}-{number}")
        try:
            # One step: renaming onto a folder with something in it fails, so no result is replaced
            # even when two processes finish in the same instant.
            os.rename(temporary, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if not numbered:
                _refuse_existing(target)
                raise
            number += 1
            continue
        return final


def check_writable(folder: Path) -> None:
    """Prove that `folder` can be made and written, and leave nothing behind.

    Raises
    ------
    OSError : a parent is a file, or the nearest existing parent takes no new folder.
    """
    nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(nearest))
    os.rmdir(tempfile.mkdtemp(prefix=".write-check-", dir=nearest))
