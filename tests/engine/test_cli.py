"""The command line in this process, with a made-up pipeline: flags reach the model, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gen3r.scene import Cameras
from gen3r.writers import write_cameras
from gen3r_engine.cli import main
from gen3r_engine.fusion import REMOVE_FAR
from tests.engine.commands import run
from tests.engine.scenes import MadeEngine


def record(folder: Path = Path("outputs")) -> dict[str, Any]:
    (path,) = folder.glob("*/*/run.json")
    return dict(json.loads(path.read_text()))


# ----------------------------------------------------------------------------------- what is asked


def test_one_photo(here: Path, engine: MadeEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--frame_path", "a.png", "--prompts", "a room", "--cameras", "zoom_in") == 0
    (request,) = engine.requests
    assert (request.task, request.prompt, request.cameras) == ("1view", "a room", "zoom_in")
    assert (request.num_frames, request.height, request.width, request.seed) == (5, 56, 56, 42)
    assert engine.calls == [{"steps": 50, "guidance": None, "fusion": None}]
    shown = capsys.readouterr()
    (folder,) = (here / "outputs" / "1view").iterdir()
    assert f"outputs/1view/{folder.name}" in shown.out
    assert "denoise" in shown.out
    assert shown.err.splitlines()[0].startswith("note: the model's weights are untrained")
    saved = record()
    assert (saved["config"]["model"], saved["config"]["untrained"]) == ("embedded", True)
    assert saved["config"]["guidance_scale"] == 5.0, "the model's own"
    assert saved["request"]["views"] == ["a.png"]


def test_trained_weights_need_no_note(
    here: Path, engine: MadeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.pipeline.untrained = False
    assert run("--frame_path", "a.png") == 0
    assert "untrained" not in capsys.readouterr().err
    assert record()["config"]["untrained"] is False


def test_flags_reach_the_model(here: Path, engine: MadeEngine) -> None:
    (here / "prompt.txt").write_text("  the first line\nthe second\n")
    flags = "--task 2view --frame_path a.png b.png --prompts prompt.txt --steps 7 --guidance 3.5"
    flags += " --seed 9 --size 56x112 --negative_prompt dull --dtype bfloat16 --device cpu"
    flags += " --attention reference --output_dir results/x --remove_far_points"
    assert main(["run", *flags.split(), "--frames", "9", "--outputs", "points, cameras"]) == 0
    (request,) = engine.requests
    assert (request.task, request.prompt, request.negative_prompt) == (
        *("2view", "the first line"),
        "dull",
    )
    assert (request.num_frames, request.height, request.width, request.seed) == (9, 56, 112, 9)
    assert [np.asarray(i).shape for i in request.images] == [(60, 80, 3), (90, 70, 3)]
    assert engine.calls == [{"steps": 7, "guidance": 3.5, "fusion": REMOVE_FAR}]
    config = engine.config
    assert (config.dtype, config.device, config.attention) == ("bfloat16", "cpu", "reference")
    saved = record(here / "results" / "x")
    assert saved["config"]["guidance_scale"] == 3.5
    assert saved["config"]["fusion"]["far_percentile"] == 80
    assert saved["config"]["fusion"]["voxel_size"] == 0.003
    assert saved["config"]["outputs"] == ["points", "cameras"]


def test_fusion_flags_reach_the_cloud(here: Path, engine: MadeEngine) -> None:
    flags = "--outputs ply --normals --confidence 20 --voxel-size 0.04 --fusion-backend python"
    assert run("--frame_path", "a.png", *flags.split()) == 0
    saved = record()
    fusion, cloud = saved["config"]["fusion"], saved["cloud"]
    assert (fusion["normals"], fusion["confidence_percentile"]) == (True, 20.0)
    assert (fusion["voxel_size"], fusion["backend"], cloud["backend"]) == (0.04, "python", "python")
    assert saved["config"]["outputs"] == ["points"]
    assert cloud["counts"]["given"] == 5 * 56 * 56 and cloud["points"] == cloud["counts"]["cells"]
    (path,) = here.glob("outputs/*/*/pcds.ply")
    assert b"property float nx" in path.read_bytes()
    assert run("--frame_path", "a.png", "--voxel-size", "0", "--output_dir", "whole") == 0
    assert record(here / "whole")["config"]["fusion"]["voxel_size"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--confidence 100", "--confidence: confidence_percentile 100.0 must be in [0, 100)"),
        ("--voxel-size -1", "--voxel-size: voxel_size -1.0 must be > 0"),
        ("--fusion-backend gpu", "--fusion-backend: backend 'gpu' is unknown; known: auto, cuda"),
        ("--outputs rgb,obj", "--outputs: output 'obj' is unknown; choose from rgb, depth"),
    ],
)
def test_bad_fusion_flags(
    here: Path,
    engine: MadeEngine,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    message: str,
) -> None:
    assert run("--frame_path", "a.png", *flags.split()) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert message in shown.err and not engine.requests


def test_fusion_backends_that_are_not_there(
    here: Path,
    engine: MadeEngine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("gen3r_engine.native.native", lambda: None)
    monkeypatch.setattr("gen3r_engine.native.why_missing", lambda: "not built")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("--frame_path", "a.png", "--fusion-backend", "native") == 2
    assert "--fusion-backend: native is not built; or use auto" in capsys.readouterr().err
    assert run("--frame_path", "a.png", "--fusion-backend", "cuda") == 2
    assert "--fusion-backend: cuda needs a CUDA GPU" in capsys.readouterr().err
    assert not engine.requests


@pytest.mark.parametrize("words", [["translate down"], ["translate", "down"], ["translate_down"]])
def test_trajectories_in_words(here: Path, engine: MadeEngine, words: list[str]) -> None:
    assert run("--cameras", *words, "--frame_path", "a.png") == 0
    assert engine.requests[0].cameras == "translate_down"


def test_camera_file(here: Path, engine: MadeEngine) -> None:
    write_cameras("c.json", np.repeat(np.eye(4)[None], 6, 0), np.repeat(np.eye(3)[None], 6, 0))
    assert run("--cameras", "c.json", "--frame_path", "a.png") == 0
    cameras = engine.requests[0].cameras
    assert isinstance(cameras, Cameras) and len(cameras) == 6


def test_empty_prompt_file_is_an_empty_prompt(here: Path, engine: MadeEngine) -> None:
    (here / "empty.txt").write_text("")
    assert run("--prompts", "empty.txt", "--frame_path", "a.png") == 0
    assert engine.requests[0].prompt == ""


def test_video_and_stride(
    here: Path, engine: MadeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--frame_path", "v.mp4") == 0
    assert (engine.requests[0].task, len(engine.requests[0].images)) == ("allview", 5)
    assert main(["run", "--frame_path", "v.mp4", "--size", "56", "--outputs", "cameras"]) == 0
    assert (engine.requests[1].num_frames, len(engine.requests[1].images)) == (5, 5)
    assert "7 frames for 49 asked: 5 will be made" in capsys.readouterr().err
    assert run("--frame_path", "v.mp4", "--stride", "2") == 0
    assert "4 frames for 5 asked: 1 will be made" in capsys.readouterr().err


def test_many_scenes(here: Path, engine: MadeEngine) -> None:
    scenes = here / "sub" / "scenes.jsonl"
    scenes.parent.mkdir()
    (scenes.parent / "p.txt").write_text("from a file\n")
    lines: list[dict[str, Any]] = [
        {"frame_path": "../a.png", "prompt": "one", "seed": 1},
        {"frame_path": ["../a.png", "../b.png"], "prompts": "p.txt", "cameras": "arc left"},
        {"frame_path": "../b.png", "size": 112, "frames": 9},
    ]
    scenes.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert run("--requests", "sub/scenes.jsonl", "--batch", "4", "--prompts", "usual") == 0
    assert [r.prompt for r in engine.requests] == ["one", "from a file", "usual"]
    assert [r.task for r in engine.requests] == ["1view", "2view", "1view"]
    assert [r.seed for r in engine.requests] == [1, 42, 42]
    assert engine.requests[1].cameras == "arc_left"
    assert len(engine.calls) == 1 and engine.config.max_batch == 4
    assert len(list(here.glob("outputs/*/*/run.json"))) == 3


# ------------------------------------------------------------------------------------ interruptions


def test_interrupt_leaves_nothing(
    here: Path, engine: MadeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.raises = KeyboardInterrupt()
    assert run("--frame_path", "a.png") == 130
    assert not (here / "outputs").exists()
    assert capsys.readouterr().err.endswith("no unfinished result was left behind\n")


def test_a_fault_of_the_program_is_not_hidden(here: Path, engine: MadeEngine) -> None:
    engine.raises = ValueError("shapes differ")
    with pytest.raises(ValueError, match="shapes differ"):
        run("--frame_path", "a.png")
    assert not (here / "outputs").exists()


# ------------------------------------------------------------------------------------------ doctor


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "torch", "GPU", "attention backends", "sdpa", "pip install 'gen3r-"):
        assert word in out
    assert out.endswith("all well\n")


def test_doctor_names_what_a_checkpoint_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--pretrained_model_name_or_path", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    for name in ("transformer", "wan_vae", "geo_adapter", "vggt", "text_encoder", "tokenizer"):
        assert f"- {name}: " in out
    assert main(["doctor", "--pretrained_model_name_or_path", str(tmp_path / "gone")]) == 2
