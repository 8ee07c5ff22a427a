"""Checkpoints that are whole or not there: OUTPUT/checkpoints/step-00000123/.

torch.distributed.checkpoint writes the tensors (each rank its shards, `*.distcp`, with their index
in `.metadata`), so that another number of ranks can load them; ``state.json`` holds everything else
and the size and CRC-32 of each file. All of it is written into a hidden folder beside the target,
synced to the disk and renamed. One process at a time writes into a folder (`gen3r_training.resume`
holds a lock), so hidden folders found at the start were left by dead ones.

`.metadata` is a pickle: resume only from checkpoints that you trust.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gen3r_training.agreement import from_all, on_all, on_main
from gen3r_training.stopping import TrainingError, is_full
from gen3r_training.summed_files import SummedFiles, crc32_of, sync_folder

if TYPE_CHECKING:
    from gen3r_training.parallel import Parallel

STATE = "state.json"
RNG = "rng."  # tensors that each rank has its own of
_SLACK = 64 << 20  # bytes beside the tensors: index, state.json, the file system's own


def folder_name(step: int) -> str:
    """The name of the checkpoint after `step` finished steps."""
    return f"step-{step:08d}"


def found(root: Path) -> dict[int, Path]:
    """Finished steps to folder of the checkpoints in `root`, oldest first."""
    if not root.is_dir():
        return {}
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in root.iterdir())
    return dict(sorted((int(m[1]), path) for m, path in matches if m and path.is_dir()))


def remove_leftovers(root: Path) -> int:
    """Remove what dead writers left half written or half removed; returns how many."""
    hidden = [p for p in root.glob(".step-*") if p.is_dir()] if root.is_dir() else []
    for path in hidden:
        shutil.rmtree(path)
    return len(hidden)


# ------------------------------------------------------------------------------------------ writing


def stored_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that a checkpoint of these tensors takes, those of all ranks together."""
    return sum(t.numel() * t.element_size() for t in tensors.values()) + _SLACK


def require_room(root: Path, needed: int, parallel: Parallel) -> None:
    """Raise `TrainingError` on every rank when the disk of `root` has less than `needed` bytes."""

    def look() -> None:
        free = shutil.disk_usage(root).free
        if free < needed:
            raise OSError(f"the disk is full: {_room(root, needed)}")

    on_main(parallel, "no checkpoint could be saved", look)


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],  # plain ones alike on all ranks, or DTensors; `rng.*` per rank
    state: Mapping[str, Any],
    parallel: Parallel,
    keep: int,
) -> Path:
    """Write the checkpoint after `step` finished steps and keep the newest `keep`. Collective.

    Raises
    ------
    TrainingError : it could not be written; on every rank, and earlier checkpoints are untouched.
    """
    target, hidden = root / folder_name(step), root / f".{folder_name(step)}.partial"
    needed, files = stored_bytes(tensors), SummedFiles()
    what = f"checkpoint {target.name} was not saved"

    def make() -> None:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        if shutil.disk_usage(root).free < needed:
            raise OSError(f"the disk is full: {_room(root, needed)}")

    def write() -> list[dict[str, dict[str, Any]]]:
        try:
            writer = dcp.FileSystemWriter(hidden)
            writer.fs = files
            with _single_process_is_meant():
                dcp.save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # on all ranks, whichever failed
            if parallel.agree(is_full(files.error)):
                raise OSError(f"the disk is full: {_room(root, needed)}") from error
            raise
        return from_all(files.written)

    def publish() -> None:
        sums = {name: entry for rank in written for name, entry in rank.items()}
        text = json.dumps({**state, "step": step, "files": sums}, indent=1)
        with open(hidden / STATE, "w", encoding="utf-8") as stream:
            stream.write(text + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        sync_folder(hidden)
        os.rename(hidden, target)
        sync_folder(root)

    try:
        on_main(parallel, what, make)
        written = on_all(what, write)
        on_main(parallel, what, publish)
    except TrainingError:
        if parallel.is_main:
            shutil.rmtree(hidden, ignore_errors=True)
        raise
    if parallel.is_main:
        _remove_old(root, keep)
    return target


def _remove_old(root: Path, keep: int) -> None:
    for path in list(found(root).values())[:-keep]:
        # Renamed first: a checkpoint that can be seen is never half removed.
        hidden = path.with_name(f".{path.name}.old")
        os.rename(path, hidden)
        shutil.rmtree(hidden)


# ------------------------------------------------------------------------------------------ reading


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint whose files all have their sizes.

    Raises
    ------
    ValueError : a file is missing, unreadable or of another size; the text names the checkpoint
        before this one.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        files = {name: int(entry["bytes"]) for name, entry in state["files"].items()}
        _ = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"{STATE} can not be read: {type(error).__name__}") from error
    for name, size in files.items():
        real = (path / name).stat().st_size if (path / name).is_file() else None
        if real != size:
            has = "is missing" if real is None else f"has {real} bytes"
            raise damaged(path, f"{name} {has}, {size} were written")
    return cast("dict[str, Any]", state)


