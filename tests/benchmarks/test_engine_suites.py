"""The suites step, fidelity, e2e, memory and startup, small, on the CPU, with the NANO model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import figures, report
from benchmarks.energy import Meter, NoEnergy
from benchmarks.engine import common, fidelity
from benchmarks.engine.common import PROVIDERS, Rows, parser, resolve_options
from benchmarks.engine.gaps import gaps_between
from benchmarks.engine.work import step_flops
from benchmarks.harness import BadInput, Row, phase, read_rows
from gen3r.config import GEN3R
from gen3r_engine.cli import bench, main
from tests.benchmarks.rows import WHERE, row

SMALL = ["--device", "cpu", "--model", "nano", "--frames", "5", "--size", "56"]


def run(suite: str, out: Path, *options: str, presets: tuple[str, ...] = ()) -> list[Row]:
    chosen = ["--preset", *presets] if presets else []
    command = ["bench", "--suite", suite, *chosen, "--out", str(out), "--commit", "abc"]
    assert main([*command, "--", *SMALL, *options]) == 0
    return [r for r in read_rows([out]) if r["suite"] == suite]


def named(rows: list[Row]) -> set[tuple[str, str, str]]:
    return {(r["case"], r["provider"], r["metric"]) for r in rows if phase(r) == "run"}


def test_presets_of_the_command_are_those_of_the_suites() -> None:
    assert tuple(PROVIDERS) == bench.PROVIDERS


def test_counted_work_is_that_of_the_real_model() -> None:
    config = GEN3R.transformer
    assert step_flops(config, 49, 560, 3) == pytest.approx(6 * 271.4e12, rel=1e-3)


def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run("step", tmp_path, "--steps", "3", presets=("eager", "exact", "fp8"))
    found = named(rows)
    for provider in ("eager", "exact", "fp8"):
        assert {("denoise_step", provider, m) for m in ("time", "tflops")} <= found
    assert ("denoise_loop_3", "exact", "time") in found
    assert ("ceiling", "bf16", "tflops") in found
    (first,) = [r for r in rows if phase(r) == "compile" and r["provider"] == "exact"]
    assert first["unit"] == "s" and first["case"] == "denoise_step"
    times = {r["provider"]: r for r in rows if r["case"] == "denoise_step" and r["unit"] == "ms"}
    assert times["exact"]["config"]["repeats"] == 3
    assert times["exact"]["config"]["flops"] == times["eager"]["config"]["flops"]
    assert times["exact"]["config"]["from_eager_after_2_steps"] < 1e-5
    assert 1e-3 < times["fp8"]["config"]["from_eager_after_2_steps"] < 0.3
    (rate,) = [r for r in rows if r["provider"] == "exact" and r["metric"] == "tflops"]
    assert rate["share_of_ceiling"] > 0 and rate["config"]["ceiling"] == "bf16"
    assert "no energy rows: a CPU has no NVML counter" in capsys.readouterr().out


def test_fidelity_goes_on_from_its_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = ["--reference", str(tmp_path / "kept"), "--part", "quarter", "--steps", "3"]
    out = tmp_path / "rows"
    rows = run("fidelity", out, *kept, presets=("eager", "exact"))
    assert {(r["case"], r["provider"]) for r in rows} == {
        ("fidelity_quarter", "eager"),
        ("fidelity_quarter", "exact"),
    }
    for r in rows:
        curve = r["config"]["curve"]
        assert len(curve["rel_error"]) == len(curve["cosine"]) == 3
        assert 1e-5 < r["rel_error"] < 0.05 and 0.998 < curve["cosine"][-1] < 1
        assert r["rel_error"] == pytest.approx(curve["rel_error"][-1], rel=1e-3)
        assert r["dtype"] == "bfloat16" and r["metric"] == "latent_error"
    assert "exact has" in capsys.readouterr().out
    files = sorted((tmp_path / "kept" / "fidelity_quarter").iterdir())
    assert len(files) == 4
    # One step is lost: it alone is computed again, and the curve is the same.
    files[-1].unlink()
    again = run("fidelity", out, *kept, presets=("exact",))
    assert "float32 reference: steps 3 to 3" in capsys.readouterr().out
    curves = {r["provider"]: r["config"]["curve"] for r in rows}
    assert [r["config"]["curve"] for r in again if r["provider"] == "exact"] == [curves["exact"]]
    other = ["bench", "--suite", "fidelity", "--", *SMALL, *kept[:-1], "2"]
    assert main(other) == 2
    assert "holds the latents of other weights" in capsys.readouterr().err


def test_memory_and_e2e(tmp_path: Path) -> None:
    rows = run("memory", tmp_path, "--steps", "1", presets=("eager", "24gb"))
    cases = {*figures.STAGES, "scene_step", "scene_total"}
    expected = {(case, p, "time") for case in cases for p in ("eager", "24gb")}
    assert named(rows) == expected - {(figures.FUSE, "eager", "time")}
    options = ("--steps", "2", "--scenes", "2", "--solo_steps", "1")
    rows = run("e2e", tmp_path, *options, presets=("exact",))
    assert named(rows) == {(case, "exact", "time") for case in (*cases, "stream_2")}
    (stream,) = [r for r in rows if r["case"] == "stream_2"]
    config = stream["config"]
    assert len(config["finished"]) == 2 and config["finished"][-1] == pytest.approx(
        stream["p50"], rel=1e-3
    )
    assert config["over_loops_and_decode"] > 0.5
    stages = figures.stage_seconds(read_rows([tmp_path]), "5x56x56")
    assert set(stages) == {"exact", "eager", "24gb"}


@pytest.mark.slow
def test_startup(tmp_path: Path) -> None:
    rows = run("startup", tmp_path)
    assert [(r["case"], phase(r)) for r in rows] == [
        ("startup", "compile"),
        ("startup", "run"),
        ("startup_known_prompt", "run"),
    ]
    for r in rows:
        at = r["config"]["seconds_at"]
        assert 0 < at["imports"] < at["loaded"] < at["encoded"] < at["first step"]
        assert r["p50"] == pytest.approx(at["first step"], rel=1e-3)


def test_a_provider_that_breaks_keeps_the_rows_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = parser("step", None, ("eager", "exact", "fp8"))
    rows = Rows("step", resolve_options(made.parse_args([*SMALL, "--out", str(tmp_path)])))

    def measure(provider: common.Provider) -> None:
        if provider.name == "exact":
            raise RuntimeError("broke")
        if provider.name == "fp8":
            raise common.Unavailable("not here")
        rows.add("denoise_step", provider.name, "time", "ms", [1.0])

    rows.each(measure)
    assert rows.finish() == 1
    assert [r["provider"] for r in read_rows([tmp_path])] == ["eager"]
    told = capsys.readouterr()
    assert "fp8: skipped: not here" in told.out and "FAILED: exact: RuntimeError" in told.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "6"], "--frames 6 is not 4k + 1; use 5"),
        (["--size", "100"], "--size 100 is not a multiple of 56; use 56"),
        (["--steps", "0"], "--steps 0 is below 1"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message.replace("+", r"\+")):
        resolve_options(parser("step", None, ("exact",)).parse_args([*SMALL, *options]))


def test_preset_belongs_to_engine_suites(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--suite", "cpu", "--preset", "exact"]) == 2
    assert "--preset belongs to --suite step, fidelity" in capsys.readouterr().err


def test_gaps_are_those_between_graphs() -> None:
    # Two launches of three kernels (of which two overlap) and a lone kernel between them.
    first = [(7, 0, 100), (7, 120, 200), (7, 150, 190)]
    second = [(9, 1_200, 1_300), (9, 1_310, 1_320), (9, 1_330, 1_400)]
    assert gaps_between([*second, (8, 500, 700), *first], fewest=3) == [800e-6]
    assert gaps_between(first, fewest=3) == [] == gaps_between([], fewest=3)


def test_energy_is_not_made_up() -> None:
    meter = Meter(torch.device("cpu"))
    assert meter.read() is None and meter.why_not == "a CPU has no NVML counter"
    with pytest.raises(NoEnergy, match="a CPU has no NVML counter"):
        meter.joules()


def engine_row(
    case: str, provider: str, value: float, metric: str = "time", **config: object
) -> Row:
    unit = {"time": "ms", "latent_error": "1", "energy": "J"}[metric]
    made = row(case, provider, metric, unit, (value,), config=dict(config))
    return {**made, "suite": "fidelity" if metric == "latent_error" else "e2e"}


def test_tables_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [engine_row(case, "exact", 500.0) for case in figures.STAGES]
    rows += [engine_row("scene_step", "exact", 800.0)]
    rows += [engine_row("scene_total", "exact", 33_000.0, "energy")]
    curve = {"rel_error": [0.001, 0.002], "cosine": [0.99999, 0.9999]}
    rows += [engine_row("fidelity_real", "exact", 0.002, "latent_error", curve=curve)]
    written = report.write_report(rows, tmp_path)
    slug = WHERE.gpu.lower().replace(" ", "-")
    assert [p.name for p in written] == [
        "report.md",
        f"stages-{slug}.png",
        f"fidelity-{slug}.png",
    ]
    text = written[0].read_text()
    assert "| exact | 0.5 | 0.5 | 40 | 0.5 | 0.5 | 0.5 | 42.5 |" in text
    assert "| exact | 1.00e-03 (1.0e-05) | 2.00e-03 (1.0e-04) |" in text
    assert "| energy, J |" in text and "| 3.3e+04 |" in text


def test_the_reference_says_what_it_is_of(tmp_path: Path) -> None:
    kept = fidelity.Reference(tmp_path, {"weights": "a"})
    kept.keep(torch.ones(1, 2))
    assert json.loads((tmp_path / "reference.json").read_text()) == {"weights": "a"}
    assert len(fidelity.Reference(tmp_path, {"weights": "a"}).latents) == 1
    with pytest.raises(BadInput, match="other weights"):
        fidelity.Reference(tmp_path, {"weights": "b"})
