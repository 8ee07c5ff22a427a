"""The suite `training` at the embedded model's size on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import read_rows
from benchmarks.training.suite import main

SMALL = ["--model", "nano", "--frames", "5", "--size", "112", "--repeats", "1", "--commit", "none"]


def test_rows(tmp_path: Path) -> None:
    """Both providers compute the same losses and gradient norms; stochastic rounding is told."""
    assert main([*SMALL, "--out", str(tmp_path), "--device", "cpu"]) == 0
    rows = read_rows([tmp_path])
    found = {(row["case"], row["provider"]) for row in rows if row["metric"] == "time"}
    cases = ("diffusion_step", "diffusion_step_encoded", "adapter_step", "optimizer_step")
    assert found == {(case, provider) for case in cases for provider in ("eager", "exact")}
    apart = [row["config"]["from_eager"] for row in rows if "from_eager" in row["config"]]
    assert len(apart) == 4 and max(apart) < 1e-3


def test_unknown_case() -> None:
    with pytest.raises(ValueError, match=r"no case fits \['x'\]; known: diffusion_step"):
        main([*SMALL, "--device", "cpu", "--case", "x"])
