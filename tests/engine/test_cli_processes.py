"""The command line as a real process: help, a scene of the embedded model, an interruption."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from gen3r.checkpoint import read_own_values
from gen3r.nano import EMBEDDED
from tests.conftest import REPOSITORY
from tests.engine.commands import process

PHOTO = "examples/1view/photo.jpg"


def test_version_and_help(here: Path) -> None:
    shown = process("--version", cwd=here, capture_output=True, timeout=120)
    assert (shown.returncode, shown.stdout[:13]) == (0, "gen3r-engine ")
    helped = process("run", "--help", cwd=here, capture_output=True, timeout=120)
    assert helped.returncode == 0
    for flag in (
        *("--pretrained_model_name_or_path", "--task", "--prompts", "--frame_path", "--cameras"),
        *("--output_dir", "--remove_far_points", "--steps", "--guidance", "--seed", "--frames"),
        *("--size", "--negative_prompt", "--dtype", "--device", "--requests", "--outputs"),
        *("--normals", "--confidence", "--voxel-size", "--fusion-backend"),
    ):
        assert flag in helped.stdout


@pytest.mark.slow
def test_embedded_model_makes_a_scene(tmp_path: Path) -> None:
    flags = ["--frame_path", str(REPOSITORY / PHOTO), "--steps", "2", "--prompts", "a room"]
    flags += ["--outputs", "all", "--normals", "--confidence", "10"]
    done = process("run", *flags, cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    untrained = read_own_values(EMBEDDED).get("untrained", False)
    assert ("untrained" in done.stderr) is untrained
    (folder,) = (tmp_path / "outputs" / "1view").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == [
        *("cameras.json", "depth", "depth.mp4", "images", "pcds.ply", "preview.png"),
        *("prompts.txt", "rgb.mp4", "run.json", "scene.glb", "scene.npz", "sparse"),
        *("transforms.json", "view.html"),
    ]
    cloud = json.loads((folder / "run.json").read_text())["cloud"]
    assert cloud["points"] > 0 and cloud["counts"]["unsure"] > 0
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
