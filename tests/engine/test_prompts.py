"""Text features by content: hits are bit for bit, and damage is a miss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gen3r_engine import prompts
from gen3r_engine.prompts import PromptCache, prompt_fingerprint

PRINT = prompt_fingerprint("abc", torch.bfloat16, 512)
FEATURES = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_memory(tmp_path: Path) -> None:
    cache = PromptCache("memory", tmp_path, PRINT)
    assert cache.get("a room") is None
    batch = torch.stack([FEATURES, FEATURES])
    cache.put("a room", batch[0])
    batch.zero_()  # the cache has its own copy
    found = cache.get("a room")
    assert found is not None and torch.equal(found, FEATURES)
    assert cache.get("a room ") is None and not entries(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_disk_is_read_by_another_cache(tmp_path: Path, dtype: torch.dtype) -> None:
    PromptCache("disk", tmp_path, PRINT).put("ein Zimmer: ü", FEATURES.to(dtype))
    found = PromptCache("disk", tmp_path, PRINT).get("ein Zimmer: ü")
    assert found is not None and found.dtype == dtype and torch.equal(found, FEATURES.to(dtype))


def test_off_keeps_nothing(tmp_path: Path) -> None:
    cache = PromptCache("off", tmp_path, PRINT)
    cache.put("a room", FEATURES)
    assert cache.get("a room") is None and not entries(tmp_path)


def test_everything_the_features_depend_on_is_in_the_key(tmp_path: Path) -> None:
    prints = {
        prompt_fingerprint("abc", torch.bfloat16, 512),
        prompt_fingerprint("abd", torch.bfloat16, 512),
        prompt_fingerprint("abc", torch.float32, 512),
        prompt_fingerprint("abc", torch.bfloat16, 64),
    }
    keys = {PromptCache("disk", tmp_path, p).key("a room") for p in prints}
    assert len(keys) == 4


@pytest.mark.parametrize("damage", ["truncated", "garbage", "changed", "of another text", "empty"])
def test_damage_is_a_miss_and_removed(tmp_path: Path, damage: str) -> None:
    PromptCache("disk", tmp_path, PRINT).put("a room", FEATURES)
    (path,) = entries(tmp_path)
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-3])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 100)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        save_file(load_file(path), path, {"key": "other"})
    cache = PromptCache("disk", tmp_path, PRINT)
    assert cache.get("a room") is None and not path.exists()
    cache.put("a room", FEATURES)
    again = PromptCache("disk", tmp_path, PRINT).get("a room")
    assert again is not None and torch.equal(again, FEATURES)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "KEPT", 2)
    cache = PromptCache("memory", None, PRINT)
    cache.put("a", FEATURES)
    cache.put("b", FEATURES)
    assert cache.get("a") is not None
    cache.put("c", FEATURES)
    assert cache.get("b") is None and cache.get("a") is not None


def test_a_full_disk_is_told_and_costs_no_scene(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompts, "write_whole", full)
    cache = PromptCache("disk", tmp_path, PRINT)
    with pytest.warns(UserWarning, match="No space left"):
        cache.put("a room", FEATURES)
    assert cache.get("a room") is not None


def test_bad_use(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known: memory, disk, off"):
        PromptCache("ram", tmp_path, PRINT)
    with pytest.raises(ValueError, match="needs a folder"):
        PromptCache("disk", None, PRINT)
    with pytest.raises(ValueError, match=r"\[n, C\]"):
        PromptCache("memory", None, PRINT).put("a", FEATURES[None])


WRITER = """
import sys, torch
from pathlib import Path
from gen3r_engine.prompts import PromptCache
features = torch.arange(4096.0).view(8, 512)
for i in range(60):
    cache = PromptCache("disk", Path(sys.argv[1]), "print")
    found = cache.get(f"text {i % 3}")
    assert found is None or torch.equal(found, features), i
    cache.put(f"text {i % 3}", features)
"""


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    running = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert len(entries(tmp_path)) == 3
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
