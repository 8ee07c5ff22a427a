"""Packed clips on disk: FOLDER/SPLIT-00000.safetensors, ... of about 1 GB each.

A shard holds the tensors of `Clips` by their names; its header's entry "clips" is JSON with
captions, moves and parts ([name, color, kind] each), a clip a row, and "recipe" is JSON with what
the set was made from. A set replaces an older one when all of it is written.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gen3r_training.procedural.captions import Part
from gen3r_training.procedural.clips import TENSORS, Clips

FORMAT = "gen3r-clips-1"
SHARD_BYTES = 10**9
_NAME = re.compile(r"(?P<split>[A-Za-z_]+)-(?P<number>\d{5})\.safetensors")
Recipe = Mapping[str, int | str]


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The shards of a split that are in the folder, in order."""
    found = folder.glob(f"{split}-*.safetensors") if folder.is_dir() else ()
    return sorted(p for p in found if (m := _NAME.fullmatch(p.name)) and m["split"] == split)


def clips_in_shard(frames: int, size: int) -> int:
    """Clips of one shard."""
    pixels = frames * size * size
    return max(1, SHARD_BYTES // (6 * pixels))  # three bytes of colour, two of depth, one of part


@dataclass
class ShardWriter:
    """Adds shards to a set that is being written (`writing_shards`)."""

    folder: Path
    split: str
    recipe: Recipe
    count: int = 0

    def add(self, clips: Clips) -> None:
        """Write these clips as the next shard."""
        record = {
            "captions": clips.captions,
            "moves": clips.moves,
            "parts": [[astuple(part) for part in parts] for parts in clips.parts],
        }
        metadata = {
            "format": FORMAT,
            "clips": json.dumps(record),
            "recipe": json.dumps(dict(self.recipe)),
        }
        tensors = {name: value.contiguous().cpu() for name, value in clips.tensors().items()}
        save_file(tensors, self.folder / _shard_name(self.split, self.count), metadata)
        self.count += 1


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.safetensors"


@contextlib.contextmanager
def writing_shards(folder: Path, split: str, recipe: Recipe | None = None) -> Iterator[ShardWriter]:
    """A set of shards that takes the place of the split's older one at the end of the block.

    Raises
    ------
    OSError : the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pending = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder))
    try:
        writer = ShardWriter(pending, split, recipe or {})
        yield writer
        for old in shard_paths(folder, split)[writer.count :]:
            old.unlink()
        for path in shard_paths(pending, split):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def save_clips(clips: Clips, folder: Path, split: str, recipe: Recipe | None = None) -> None:
    """Write the clips as FOLDER/SPLIT-00000.safetensors, ...; an older set of the split goes.

    recipe : what they were made from, kept for `read_recipe`

    Raises
    ------
    ValueError : no clips. OSError : the folder cannot be written.
    """
    if not len(clips):
        raise ValueError("there are no clips to save; make at least one")
    step = clips_in_shard(clips.rgb.shape[1], clips.rgb.shape[2])
    with writing_shards(folder, split, recipe) as writer:
        for start in range(0, len(clips), step):
            writer.add(clips.take(range(start, min(start + step, len(clips)))))


def read_recipe(folder: Path, split: str) -> Recipe | None:
    """What the split's set was made from; None where there is none.

    Raises
    ------
    ValueError : the first shard is damaged or of another format.
    """
    paths = shard_paths(folder, split)
    if not paths:
        return None
    with _opened(paths[0], "cpu") as file:
        recipe = json.loads(file.metadata()["recipe"])
    return dict(recipe)


def load_clips(
    folder: Path, split: str, device: torch.device | str = "cpu", limit: int | None = None
) -> Clips:
    """The first `limit` clips of a split (all of them by default), on a device.

    Raises
    ------
    ValueError : no shards, one missing between others, or one that is damaged or of another format.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} is below 1; leave it out for all clips")
    paths = shard_paths(folder, split)
    if not paths:
        raise ValueError(
            f"{folder} has no {split}-00000.safetensors; make it with: "
            f"gen3r-engine prepare procedural {folder} --scenes N --held_out K"
        )
    shards: list[Clips] = []
    left = limit
    for number, path in enumerate(paths):
        if path.stem != f"{split}-{number:05d}":
            raise ValueError(f"{folder} lacks {split}-{number:05d}.safetensors; prepare it again")
        shards.append(_load_shard(path, device, left))
        if left is not None:
            left -= len(shards[-1])
            if left <= 0:
                break
    return shards[0] if len(shards) == 1 else Clips.cat(shards)


@contextlib.contextmanager
def _opened(path: Path, device: torch.device | str) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise ValueError(f"{path} holds no {FORMAT}; prepare it again")
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); prepare it again") from error


def _load_shard(path: Path, device: torch.device | str, limit: int | None) -> Clips:
    with _opened(path, device) as file:
        tensors = {name: file.get_slice(name)[:limit] for name in TENSORS}
        record = json.loads(file.metadata()["clips"])
    count = len(tensors["rgb"])
    return Clips(
        **tensors,
        captions=tuple(record["captions"][:count]),
        parts=tuple(tuple(Part(*part) for part in parts) for parts in record["parts"][:count]),
        moves=tuple(record["moves"][:count]),
    )