def damaged(path: Path, what: str) -> ValueError:
    """The error for a checkpoint that can not be read. Going back by itself would lose work."""
    step = int(path.name.removeprefix("step-")) if re.fullmatch(r"step-\d+", path.name) else None
    before = [p for s, p in found(path.parent).items() if step is not None and s < step]
    mend = "there is none before it: start anew in another --output_dir"
    if before:
        mend = f"remove it and use --resume auto, which goes on from {before[-1].name} before it"
    return ValueError(f"checkpoint {path} is damaged ({what}); {mend}")


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and dtypes with the checkpoint's index.

    Raises
    ------
    ValueError : the first that differs.
    """
    own = {name: _words(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    _compare(path, own, _index(path))


def _compare(path: Path, own: Mapping[str, str], stored: Mapping[str, str]) -> None:
    for name in sorted({*own, *stored}):
        have, there = own.get(name, "absent"), stored.get(name, "absent")
        if have != there and not name.startswith(RNG):
            raise ValueError(
                f"checkpoint {path} is of another model: {name} is {there} in it and {have} here; "
                "use the model and settings that it was made with"
            )


def check_module(path: Path, module: nn.Module) -> None:
    """Compare names and shapes of a module's parameters, which may be on the meta device.

    Raises
    ------
    ValueError : the first that differs; `read_state`.
    """
    read_state(path)
    stored = {
        n: text.split(" ", 1)[1] for n, text in _index(path).items() if n.startswith("model.")
    }
    own = {f"model.{name}": f"{list(p.shape)}" for name, p in module.named_parameters()}
    _compare(path, own, stored)


def load(path: Path, tensors: Mapping[str, Tensor], parallel: Parallel) -> set[str]:
    """Fill the tensors in place; returns the names that were there. Collective.

    Only `rng.*` tensors may be absent (a run on fewer ranks made the checkpoint); they stay.

    Raises
    ------
    ValueError : a file's CRC-32 differs, or `check_tensors`; on every rank.
    """
    problem = ""
    try:
        check_tensors(path, tensors)
        _check_sums(path, parallel)
    except ValueError as error:
        problem = str(error)
    for text in filter(None, from_all(problem)):
        raise ValueError(text)
    stored = _index(path)
    wanted: dict[str, Any] = {n: t.detach() for n, t in tensors.items() if n in stored}
    with _single_process_is_meant():
        dcp.load(
            wanted,
            storage_reader=dcp.FileSystemReader(path),
            no_dist=not dist.is_initialized(),
        )
    return set(wanted)


def _index(path: Path) -> dict[str, str]:
    """Name to dtype and shape of each stored tensor."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    return {
        name: _words(entry.properties.dtype, entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _words(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _check_sums(path: Path, parallel: Parallel) -> None:
    """Each rank reads its share of the files."""
    files = sorted(read_state(path)["files"].items())
    for name, entry in files[parallel.rank :: parallel.world]:
        crc = crc32_of(path / name)
        if crc != entry["crc32"]:
            raise damaged(path, f"{name} has CRC-32 {crc}, {entry['crc32']} was written")


@contextlib.contextmanager
def _single_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _room(root: Path, needed: int) -> str:
    free = shutil.disk_usage(root).free
    return (
        f"{needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free in {root}; "
        "make room and go on with --resume auto"
    )
