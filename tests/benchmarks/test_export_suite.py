"""The suite `export`: what it runs, and its rows and table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.export import suite
from benchmarks.harness import read_rows, write_rows
from gen3r_export.graph import DimRange, TensorSpec
from gen3r_export.manifest import Entry, FileFacts, Gpu

ENTRY = Entry(
    name="vae_decoder_next",
    part="vae_decoder",
    form="next",
    component="wan_vae",
    format="onnx",
    precision="fp16",
    folder="vae_decoder_next.onnx-fp16-0",
    files={"vae_decoder_next.onnx": FileFacts(2_500_000, "0" * 64)},
    inputs=(TensorSpec("latents", (1, 16, "frames", 14, 14), "float16"),),
    outputs=(TensorSpec("video", (1, 3, "4*frames", 112, 112), "float16"),),
    dims={"frames": DimRange(1, 2, 4)},
    height=112,
    width=112,
    frames=(17, 17),
    batch=(1, 1),
    device="any",
    gpu=None,
    versions={"torch": "2.13.0"},
    weights="0" * 64,
    errors={"float32": 4e-4, "same": 1e-5},
    checked={"onnx.checker": "passed", "run": "onnxruntime on cpu"},
    seconds={"export": 3.5, "check": 1.0},
)


def test_every_part_is_exported_in_every_format() -> None:
    found = list(suite.jobs(suite.parse([])))
    assert {(job.format, job.precision) for job in found} == {
        *(("tensorrt", p) for p in ("fp32", "fp16", "bf16", "fp8")),
        *(("aoti", p) for p in ("fp32", "fp16")),
    }
    assert all(job.parts == suite.PART_NAMES for job in found)
    real = list(suite.jobs(suite.parse(["--model", "real", "--format", "onnx"])))
    assert {p for job in real for p in job.parts} == set(suite.PART_NAMES) - {"text_encoder"}
    (job,) = suite.jobs(
        suite.parse(["--format", "onnx", "--precision", "fp16", "--part", "camera_head"])
    )
    assert job.config(Path("plans")).parts == ("camera_head",)


def test_rows_hold_seconds_and_sizes(tmp_path: Path) -> None:
    built = replace(
        ENTRY,
        format="tensorrt",
        gpu=Gpu("89"),
        versions={"torch": "2.13.0", "tensorrt-rtx": "1.7.1.116"},
        errors={},
    )
    rows = [row for entry in (ENTRY, built) for row in suite.rows_of(entry, "nano")]
    path = write_rows(rows, suite.SUITE, tmp_path, "abc")
    found = {(r["provider"], r["metric"]): r for r in read_rows([path])}
    assert found["onnx", "time"]["p50"] == 3.5
    assert found["onnx", "time"]["rel_error"] == 4e-4
    assert found["tensorrt-rtx sm89", "size"]["p50"] == 2.5
    lines = suite.table(read_rows([path])).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| nano 17x112x112 | vae_decoder_next | onnx | fp16 | onnx.checker")
    assert "| 4.0e-04 | 2.5 | 3.5 |" in lines[2]


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.parse(["--part", "unet"])
    assert "unet" in capsys.readouterr().err
