"""Which weights made a latent cache: hashes of the encoders' files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

CLIP_MODULES = ("wan_vae", "geo_adapter", "vggt", "clip_image_encoder")
TEXT_MODULES = ("text_encoder", "tokenizer")
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


def fingerprints(places: Mapping[str, Path], names: Collection[str]) -> dict[str, str]:
    """sha256 of some modules by the contents of their files (weights and config, or tokenizer).

    Reads every byte: about ten seconds for the whole model when it is in the page cache.

    Raises
    ------
    ValueError : a module that is not among the places, or has no files. OSError : one cannot be
        read.
    """
    found: dict[str, str] = {}
    for name in names:
        if name not in places:
            raise ValueError(f"no folder is known for {name}")
        files = _files_of(name, places[name])
        if not files:
            raise ValueError(f"{name}: there are no weights in {places[name]}")
        whole = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        found[name] = whole.hexdigest()
    return found


def _files_of(name: str, place: Path) -> list[Path]:
    """The files that decide what a module computes, in the order of their names."""
    folder = place.parent if place.is_file() else place
    present = sorted(path for path in folder.glob("*") if path.is_file())
    if name == "tokenizer":
        return present
    weights = [place] if place.is_file() else [p for p in present if p.suffix in WEIGHTS]
    config = [p for p in present if p.name == "config.json"]
    return [*config, *weights] if weights else []
