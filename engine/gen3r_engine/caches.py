"""What stays on disk between processes: compiled code, text features, and what was warmed up.

    <folder>/compile/inductor, compile/triton    written by torch.compile and Triton
    <folder>/prompts                             see `prompts`
    <folder>/warm                                one manifest per GPU, versions, shape and preset

Nothing here changes a result: a missing or damaged entry costs time. Every file of ours appears
whole by a rename, so that processes may share the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gen3r_engine.versions import versions

# Where torch.compile and Triton put what they made; they move files, never results.
VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
# What the first torch.compile of a process imports; together about two seconds.
COMPILER_MODULES = ("torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.codecache")


def default_folder() -> Path:
    """~/.cache/gen3r-engine, or gen3r-engine in XDG_CACHE_HOME where that is an absolute path."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "gen3r-engine"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, replacing an older one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@dataclass(frozen=True)
class WarmKey:
    """What compiled code depends on. `frames`, `height`, `width`, `batch`: one denoising step."""

    gpu: str
    preset: str
    dtype: str
    attention: str
    frames: int
    height: int
    width: int
    batch: int
    model: str  # fingerprint of the transformer's configuration, or a name

    def described(self) -> dict[str, Any]:
        """The key with the versions that compiled code depends on, as plain JSON values."""
        installed = versions()
        names = ("python", "torch", "triton", "gen3r-engine")
        return {**asdict(self), "versions": {name: installed[name] for name in names}}

    def digest(self) -> str:
        """The name of the key's manifest."""
        text = json.dumps(self.described(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class CacheFolder:
    """The folder of everything kept. `root` None stands for `default_folder`."""

    root: Path

    @classmethod
    def of(cls, folder: Path | None) -> CacheFolder:
        """The folder of a config's `cache_dir`."""
        return cls(default_folder() if folder is None else folder)

    @property
    def prompts(self) -> Path:
        return self.root / "prompts"

    def use_for_compiling(self) -> dict[str, Path]:
        """Send compiled code here and return where it goes.

        Variables that are set already are respected. Call it before anything is compiled.

        Raises
        ------
        OSError : the folder can not be made.
        """
        places = {}
        for variable, name in VARIABLES.items():
            if not os.environ.get(variable):
                os.environ[variable] = str(self.root / "compile" / name)
            places[variable] = Path(os.environ[variable])
            places[variable].mkdir(parents=True, exist_ok=True)
        return places

    def mark_warm(self, key: WarmKey, facts: Mapping[str, Any]) -> Path:
        """Note that the code of `key` is compiled and kept; `facts` (seconds, say) go with it."""
        places = {name: os.environ.get(name, "") for name in VARIABLES}
        path = self._manifest(key)
        text = json.dumps(
            {"key": key.described(), "places": places, "facts": dict(facts)}, indent=1
        )
        write_whole(path, text.encode() + b"\n")
        return path

    def warm(self, key: WarmKey) -> dict[str, Any] | None:
        """The facts noted by `mark_warm`; None when nothing usable is there (the cache is cold)."""
        try:
            noted = json.loads(self._manifest(key).read_text())
            same = noted["key"] == key.described()
            facts, places = dict(noted["facts"]), dict(noted["places"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        # The person may have emptied the folder, or point elsewhere now.
        there = all(
            os.environ.get(name) == place and place and any(_entries(Path(place)))
            for name, place in places.items()
        )
        return facts if same and there else None

    def _manifest(self, key: WarmKey) -> Path:
        return self.root / "warm" / f"{key.digest()}.json"


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def preload_compiler() -> threading.Thread:
    """Import what torch.compile needs on a thread of its own, beside the loading of weights."""

    def work() -> None:
        for name in COMPILER_MODULES:
            importlib.import_module(name)

    thread = threading.Thread(target=work, name="preload compiler", daemon=True)
    thread.start()
    return thread
