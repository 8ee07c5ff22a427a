"""Files that a flag names and a command writes at its end: checked before minutes are spent."""

from __future__ import annotations

import os
from pathlib import Path

from gen3r.folders import check_writable
from gen3r_engine.cli.errors import UsageError, user_input


def check_file(flag: str, path: Path | None) -> None:
    """UsageError where `write_file` would fail; None is not written.

    Folders are proved to be writable and not made yet, an existing file is left as it is.
    """
    if path is None:
        return
    if path.is_dir():
        raise UsageError(f"{flag} {path} is a folder; give a file")
    with user_input(f"{flag} {path} can not be written", (OSError,)):
        check_writable(path.parent)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError("the file is read-only")


def check_picture(flag: str, path: Path | None) -> None:
    """`check_file`, and a suffix that a picture can be written by."""
    if path is None:
        return
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise UsageError(f"{flag} {path}: '{path.suffix}' is no kind of picture; use .png")
    check_file(flag, path)


def write_file(flag: str, path: Path, text: str) -> None:
    """Write the text, and the folders that it lies in. UsageError where that fails."""
    with user_input(f"{flag} {path} can not be written", (OSError,)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
