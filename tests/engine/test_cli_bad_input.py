"""Wrong input is one line that says how to mend it, exit code 2, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gen3r.writers import save_video
from tests.engine.commands import SMALL, process, run
from tests.engine.scenes import MadeEngine


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


def check_one_error(code: int, out: str, err: str, message: str) -> None:
    """Exit code 2, one line that holds `message`, nothing else."""
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1, err


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(
    here: Path, engine: MadeEngine, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    _files(here)
    before = sorted(here.rglob("*"))
    flags, message = BAD_INPUT[case]
    code = run(*flags.split())
    check_one_error(code, *capsys.readouterr(), message)
    assert sorted(here.rglob("*")) == before, "nothing may be written"
    assert not engine.calls


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_but_absent(
    here: Path, engine: MadeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("--frame_path", "a.png", "--device", "cuda")
    check_one_error(code, *capsys.readouterr(), "finds no CUDA GPU; use --device cpu")


def test_verbose_shows_the_traceback(
    here: Path, engine: MadeEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--frame_path", "x.png", "-v") == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["missing image", "unknown trajectory", "unknown flag"])
def test_bad_input_of_a_process(here: Path, case: str) -> None:
    flags, message = BAD_INPUT[case]
    done = process("run", *SMALL, *flags.split(), cwd=here, capture_output=True, timeout=120)
    check_one_error(done.returncode, done.stdout, done.stderr, message)
    assert not (here / "outputs").exists()
