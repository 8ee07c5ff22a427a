"""The command line: flags reach the model, wrong input is one line and exit code 2.

Most run `main(argv)` in this process with a made-up pipeline; the last ones start real processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gen3r.media import save_video, write_cameras
from gen3r.scene import Cameras
from gen3r_engine.cli import main
from tests.conftest import REPOSITORY
from tests.engine.scenes import MadePipeline

PHOTO = "examples/1view/photo.jpg"
SMALL = ["--frames", "5", "--size", "56", "--outputs", "cameras"]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> MadePipeline:
    """The pipeline that the command line finds in place of the embedded model."""
    made = MadePipeline()

    def build_nano(**settings: Any) -> MadePipeline:
        made.built_with = settings
        return made

    module = types.SimpleNamespace(build_nano=build_nano, NANO=made.config)
    monkeypatch.setitem(sys.modules, "gen3r.nano", module)
    return made


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a photo, a second one of another size, and a video."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("a.png", (60, 80)), ("b.png", (90, 70))):
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(name)
    save_video(np.zeros((7, 16, 16, 3), np.uint8), "v.mp4")
    return tmp_path


def run(*arguments: str) -> int:
    return main(["run", *SMALL, *arguments])


def record(folder: Path = Path("outputs")) -> dict[str, Any]:
    (path,) = folder.glob("*/*/run.json")
    return dict(json.loads(path.read_text()))


# ----------------------------------------------------------------------------------- what is asked


def test_one_photo(here: Path, pipe: MadePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--frame_path", "a.png", "--prompts", "a room", "--cameras", "zoom_in") == 0
    (request,) = pipe.requests
    assert (request.task, request.prompt, request.cameras) == ("1view", "a room", "zoom_in")
    assert (request.num_frames, request.height, request.width, request.seed) == (5, 56, 56, 42)
    assert pipe.calls == [{"batch": 1, "num_inference_steps": 50, "guidance_scale": 5.0}]
    shown = capsys.readouterr()
    (folder,) = (here / "outputs" / "1view").iterdir()
    assert f"outputs/1view/{folder.name}" in shown.out
    assert "denoise" in shown.out
    assert shown.err.splitlines()[0].startswith("note: the embedded model's weights are untrained")
    saved = record()
    assert saved["config"]["model"] == "embedded"
    assert saved["request"]["views"] == ["a.png"]


def test_flags_reach_the_model(here: Path, pipe: MadePipeline) -> None:
    (here / "prompt.txt").write_text("  the first line\nthe second\n")
    flags = "--task 2view --frame_path a.png b.png --prompts prompt.txt --steps 7 --guidance 3.5"
    flags += " --seed 9 --size 56x112 --negative_prompt dull --dtype bfloat16 --device cpu"
    flags += " --attention reference --output_dir results/x --remove_far_points"
    assert main(["run", *flags.split(), "--frames", "9", "--outputs", "points, cameras"]) == 0
    (request,) = pipe.requests
    assert (request.task, request.prompt, request.negative_prompt) == (
        *("2view", "the first line"),
        "dull",
    )
    assert (request.num_frames, request.height, request.width, request.seed) == (9, 56, 112, 9)
    assert [np.asarray(i).shape for i in request.images] == [(60, 80, 3), (90, 70, 3)]
    assert pipe.calls == [{"batch": 1, "num_inference_steps": 7, "guidance_scale": 3.5}]
    assert pipe.built_with["torch_dtype"] == torch.bfloat16
    assert pipe.built_with["backends"].attention == "reference"
    saved = record(here / "results" / "x")
    assert saved["config"]["fusion"]["far_percentile"] == 80
    assert saved["config"]["fusion"]["voxel_size"] == 0.003
    assert saved["config"]["outputs"] == ["points", "cameras"]


@pytest.mark.parametrize("words", [["translate down"], ["translate", "down"], ["translate_down"]])
def test_trajectories_in_words(here: Path, pipe: MadePipeline, words: list[str]) -> None:
    assert run("--cameras", *words, "--frame_path", "a.png") == 0
    assert pipe.requests[0].cameras == "translate_down"


def test_camera_file(here: Path, pipe: MadePipeline) -> None:
    write_cameras("c.json", np.repeat(np.eye(4)[None], 6, 0), np.repeat(np.eye(3)[None], 6, 0))
    assert run("--cameras", "c.json", "--frame_path", "a.png") == 0
    cameras = pipe.requests[0].cameras
    assert isinstance(cameras, Cameras) and len(cameras) == 6


def test_empty_prompt_file_is_an_empty_prompt(here: Path, pipe: MadePipeline) -> None:
    (here / "empty.txt").write_text("")
    assert run("--prompts", "empty.txt", "--frame_path", "a.png") == 0
    assert pipe.requests[0].prompt == ""


def test_video_and_stride(
    here: Path, pipe: MadePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--frame_path", "v.mp4") == 0
    assert (pipe.requests[0].task, len(pipe.requests[0].images)) == ("allview", 5)
    assert main(["run", "--frame_path", "v.mp4", "--size", "56", "--outputs", "cameras"]) == 0
    assert (pipe.requests[1].num_frames, len(pipe.requests[1].images)) == (5, 5)
    assert "7 frames for 49 asked: 5 will be made" in capsys.readouterr().err
    assert run("--frame_path", "v.mp4", "--stride", "2") == 0
    assert "4 frames for 5 asked: 1 will be made" in capsys.readouterr().err


def test_many_scenes(here: Path, pipe: MadePipeline) -> None:
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
    assert [r.prompt for r in pipe.requests] == ["one", "from a file", "usual"]
    assert [r.task for r in pipe.requests] == ["1view", "2view", "1view"]
    assert [r.seed for r in pipe.requests] == [1, 42, 42]
    assert pipe.requests[1].cameras == "arc_left"
    assert [c["batch"] for c in pipe.calls] == [2, 1], "one shape a batch"
    assert len(list(here.glob("outputs/*/*/run.json"))) == 3


# --------------------------------------------------------------------------------------- bad input


def _files(here: Path) -> None:
    (here / "zero.png").write_bytes(b"")
    (here / "text.png").write_text("not an image")
    (here / "cut.png").write_bytes((here / "a.png").read_bytes()[:60])
    (here / "cut.mp4").write_bytes((here / "v.mp4").read_bytes()[:200])
    (here / "nothing").mkdir()
    eye, k = np.eye(4).tolist(), np.eye(3).tolist()
    for name, extrinsics in {
        "short": [eye] * 3,
        "rows": [eye[:3]] * 5,
        "flat": [[[0.0] * 4] * 4] * 5,
        "nan": [[[float("nan")] * 4] * 4] * 5,
    }.items():
        cameras = {"extrinsics": extrinsics, "intrinsics": [k] * len(extrinsics)}
        (here / f"{name}.json").write_text(json.dumps(cameras))
    (here / "broken.json").write_text("{")
    save_video(np.zeros((2, 16, 16, 3), np.uint8), here / "two.mp4")
    (here / "bad.jsonl").write_text('{"frame_path": "a.png"}\n{"frame_path": "a.png", "sed": 1}\n')
    (here / "empty.jsonl").write_text("\n")
    (here / "model").mkdir()


ONE = "--frame_path a.png "
BAD_INPUT = {
    "no views": ("", "give 1 image"),
    "missing image": ("--frame_path x.png", "x.png does not exist; check the path"),
    "zero-byte image": ("--frame_path zero.png", "empty (0 bytes)"),
    "no image": ("--frame_path text.png", "is not an image; give a PNG"),
    "corrupt image": ("--frame_path cut.png", "damaged"),
    "corrupt video": ("--frame_path cut.mp4", "re-encode it as H.264"),
    "folder without images": ("--frame_path nothing", "holds no images; put"),
    "short video": ("--frame_path two.mp4", "at least 3 frames, 2 given; use 1view or 2view"),
    "one image for two": (ONE + "--task 2view", "task 2view takes 2 image(s), 1 given"),
    "two images for one": ("--frame_path a.png b.png --task 1view", "takes 1 image(s), 2 given"),
    "unknown task": (ONE + "--task 3view", "known: 1view, 2view, allview"),
    "malformed cameras": (ONE + "--cameras broken.json", "not valid JSON"),
    "missing cameras": (ONE + "--cameras gone.json", "does not exist"),
    "short cameras": (ONE + "--cameras short.json", "3 cameras given, 5 frames asked; give one"),
    "non-4x4 cameras": (ONE + "--cameras rows.json", "is 3 x 4, not 4 x 4; give 4 rows"),
    "singular cameras": (ONE + "--cameras flat.json", "no inverse; correct that matrix"),
    "NaN cameras": (ONE + "--cameras nan.json", "NaN or infinity; correct that matrix"),
    "unknown trajectory": (ONE + "--cameras zoom_inn", "did you mean 'zoom_in'?"),
    "size": (ONE + "--size 100", "height 100 is not a multiple of 56; use 112"),
    "size words": (ONE + "--size big", "use a multiple of 56"),
    "frames": (ONE + "--frames 7", "use 5 or 9"),
    "steps": (ONE + "--steps 0", "use 1 or more"),
    "guidance": (ONE + "--guidance nan", "--guidance nan is out of range"),
    "missing prompt file": (ONE + "--prompts gone.txt", "does not exist; give the text"),
    "unwritable output": (ONE + "--output_dir a.png/out", "it is a file, not a folder"),
    "unknown output": (ONE + "--outputs rgb,video", "choose from rgb, depth"),
    "no such device": (ONE + "--device tpu", "--device tpu"),
    "unknown attention": (ONE + "--attention fast", "known: auto, reference, sdpa"),
    "no checkpoint": (
        ONE + "--pretrained_model_name_or_path ./gone",
        "./gone is not a folder; give a checkpoint folder or a hub id",
    ),
    "empty checkpoint": (ONE + "--pretrained_model_name_or_path model", "transformer is missing"),
    "bad request line": ("--requests bad.jsonl", "line 2: unknown key 'sed'; did you mean 'seed'?"),
    "no requests": ("--requests empty.jsonl", "write one JSON object per line"),
    "missing requests": ("--requests gone.jsonl", "does not exist; check the path"),
    "unknown flag": (ONE + "--colour red", "unrecognized arguments: --colour red"),
    "not a number": (ONE + "--seed x", "invalid int value: 'x'"),
    "negative seed": (ONE + "--seed -1", "negative; use 0 or more"),
}


def _check_one_error(code: int, out: str, err: str, message: str) -> None:
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1, err


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(
    here: Path, pipe: MadePipeline, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    _files(here)
    before = sorted(here.rglob("*"))
    flags, message = BAD_INPUT[case]
    code = run(*flags.split())
    _check_one_error(code, *capsys.readouterr(), message)
    assert sorted(here.rglob("*")) == before, "nothing may be written"
    assert not pipe.calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_but_absent(
    here: Path, pipe: MadePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("--frame_path", "a.png", "--device", "cuda")
    _check_one_error(code, *capsys.readouterr(), "finds no CUDA GPU; use --device cpu")


def test_verbose_shows_the_traceback(
    here: Path, pipe: MadePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--frame_path", "x.png", "-v") == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_leaves_nothing(
    here: Path, pipe: MadePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.raises = KeyboardInterrupt()
    assert run("--frame_path", "a.png") == 130
    assert not (here / "outputs").exists()
    assert capsys.readouterr().err.endswith("no unfinished result was left behind\n")


def test_a_fault_of_the_program_is_not_hidden(here: Path, pipe: MadePipeline) -> None:
    pipe.raises = ValueError("shapes differ")
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


# ----------------------------------------------------------------------------------- real processes


def environment() -> dict[str, str]:
    floors = [REPOSITORY, *(REPOSITORY / x for x in ("kernels", "engine", "export", "training"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, floors))}


def process(
    *arguments: str, cwd: Path, starter: Callable[..., Any] = subprocess.run, **settings: Any
) -> Any:
    command = [sys.executable, "-m", "gen3r_engine.cli", *arguments]
    return starter(command, cwd=cwd, env=environment(), text=True, **settings)


@pytest.mark.parametrize("case", ["missing image", "unknown trajectory", "unknown flag"])
def test_bad_input_of_a_process(here: Path, case: str) -> None:
    flags, message = BAD_INPUT[case]
    done = process("run", *SMALL, *flags.split(), cwd=here, capture_output=True, timeout=120)
    _check_one_error(done.returncode, done.stdout, done.stderr, message)
    assert not (here / "outputs").exists()


def test_version_and_help(here: Path) -> None:
    shown = process("--version", cwd=here, capture_output=True, timeout=120)
    assert (shown.returncode, shown.stdout[:13]) == (0, "gen3r-engine ")
    helped = process("run", "--help", cwd=here, capture_output=True, timeout=120)
    assert helped.returncode == 0
    for flag in (
        *("--pretrained_model_name_or_path", "--task", "--prompts", "--frame_path", "--cameras"),
        *("--output_dir", "--remove_far_points", "--steps", "--guidance", "--seed", "--frames"),
        *("--size", "--negative_prompt", "--dtype", "--device", "--requests", "--outputs"),
    ):
        assert flag in helped.stdout


@pytest.mark.slow
def test_embedded_model_makes_a_scene(tmp_path: Path) -> None:
    flags = ["--frame_path", str(REPOSITORY / PHOTO), "--steps", "2", "--prompts", "a room"]
    done = process("run", *flags, cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "untrained" in done.stderr
    (folder,) = (tmp_path / "outputs" / "1view").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [
        *("cameras.json", "depth.mp4", "pcds.ply", "preview.png", "prompts.txt", "rgb.mp4"),
        "run.json",
    ]
    assert f"outputs/1view/{folder.name}/preview.png" in done.stdout
    assert "denoise" in done.stderr and "\x1b" not in done.stderr, "plain lines off a terminal"


@pytest.mark.slow
def test_interrupted_process_leaves_nothing(tmp_path: Path) -> None:
    flags = ["--frame_path", str(REPOSITORY / PHOTO), "--steps", "100000"]
    started = process("run", *flags, cwd=tmp_path, starter=subprocess.Popen, stderr=subprocess.PIPE)
    for line in started.stderr:
        if line.startswith("encode views"):  # denoising comes next
            started.send_signal(signal.SIGINT)
            break
    rest = started.stderr.read()
    assert started.wait(timeout=60) == 130, rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []
