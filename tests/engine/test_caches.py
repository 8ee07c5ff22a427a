"""The cache folder: where it is, files that appear whole, warm and cold."""

from __future__ import annotations

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gen3r_engine import caches
from gen3r_engine.caches import VARIABLES, CacheFolder, WarmKey, default_folder, write_whole

KEY = WarmKey("NVIDIA H100", "exact", "bfloat16", "auto", 49, 560, 560, 1, "gen3r")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CacheFolder:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what the test sets
        monkeypatch.delenv(name)
    return CacheFolder.of(tmp_path / "cache")


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "gen3r-engine" == CacheFolder.of(None).root
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_folder() == Path.home() / ".cache" / "gen3r-engine"


def test_compiled_code_goes_into_the_folder(folder: CacheFolder) -> None:
    places = folder.use_for_compiling()
    assert {name: os.environ[name] for name in VARIABLES} == {k: str(v) for k, v in places.items()}
    assert all(p.is_dir() and folder.root in p.parents for p in places.values())


def test_a_persons_variables_are_respected(
    folder: CacheFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    assert folder.use_for_compiling()["TRITON_CACHE_DIR"] == tmp_path / "mine"


def test_warm_and_cold(folder: CacheFolder) -> None:
    places = folder.use_for_compiling()
    assert folder.warm(KEY) is None
    path = folder.mark_warm(KEY, {"compile_seconds": 61.0})
    assert folder.warm(KEY) is None  # nothing was compiled into the folder
    for place in places.values():
        (place / "code").write_text("x")
    assert folder.warm(KEY) == {"compile_seconds": 61.0}
    assert folder.warm(dataclasses.replace(KEY, batch=2)) is None
    assert set(json.loads(path.read_text())["key"]["versions"]) >= {"torch", "triton"}
    path.write_text('{"key"')
    assert folder.warm(KEY) is None


def test_other_versions_are_cold(folder: CacheFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in folder.use_for_compiling().values():
        (place / "code").write_text("x")
    folder.mark_warm(KEY, {})
    installed = caches.versions()
    monkeypatch.setattr(caches, "versions", lambda: {**installed, "torch": "9.9"})
    assert folder.warm(KEY) is None


def test_elsewhere_is_cold(folder: CacheFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in folder.use_for_compiling().values():
        (place / "code").write_text("x")
    folder.mark_warm(KEY, {})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder.root))
    assert folder.warm(KEY) is None


def test_files_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "new" / "entry"
    write_whole(target, b"first")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(caches.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, b"second")
    assert target.read_bytes() == b"first"
    assert [p.name for p in target.parent.iterdir()] == ["entry"]


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    target = tmp_path / "entry"
    contents = [bytes([i]) * 10_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda data: write_whole(target, data), contents * 4))
    assert target.read_bytes() in contents and len(list(tmp_path.iterdir())) == 1


def test_compiler_is_imported_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(caches.importlib, "import_module", asked.append)
    caches.preload_compiler().join()
    assert asked == list(caches.COMPILER_MODULES)
