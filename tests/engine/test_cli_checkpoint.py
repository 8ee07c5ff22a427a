"""Checkpoints from the command line: a saved folder runs, a broken one is told in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gen3r.nano import build_untrained
from gen3r_engine.cli import main
from tests.conftest import REPOSITORY

PHOTO = str(REPOSITORY / "examples" / "1view" / "photo.jpg")
SMALL = ["--frame_path", PHOTO, "--frames", "5", "--size", "112", "--steps", "2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the embedded one's sizes, saved in the published layout."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    build_untrained().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def weights(folder: Path, component: str) -> Path:
    (path,) = (folder / component).glob("*.safetensors")
    return path


def remove_component(folder: Path) -> None:
    shutil.rmtree(folder / "geo_adapter")


def truncate(folder: Path) -> None:
    path = weights(folder, "transformer")
    path.write_bytes(path.read_bytes()[:5000])


def change_shape(folder: Path) -> None:
    path = weights(folder, "wan_vae")
    state = load_file(path)
    name = sorted(state)[0]
    state[name] = torch.cat([state[name], state[name]]).contiguous()
    save_file(state, path)


def break_config(folder: Path) -> None:
    (folder / "vggt" / "config.json").write_text("{")


BROKEN: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing component": (remove_component, ("geo_adapter", "missing")),
    "truncated weights": (truncate, ("transformer", "cannot be read", "download it again")),
    "wrong shape": (change_shape, ("wan_vae", "shape of", "expected")),
    "broken config": (break_config, ("vggt", "config.json is not JSON")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints(
    broken: Path,
    tmp_path: Path,
    case: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, words = BROKEN[case]
    change(broken)
    monkeypatch.chdir(tmp_path)
    assert main(["run", *SMALL, "--pretrained_model_name_or_path", str(broken)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1, shown.err
    assert all(word in shown.err for word in words), shown.err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

    assert main(["doctor", "--pretrained_model_name_or_path", str(broken)]) == 1
    report = capsys.readouterr().out
    assert any(
        line.startswith("  - ") and all(word in line for word in words[:2])
        for line in report.splitlines()
    ), report
    assert "1 problem(s):" in report


def test_saved_model_passes_the_doctor(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--pretrained_model_name_or_path", str(saved)]) == 0
    assert "all well" in capsys.readouterr().out


def test_saved_model_makes_a_scene(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--pretrained_model_name_or_path", str(saved), "--output_dir", str(tmp_path / "out")]
    assert main(["run", *SMALL, *flags, "--outputs", "rgb,depth,cameras,npz"]) == 0
    assert "note: the model's weights are untrained" in capsys.readouterr().err
    (path,) = tmp_path.glob("out/1view/*/run.json")
    assert json.loads(path.read_text())["config"]["model"] == str(saved)
    assert (path.parent / "scene.npz").is_file()
