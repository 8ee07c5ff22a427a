"""An export folder that is whole at every moment, whoever reads it and whatever interrupts.

    plans/
      plans.json
      vae_decoder.onnx-fp16.1f0c2a9b44d1/     vae_decoder.onnx
      vae_decoder_next.tensorrt-fp16.9d...    vae_decoder_next.sm89.rtx.plan

A graph is exported into a temporary folder beside these. Its folder is then named by the content of
its files and renamed into place in one step; plans.json, which names it, is replaced in one step
after that, and folders that no entry names any more go last. So plans.json names whole files only.
A reader that is slower than two replacements finds a file gone and reads plans.json again
(`gen3r_export.runtime`); files that it has open stay its own. The temporary folder goes on any
error, Ctrl-C and SIGTERM included, and what a killed process left goes at the next export.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gen3r_export.manifest import FILE, FileFacts, Manifest

TEMPORARY = ".export-"
BLOCK = 2**22  # bytes read at a time
HASH_LETTERS = 12
PUBLISHED = re.compile(rf"\w+\.(onnx|tensorrt|aoti)-\w+\.[0-9a-f]{{{HASH_LETTERS}}}")


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_facts(folder: Path, names: Iterable[str]) -> dict[str, FileFacts]:
    """Sizes and hashes of files, read side by side."""
    paths = [folder / name for name in names]
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(file_sha256, paths))
    return {
        path.name: FileFacts(path.stat().st_size, found)
        for path, found in zip(paths, hashes, strict=True)
    }


@contextlib.contextmanager
def export_folder(out: Path) -> Iterator[Path]:
    """The folder, made where it is missing, for one export at a time. It goes if it stays empty.

    Raises
    ------
    ValueError : another export is at work in it, it is a file, or it cannot be written; one line.
    """
    made = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{out} is not a folder; give another folder to export into") from None
    except OSError as error:
        raise ValueError(f"{out} cannot be made ({error.strerror}); give another folder") from None
    try:
        try:
            # Of the folder itself: the kernel drops it with the process, and no file is left.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another export is writing {out}; wait for it, or give another folder"
            ) from None
        for path in out.glob(f"{TEMPORARY}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:  # of a manifest
                path.unlink(missing_ok=True)
        yield out
    finally:
        os.close(lock)
        for path in made:
            with contextlib.suppress(OSError):  # it holds something
                path.rmdir()


@contextlib.contextmanager
def temporary_folder(out: Path) -> Iterator[Path]:
    """A folder inside `out` that is gone after the block."""
    try:
        path = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=out))
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror})") from None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def publish(folder: Path, facts: dict[str, FileFacts], out: Path, stem: str) -> str:
    """Move a temporary folder that holds just these files into `out`; its name there."""
    digest = hashlib.sha256()
    for name, file in sorted(facts.items()):
        digest.update(f"{name} {file.bytes} {file.sha256}\n".encode())
    name = f"{stem}.{digest.hexdigest()[:HASH_LETTERS]}"
    for path in folder.iterdir():
        if path.name not in facts:
            path.unlink() if not path.is_dir() else shutil.rmtree(path)
        else:
            _sync(path)
    folder.chmod(0o755)
    target = out / name
    if target.exists():
        # The same name: the same content, unless someone has been at the files since.
        with contextlib.suppress(OSError, ValueError):
            if file_facts(target, facts) == facts:
                return name
        shutil.rmtree(target)
    os.rename(folder, target)
    return name


def write_manifest(manifest: Manifest, out: Path) -> None:
    """Replace plans.json in one step."""
    handle, temporary = tempfile.mkstemp(prefix=TEMPORARY, dir=out)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(manifest.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, out / FILE)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def remove_unnamed(manifest: Manifest, out: Path) -> None:
    """Remove folders of exports that the manifest does not name; nothing else in `out` goes."""
    named = {entry.folder for entry in manifest.entries}
    for path in out.iterdir():
        if PUBLISHED.fullmatch(path.name) and path.name not in named:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
