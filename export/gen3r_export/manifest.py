"""plans.json: what every exported graph of a folder is, where it runs and how well it was checked.

    {"schema": 1, "model": "...", "entries": [{"name": "vae_decoder_next", "format": "onnx", ...}]}

Each entry's files lie in a folder of their own beside plans.json, which is named by their content
and never changed (see `gen3r_export.files`): whoever holds a manifest holds names of whole files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gen3r_export.graph import DTYPES, DimRange, TensorSpec

SCHEMA = 1
FILE = "plans.json"
DEVICES = ("any", "cpu", "cuda")
AXIS = re.compile(r"(?:[1-9]\d*\*)?([^\W\d]\w*)(?:\+\d+)?")  # "k", "2*batch", "4*k+1"
AGAIN = "export again into the folder, or take its plans.json from where it was made"


@dataclass(frozen=True)
class FileFacts:
    """A file's size in bytes and the sha256 of its content."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Gpu:
    """What a plan was built for: compute capability ("89"), and the GPU's name where it matters."""

    capability: str
    name: str | None = None

    def __str__(self) -> str:
        return f"sm_{self.capability}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True)
class Entry:
    """One exported graph in one format.

    Parameters
    ----------
    name, part, form : as `Graph`. component : of the checkpoint that its weights belong to.
    format : ``onnx``, ``tensorrt`` or ``aoti``. precision : as `ExportConfig`.
    folder : beside plans.json, where the files lie. files : by name, the one to open first.
    inputs, outputs, dims : as `Graph`.
    height, width : pixels. frames, batch : least and most.
    device : where it runs: ``cpu``, ``cuda`` or ``any``.
    gpu : what it was built for; None: for any of its device.
    versions : of the libraries that made it. weights : `weights.component_hash`.
    errors, checked, seconds, facts : as `Exported`.
    """

    name: str
    part: str
    form: str
    component: str
    format: str
    precision: str
    folder: str
    files: Mapping[str, FileFacts]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, DimRange]
    height: int
    width: int
    frames: tuple[int, int]
    batch: tuple[int, int]
    device: str
    gpu: Gpu | None
    versions: Mapping[str, str]
    weights: str
    errors: Mapping[str, float] = field(default_factory=dict)
    checked: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def main_file(self) -> str:
        """The file to open."""
        return next(iter(self.files))

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def key(self) -> tuple[object, ...]:
        """What a later export replaces: the same graph, format, precision, shape and GPU."""
        capability = None if self.gpu is None else self.gpu.capability
        shape = (self.height, self.width, self.frames, self.batch)
        return (self.name, self.form, self.format, self.precision, shape, self.device, capability)

    def __str__(self) -> str:
        where = "" if self.gpu is None else f" for {self.gpu}"
        return f"{self.name} ({self.format} {self.precision}{where})"

    def shape_text(self) -> str:
        """Frames, pixels and batch in words."""

        def counts(least: int, most: int) -> str:
            return f"{least}" if least == most else f"{least} to {most}"

        return (
            f"{counts(*self.frames)} frames of {self.height} x {self.width}, "
            f"{counts(*self.batch)} at once"
        )


@dataclass(frozen=True)
class Manifest:
    """All entries of a folder. model : name of the checkpoint exported last."""

    model: str = ""
    entries: tuple[Entry, ...] = ()

    def merged(self, entries: Iterable[Entry], model: str | None = None) -> Manifest:
        """With these entries, each in the place of the one of its key, if there was one."""
        found = {entry.key: entry for entry in (*self.entries, *entries)}
        return replace(
            self, model=self.model if model is None else model, entries=tuple(found.values())
        )

    def to_json(self) -> str:
        """The text of plans.json."""
        entries = [_plain(asdict(entry)) for entry in self.entries]
        return json.dumps({"schema": SCHEMA, "model": self.model, "entries": entries}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises
    ------
    ValueError : no plans.json there, or one that is broken or of another schema; one line.
    """
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {FILE}; give a folder that gen3r-engine export wrote"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {AGAIN}") from None
    return parse_manifest(text, str(path))


def parse_manifest(text: str, name: str = FILE) -> Manifest:
    """The manifest in a text; `name` stands in messages. ValueError as `read_manifest`."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}); {AGAIN}") from None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"{name} has schema {schema!r}, this version reads {SCHEMA}; export again, or use the "
            "version of gen3r-engine that wrote it"
        )
    try:
        model = _typed(raw, "model", str)
        entries = tuple(_entry(item) for item in _typed(raw, "entries", list))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name} is broken: {reason}; {AGAIN}") from None
    return Manifest(model, entries)


