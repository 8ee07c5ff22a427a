"""EngineConfig: defaults, every bad value named, frozen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gen3r_engine.config import EngineConfig, as_config


def test_defaults_and_names() -> None:
    config = EngineConfig()
    assert (config.preset, config.residency, config.max_batch) == ("exact", "auto", 1)
    assert as_config(config) is config
    assert as_config("fp8") == EngineConfig(preset="fp8")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.preset = "fp8"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("preset", "turbo", "preset 'turbo' is unknown; known: exact, fp8"),
        ("residency", "8gb", "known: auto, resident, 24gb, 12gb"),
        ("prompt_cache", "ram", "known: memory, disk, off"),
        ("dtype", "float16", "known: bfloat16, float32"),
        ("max_batch", 0, "max_batch is 0; use a whole number, 1 or more"),
        ("max_batch", 1.5, "use a whole number"),
        ("max_batch", True, "use a whole number"),
        ("max_memory_gib", 0, "use GiB above 0"),
        ("max_memory_gib", float("nan"), "use GiB above 0"),
        ("max_memory_gib", "12", "use GiB above 0"),
        ("device", "tpu", "device 'tpu' is not supported"),
        ("device", "cuda:x", "use auto, cpu, cuda or cuda:1"),
        ("attention", "flash", "attention backend 'flash' is unknown"),
        ("compiled", "no", "use True or False"),
    ],
)
def test_bad_values_are_named(name: str, value: Any, part: str) -> None:
    with pytest.raises(ValueError, match="is") as error:
        EngineConfig(**{name: value})
    assert part in str(error.value)


def test_good_values(tmp_path: Path) -> None:
    config = EngineConfig(
        device="cuda:1",
        max_memory_gib=22,
        cache_dir=str(tmp_path),  # type: ignore[arg-type]
        attention="sdpa",
        dtype="float32",
    )
    assert config.cache_dir == tmp_path
    home = EngineConfig(cache_dir=Path("~/x")).cache_dir
    assert home is not None and home.is_absolute()
