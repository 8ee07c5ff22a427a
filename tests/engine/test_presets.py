"""Presets and tiers per GPU: which row is taken, and what is refused with which advice."""

from __future__ import annotations

import pytest
import torch

from gen3r.precision import EXACT, FP8
from gen3r_engine.config import PRESETS, TIERS, EngineConfig
from gen3r_engine.presets import (
    ROWS,
    TIER_NEEDS,
    DeviceFacts,
    choose_tier,
    device_facts,
    presets_here,
    resolve,
    tier_need,
)

EXACT_CONFIG, FP8_CONFIG = EngineConfig(), EngineConfig(preset="fp8")
H100 = ("NVIDIA H100 80GB HBM3", (9, 0), 79.1)


@pytest.mark.parametrize(
    ("name", "capability", "row"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100"),
        ("NVIDIA H200", (9, 0), "H200"),
        ("NVIDIA H20", (9, 0), "H20"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "A100"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "Ada"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "Blackwell"),
        ("NVIDIA GeForce RTX 3090", (8, 6), "other GPUs with bfloat16"),
    ],
)
def test_rows_of_exact(name: str, capability: tuple[int, int], row: str) -> None:
    choice = resolve(EXACT_CONFIG, name, capability, 80.0)
    assert (choice.gpu, choice.precision, choice.dtype) == (row, EXACT, "bfloat16")


def test_rows_of_fp8() -> None:
    assert resolve(FP8_CONFIG, *H100).precision == FP8
    for name, capability in (("NVIDIA RTX 6000 Ada", (8, 9)), ("NVIDIA RTX 5090", (12, 0))):
        precision = resolve(FP8_CONFIG, name, capability, 40.0).precision
        # Hopper's kernels are left out, nothing else.
        assert (precision.linears, precision.scores, precision.fused_ffn) == ("fp8", "bf16", False)


@pytest.mark.parametrize(
    ("config", "device", "parts"),
    [
        (FP8_CONFIG, ("NVIDIA A100", (8, 0), 39.0), ("capability 8.9", "use preset 'exact'")),
        (FP8_CONFIG, (), ("'exact'", "device 'cpu'")),
        (EXACT_CONFIG, ("Tesla T4", (7, 5), 15.0), ("capability 8.0", "'float32'")),
        (EngineConfig(preset="fp8", dtype="float32"), H100, ("'bfloat16'", "'exact'")),
    ],
)
def test_refusals_say_what_works(
    config: EngineConfig, device: tuple[str, tuple[int, int], float], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="preset") as error:
        resolve(config, *device)
    assert all(part in str(error.value) for part in parts)


def test_cpu() -> None:
    choice = resolve(EXACT_CONFIG)
    assert (choice.gpu, choice.residency, choice.dtype) == ("cpu", "resident", "float32")
    assert choice.budget_gib is None
    asked = EngineConfig(preset="fp8", device="cpu")
    assert resolve(asked).precision == FP8
    assert presets_here(None) == ["exact"]
    assert presets_here((8, 0)) == ["exact"] and presets_here((9, 0)) == list(PRESETS)


def test_dtype_and_attention_are_the_persons() -> None:
    choice = resolve(EngineConfig(dtype="float32", attention="sdpa"), *H100)
    assert (choice.dtype, choice.attention) == ("float32", "sdpa")
    old = resolve(EngineConfig(dtype="float32"), "Tesla T4", (7, 5), 80.0)
    assert old.gpu == "Tesla T4"


def test_tiers_by_memory() -> None:
    assert [choose_tier("auto", gib) for gib in (79.0, 23.3, 11.6)] == list(TIERS)
    assert choose_tier("12gb", 79.0) == "12gb"
    assert choose_tier("auto", None) == "resident" and choose_tier("24gb", None) == "24gb"
    assert tier_need("24gb", "float32") == 2 * TIER_NEEDS["24gb"].gib
    # A small model fits a small card.
    assert choose_tier("auto", 2.0, model_gib=0.05) == "resident"
    assert resolve(EXACT_CONFIG, "NVIDIA L4", (8, 9), 3.0, model_gib=0.05).residency == "resident"


def test_budget_is_the_smaller_of_free_and_allowed() -> None:
    assert resolve(EngineConfig(max_memory_gib=23), *H100).residency == "24gb"
    assert resolve(EngineConfig(max_memory_gib=90), *H100).budget_gib == 79.1


def test_too_little_memory_says_what_fits() -> None:
    with pytest.raises(ValueError, match="use residency '24gb'"):
        resolve(EngineConfig(residency="resident", max_memory_gib=24), *H100)
    with pytest.raises(ValueError, match=r"smallest tier, '12gb'.*--max-memory"):
        resolve(EngineConfig(), "NVIDIA L4", (8, 9), 6.0)


def test_every_preset_has_rows_and_needs_shrink() -> None:
    assert {row.preset for row in ROWS} == set(PRESETS)
    needs = [TIER_NEEDS[tier].gib for tier in TIERS]
    assert needs == sorted(needs, reverse=True)


def test_device_facts_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_facts(EngineConfig()) == DeviceFacts(torch.device("cpu"))
    with pytest.raises(ValueError, match="finds no CUDA GPU"):
        device_facts(EngineConfig(device="cuda"))


def test_device_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("is_available", True),
        ("device_count", 1),
        ("current_device", 0),
        ("mem_get_info", (60 * 2**30, 80 * 2**30)),
        ("get_device_name", "NVIDIA H100"),
        ("get_device_capability", (9, 0)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    facts = device_facts(EngineConfig())
    assert (str(facts.device), facts.free_gib, facts.capability) == ("cuda:0", 60.0, (9, 0))
    with pytest.raises(ValueError, match="there are 1 GPUs"):
        device_facts(EngineConfig(device="cuda:1"))
