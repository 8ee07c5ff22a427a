"""The suite decode, small, on the CPU, with the NANO model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.decode import suite
from benchmarks.decode.cases import CASES, Problem, Setting
from benchmarks.engine.common import parser, resolve_options
from benchmarks.harness import Row, phase, read_rows
from gen3r_engine.cli import main

SMALL = ["--device", "cpu", "--model", "nano", "--frames", "5", "--size", "56"]


@pytest.fixture(autouse=True)
def _few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.CPU_SECONDS", 0.0)
    monkeypatch.setattr("benchmarks.timing.FEWEST", 1)
    monkeypatch.setattr("benchmarks.timing.FEWEST_LONG", 1)


def run(out: Path, *cases: str) -> list[Row]:
    chosen = ["--case", *cases] if cases else []
    command = ["bench", "--suite", "decode", *chosen, "--out", str(out), "--commit", "abc"]
    assert main([*command, "--", *SMALL]) == 0
    return read_rows([out])


def test_every_stage_has_rows_and_providers_agree(tmp_path: Path) -> None:
    rows = [r for r in run(tmp_path) if phase(r) == "run"]
    found = {(r["case"], r["provider"]) for r in rows if r["metric"] == "time"}
    for case in CASES:
        assert (case, "exact") in found
        # Upstream fuses on the CPU.
        assert ((case, "eager") in found) == (case != "fuse_points")
    for r in rows:
        if r["provider"] == "exact" and r["metric"] == "time" and r["case"] in CASES:
            assert r["config"].get("from_eager", 0.0) < 1e-4, r["case"]
    errors = {r["provider"]: r["p50"] for r in rows if r["metric"] == "latent_error"}
    assert set(errors) == {"mixed", "tf32"} and max(errors.values()) < 1e-5
    rates = {r["case"] for r in rows if r["metric"] == "tflops" and r["case"] in CASES}
    assert rates == set(CASES) - {"fuse_points"}


def test_counted_work_is_that_of_the_real_model() -> None:
    """Upstream's depth head 17 TFLOP; the aggregator 608 in its global attention alone."""
    real = [*SMALL[:3], "gen3r", "--dtype", "bfloat16"]
    options = resolve_options(parser("decode", None, ("eager",)).parse_args(real))
    for case, tflop in (("camera_depth_heads", 17.15), ("vggt_49", 775.4)):
        assert suite.counted_flops(case, options) == pytest.approx(tflop * 1e12, rel=1e-3)


def test_a_broken_case_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(setting: Setting) -> Problem:
        return Problem(lambda: torch.full((3,), torch.nan))

    monkeypatch.setitem(CASES, "vae_encode", nothing)
    arguments = ["--out", str(tmp_path), "--commit", "abc", "--preset", "exact", *SMALL]
    assert suite.main([*arguments, "--case", "vae_encode", "vggt_49"]) == 1
    assert "vae_encode exact: WrongResult: output 0 of [3] is not finite" in capsys.readouterr().err
    assert {r["case"] for r in read_rows([tmp_path])} == {"ceiling", "vggt_49"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "decode", "--case", "nix"], "no case fits ['nix']; known: vae_encode"),
        (["--suite", "step", "--case", "x"], "--case belongs to --suite kernels, decode"),
        (["--suite", "decode", "--provider", "x"], "--provider belongs to --suite kernels"),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
