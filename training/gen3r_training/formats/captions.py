"""Captions by scene, from a JSON or CSV file or a folder of text files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Captions = Mapping[str, tuple[str, ...]]

_SCENE = ("scene", "name", "id", "key")
_PROMPT = ("prompt", "caption", "text")


def read_captions(path: Path) -> Captions:
    """The captions of every scene, by the scene's name; one or several each.

    FILE.json : {SCENE: "text" or ["text", ...]}, or [{"scene": ..., "prompt": ...}, ...]
    FILE.csv : columns scene and prompt; a scene may have several rows
    FOLDER : SCENE.txt, one caption a line

    Raises
    ------
    ValueError : another form, or no caption at all. OSError : it cannot be read.
    """
    if path.is_dir():
        found = _of_folder(path)
    elif path.suffix.lower() == ".json":
        found = _of_json(path)
    elif path.suffix.lower() == ".csv":
        found = _of_csv(path)
    else:
        raise ValueError(f"{path} is neither a .json or .csv file nor a folder of .txt files")
    captions = {name: lines for name, lines in found.items() if lines}
    if not captions:
        raise ValueError(f"{path} holds no caption")
    return captions


def caption_of(captions: Captions, keys: Iterable[str]) -> tuple[str, ...]:
    """The captions under the first of `keys` that has any; empty when none has."""
    return next((captions[key] for key in keys if key in captions), ())


def _of_folder(path: Path) -> dict[str, tuple[str, ...]]:
    return {
        file.stem: _lines(file.read_text(encoding="utf-8").splitlines())
        for file in sorted(path.glob("*.txt"))
    }


def _of_json(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict):
        return {str(name): _lines(_texts(value, path)) for name, value in content.items()}
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        return _of_rows(content, path)
    raise ValueError(f'{path} must hold {{"SCENE": "prompt"}} or [{{"scene": .., "prompt": ..}}]')


def _of_csv(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _of_rows(list(csv.DictReader(file)), path)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not CSV: {error}") from error


def _of_rows(rows: list[dict[str, Any]], path: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(rows, 1):
        name = next((row[key] for key in _SCENE if row.get(key)), None)
        text = next((row[key] for key in _PROMPT if key in row), None)
        if name is None or text is None:
            raise ValueError(f"{path}: row {number} has no scene and prompt; name the columns so")
        found[str(name)] = found.get(str(name), ()) + _lines(_texts(text, path))
    return found


def _texts(value: object, path: Path) -> list[str]:
    texts: list[object] = value if isinstance(value, list) else [value]
    plain = [text for text in texts if isinstance(text, str)]
    if len(plain) != len(texts):
        raise ValueError(f"{path}: the caption {value!r:.80} is neither a text nor a list of texts")
    return plain


def _lines(texts: Iterable[str]) -> tuple[str, ...]:
    """Each caption on one line, the form of prompt.txt; empty ones go."""
    return tuple(line for line in (" ".join(text.split()) for text in texts) if line)
