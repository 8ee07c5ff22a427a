"""`gen3r-engine verify`: figures, limits, verdict and exit code."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from gen3r.scene import Scene
from gen3r_engine import verify as verifying
from gen3r_engine.cli import main
from gen3r_engine.fidelity import Curve, compare, curve
from gen3r_engine.verify import LIMITS, Verification, depth_error, limits_for, pose_angles, psnr

SMALL = ["--frames", "5", "--size", "56", "--steps", "2", "--device", "cpu"]


def test_exact_is_the_plain_pipeline_in_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "verify.json"
    assert main(["verify", *SMALL, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "verdict: preset exact holds" in text and "limits: both in float32" in text
    found = json.loads(file.read_text())
    assert found["passed"] and found["failures"] == []
    assert len(found["curve"]["rel_error"]) == 2 and max(found["curve"]["rel_error"]) < 1e-5
    assert found["psnr"] is None or found["psnr"] > 60
    assert found["rotation"] < 0.01


def test_a_preset_that_is_too_far_off_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = dataclasses.replace(LIMITS["fp8"], latents=1e-4)
    monkeypatch.setitem(LIMITS, "fp8", strict)
    assert main(["verify", *SMALL, "--preset", "fp8"]) == 1
    assert "verdict: preset fp8 DOES NOT HOLD: latent error 0." in capsys.readouterr().out


def test_bfloat16_against_float32(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--dtype", "bfloat16", "--reference_dtype", "float32"]
    assert main(["verify", *SMALL, *chosen]) == 0
    assert "preset exact (bfloat16) against the plain pipeline (float32)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps 0 is below 1"),
        (["--guidance", "-1"], "--guidance -1.0 is out of range"),
        (["--frame_path", "nowhere.png"], "nowhere.png"),
        (["--pretrained_model_name_or_path", "./nowhere"], "nowhere is not a folder"),
        (["--frames", "6"], "num_frames 6"),
    ],
)
def test_wrong_input(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *argv]) == 2
    assert message in capsys.readouterr().err


def scene(angle: float = 0.0, depth: float = 2.0, away: float = 1.0) -> Scene:
    """Two frames; the second camera is turned by `angle` degrees and moved by `away`."""
    extrinsics = torch.eye(4).repeat(2, 1, 1)
    turn = math.radians(angle)
    extrinsics[1, :2, :2] = torch.tensor(
        [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    )
    extrinsics[1, 2, 3] = away
    shape = (2, 2, 2)
    return Scene(
        rgb=torch.full((*shape, 3), 100, dtype=torch.uint8),
        depth=torch.full(shape, depth),
        depth_confidence=torch.ones(shape),
        extrinsics=extrinsics,
        intrinsics=torch.eye(3).repeat(2, 1, 1),
        points=torch.zeros(*shape, 3),
        mask=torch.ones(shape, dtype=torch.bool),
    )


def test_figures() -> None:
    assert psnr(scene().rgb, scene().rgb) == math.inf
    assert psnr(scene().rgb + 1, scene().rgb) == pytest.approx(48.13, abs=0.01)
    assert depth_error(scene(depth=2.1), scene()) == pytest.approx(0.05, rel=1e-5)
    rotation, direction = pose_angles(scene(angle=3.0), scene())
    assert rotation == pytest.approx(3.0, abs=1e-4) and direction == pytest.approx(0, abs=1e-4)
    assert pose_angles(scene(away=-1.0), scene())[1] == pytest.approx(180, abs=1e-4)
    assert pose_angles(scene(), scene(away=0.0))[1] is None


def test_limits_and_failures() -> None:
    assert limits_for("exact", "float32", "float32") is LIMITS["float32"]
    assert limits_for("exact", "bfloat16", "float32") is LIMITS["exact"]
    good = Verification(
        *("fp8", "bfloat16", "bfloat16", 1, Curve((0.1,), (0.99,))),
        *(30.0, 0.01, 1.0, None, LIMITS["fp8"]),
    )
    assert good.passed and good.to_dict()["psnr"] == 30.0
    bad = dataclasses.replace(good, psnr=math.nan, depth=math.nan, translation=90.0)
    assert len(bad.failures) == 3
    assert {"PSNR", "depth", "translation"} <= {word for f in bad.failures for word in f.split()}


def test_curves() -> None:
    x = torch.tensor([[3.0, 4.0]])
    assert compare(x, x) == (0.0, pytest.approx(1.0))
    assert compare(x * 1.1, x)[0] == pytest.approx(0.1, rel=1e-5)
    assert compare(-x, x) == (pytest.approx(2.0), pytest.approx(-1.0))
    assert compare(x, torch.zeros_like(x)) == (math.inf, 0.0)
    found = curve([x, x * 2, x], [x, x])
    assert found.rel_error == (0.0, pytest.approx(1.0)) and found.last == pytest.approx(1.0)
    with pytest.raises(ValueError, match="1 steps to compare with 2"):
        curve([x], [x, x])
    with pytest.raises(ValueError, match="differ in shape"):
        compare(x, x[:, :1])


def test_running_out_of_memory_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_nano(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(verifying, "build_nano", build_nano)
    assert main(["verify", *SMALL]) == 1
    error = capsys.readouterr().err
    assert "out of GPU memory in stage 'the plain pipeline'" in error