_KINDS: dict[str, type] = {
    **dict.fromkeys(("name", "part", "form", "component", "format", "precision"), str),
    **dict.fromkeys(("folder", "device", "weights"), str),
    **dict.fromkeys(("files", "dims", "versions", "errors", "checked", "seconds", "facts"), dict),
    **dict.fromkeys(("inputs", "outputs", "frames", "batch"), list),
    **dict.fromkeys(("height", "width"), int),
}


def _typed(values: Any, key: str, kind: type) -> Any:
    """values[key] if it is of the kind. KeyError, TypeError."""
    if not isinstance(values, dict):
        raise TypeError(f"{str(values)[:40]!r} stands where an object must be")
    value = values[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{key} is {str(value)[:40]!r}, not of type {kind.__name__}")
    return value


def _entry(raw: Any) -> Entry:
    values = {key: _typed(raw, key, kind) for key, kind in _KINDS.items()}
    if values["device"] not in DEVICES:
        raise ValueError(f"device is {values['device']!r}; known: {', '.join(DEVICES)}")
    names = [values["folder"], *values["files"]]
    for name in names:
        # A manifest comes from elsewhere: it shall name nothing outside its own folder.
        if not name or "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError(f"{name!r} is no plain name of a file or folder")
    if not values["files"]:
        raise ValueError(f"entry {values['name']} has no files")
    gpu = raw["gpu"]
    known = {f.name for f in fields(Entry)}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} is unknown")
    dims = {
        name: DimRange(*(_typed(dim, key, int) for key in ("least", "best", "most")))
        for name, dim in values["dims"].items()
    }
    values.update(
        files={
            name: FileFacts(_typed(facts, "bytes", int), _typed(facts, "sha256", str))
            for name, facts in values["files"].items()
        },
        inputs=tuple(_spec(item, dims) for item in values["inputs"]),
        outputs=tuple(_spec(item, dims) for item in values["outputs"]),
        dims=dims,
        frames=_pair(values, "frames"),
        batch=_pair(values, "batch"),
        gpu=None if gpu is None else Gpu(_typed(gpu, "capability", str), gpu.get("name")),
    )
    return Entry(**values)


def _spec(raw: Any, dims: Mapping[str, DimRange]) -> TensorSpec:
    shape = _typed(raw, "shape", list)
    if any(isinstance(n, bool) or not isinstance(n, (int, str)) for n in shape):
        raise TypeError(f"shape {shape} holds more than numbers and names")
    for text in (n for n in shape if isinstance(n, str)):
        found = AXIS.fullmatch(text)
        if found is None or found[1] not in dims:
            raise ValueError(f"axis '{text}' is none of its dims: {', '.join(dims) or 'none'}")
    dtype = _typed(raw, "dtype", str)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    return TensorSpec(_typed(raw, "name", str), tuple(shape), dtype)


def _pair(values: dict[str, Any], key: str) -> tuple[int, int]:
    pair = values[key]
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in pair):
        raise TypeError(f"{key} is {pair}, not two whole numbers")
    return pair[0], pair[1]


def _plain(value: Any) -> Any:
    """JSON values of a dataclass as a dict; numbers that JSON does not have become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
