"""The command `export` and the flag --plans: flags, tables, refusals, exit codes."""

from __future__ import annotations

import argparse
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gen3r_export.export as driver
from gen3r_engine.cli import build_parser, main
from gen3r_engine.cli.export import export_config
from gen3r_export.export import Model
from gen3r_export.graph import Exported, Graph
from gen3r_export.manifest import read_manifest
from tests.export.made import double_graph, export_double, made_entry, made_folder

HASHES = {"vggt": "a" * 32}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model and an exporter that take no time, in an empty folder."""
    from gen3r_engine.cli import export as command
    from tests.engine.test_engine import pipeline

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "graphs", lambda model, config: iter([double_graph()]))
    monkeypatch.setattr(driver, "load_model", lambda *a: Model(pipeline(), HASHES, "embedded"))
    monkeypatch.setattr("gen3r_export.onnx.export_onnx", export_double)
    assert command.HELP
    return tmp_path


def parsed(*flags: str) -> argparse.Namespace:
    return build_parser().parse_args(["export", *flags])


def test_flags_reach_the_config() -> None:
    given = "--parts vae_decoder,camera_head --format tensorrt --precision fp8 --size 560x448"
    given += " --frames 17:49 --batch 1:4 --out plans --form chunk --no-run --opset 19"
    given += " --capabilities 89,120 --workspace-gib 4 --refit --timing-cache t.bin"
    given += " --working-gib 2.5 --device cuda"
    config = export_config(parsed(*given.split()))
    assert config.parts == ("vae_decoder", "camera_head")
    assert (config.format, config.precision, config.dtype) == ("tensorrt", "fp8", "float16")
    assert (config.height, config.width, config.frames, config.batch) == (
        *(560, 448),
        (17, 49),
        (1, 4),
    )
    assert (config.out, config.form, config.run, config.opset) == (
        *(Path("plans"), "chunk"),
        *(False, 19),
    )
    assert (config.capabilities, config.workspace_gib, config.refit) == (("89", "120"), 4.0, True)
    assert (config.timing_cache, config.working_gib, config.device) == (
        *(Path("t.bin"), 2.5),
        "cuda",
    )
    usual = export_config(parsed("--out", "x", "--parts", "all", "--size", "112"))
    assert (usual.parts, usual.format, usual.precision, usual.run) == ((), "onnx", "fp32", True)
    assert (usual.height, usual.width, usual.frames, usual.batch) == (112, 112, None, (1, 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "no folder to export into; give --out DIR"),
        ("--out x --parts nose", "parts nose are unknown; known: text_encoder"),
        ("--out x --format pb", "format 'pb' is unknown; known: onnx, tensorrt, aoti"),
        ("--out x --precision int8", "precision 'int8' is unknown; known: fp32, fp16, bf16, fp8"),
        ("--out x --format aoti --precision fp8", "which AOTInductor packages do not have; use"),
        ("--out x --size 500", "height 500 is not a multiple of 56; use 504"),
        ("--out x --size big", "size 'big' is not a size"),
        ("--out x --frames 6", "frames 6 is not 4 k + 1; use 5 or 9"),
        ("--out x --frames 5:x", "--frames 5:x is no number and no range such as 1:4"),
        ("--out x --batch 4:1", "batch 4:1 must be 1 or more and must not fall"),
        (
            "--out x --format tensorrt --capabilities 8.9",
            "compute capability '8.9' is not a number such as 89",
        ),
        ("--list --check x", "--list and --check do not go together; give one of them"),
        ("--check x --format onnx", "--format belongs to an export, not to --check; leave it out"),
        ("--list --no-run", "--no-run belongs to an export, not to --list"),
        ("--check nowhere", "nowhere holds no plans.json; give a folder that gen3r-engine export"),
        ("--triton-repository r", "is made from an export folder; give it as --out DIR"),
        ("--triton-repository r --out nowhere", "nowhere holds no plans.json"),
        ("--out x --pretrained nowhere", "nowhere is not a folder; give a checkpoint folder or"),
    ],
)
def test_wrong_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", *flags.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("error: ") and message in shown.err
    assert not list(tmp_path.iterdir())


def test_an_export(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--parts", "camera_head", "--out", "plans"]) == 0
    shown = capsys.readouterr()
    heading, row, last = shown.out.splitlines()
    assert heading.split() == ["graph", "format", "checked", "error", "MB", "seconds"]
    assert row.split() == ["camera_head", "onnx", "fp32", "passed", "1.0e-07", "0.0", "0.1"]
    assert last == "1 entry in plans/plans.json"
    assert "camera_head: onnx fp32" in shown.err
    assert len(read_manifest(fakes / "plans").entries) == 1


def test_a_graph_that_fails_is_told(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(graph: Graph, **named: Any) -> Exported:
        raise ValueError("camera_head has an operator that must not be")

    monkeypatch.setattr("gen3r_export.onnx.export_onnx", work)
    assert main(["export", "--parts", "camera_head", "--out", "plans"]) == 1
    shown = capsys.readouterr()
    assert "note: camera_head was not exported: camera_head has an operator that" in shown.err
    assert not (fakes / "plans").exists()


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(config: object) -> None:
        raise ValueError("no TensorRT found; pip install 'gen3r-engine[tensorrt]'")

    monkeypatch.setattr("gen3r_export.tensorrt.preferred_library", absent)
    assert main(["export", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "denoiser_prepare, denoiser_step" in shown
    assert "vae_decoder_first, vae_decoder_next" in shown
    assert "tensorrt  no: no TensorRT found; pip install 'gen3r-engine[tensorrt]'" in shown
    assert "onnx      yes" in shown


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = made_entry(tmp_path)
    bad = made_entry(tmp_path, 3.0, name="depth_head", place="bad")
    (tmp_path / "bad" / bad.main_file).write_bytes(b"")
    elsewhere = made_entry(tmp_path, name="point_head", format="aoti", device="cuda")
    folder = made_folder(tmp_path, good, bad, elsewhere)
    assert main(["export", "--check", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "camera_head (onnx fp32): passed (run, and not compared: the checkpoint has other weights "
        "or shapes)"
    )
    assert lines[1].startswith("depth_head (onnx fp32): FAILED (") and "cut short" in lines[1]
    if not torch.cuda.is_available():
        assert lines[2] == (
            "point_head (aoti fp32): not run here (it is for a GPU, and there is none)"
        )
        assert lines[3] == "ONNX files built with TensorRT: not run here (there is no GPU)"
        assert lines[4] == "1 passed, 1 failed, 2 not run here"
    made_folder(tmp_path, good)
    assert main(["export", "--check", str(folder)]) == 0


def test_a_model_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = made_entry(tmp_path)
    rtx = replace(entry, name="depth_head", format="tensorrt", versions={"tensorrt-rtx": "1.7"})
    folder = made_folder(tmp_path, entry, rtx)
    flags = ["export", "--triton-repository", str(tmp_path / "m"), "--out", str(folder)]
    assert main(flags) == 0
    shown = capsys.readouterr()
    assert "camera_head: camera_head (onnx fp32)" in shown.out
    assert "note: depth_head (tensorrt fp32) is left out: Triton has no backend" in shown.err
    assert main(flags) == 2
    assert "exists; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_ended_by_a_signal(
    fakes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    def work(graph: Graph, folder: Path, **named: Any) -> Exported:
        (folder / "half.onnx").write_bytes(b"half")
        signal.raise_signal(number)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr("gen3r_export.onnx.export_onnx", work)
    assert main(["export", "--out", "plans"]) == code
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "interrupted; no unfinished result was left behind"
    assert not (fakes / "plans").exists()


# ------------------------------------------------------------------------------------- --plans


def test_plans_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--frame_path", "x.png", "--plans", str(tmp_path)]
    assert build_parser().parse_args(["run", *given]).plans == tmp_path
    for command in (["warmup"], ["eval", "--suite", "paper"], ["verify"]):
        assert build_parser().parse_args([*command, "--plans", "p"]).plans == Path("p")
    for suite in ("nano", "yardstick"):  # they run the model's own modules
        assert main(["eval", "--suite", suite, "--plans", "p"]) == 2
        assert "--plans belongs to --suite paper; leave it out" in capsys.readouterr().err
    assert main(["verify", "--yardstick", "--plans", "p"]) == 2
    assert "--yardstick runs the model's own modules" in capsys.readouterr().err
    assert main(["warmup", "--device", "cpu", "--plans", str(tmp_path)]) == 2
    assert "holds no plans.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--refit"], "--refit has no meaning for format onnx"),
        (["--format", "aoti", "--capabilities", "89"], "--capabilities has no meaning"),
        (["--format", "aoti", "--opset", "20"], "--opset has no meaning for format aoti"),
        (["--device", "cuda"], "--device has no meaning for format onnx"),
    ],
)
def test_flags_of_other_formats_are_refused(
    flags: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--out", str(tmp_path / "plans"), *flags]) == 2
    assert told in capsys.readouterr().err
