"""Whatever is wrong with a training command is told in one line, before any weight is loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gen3r_training.stages.adapter_stage as adapter_stage
import gen3r_training.stages.frozen as frozen
from gen3r.checkpoint_save import save_component
from gen3r.components import COMPONENTS
from gen3r.nano import NANO
from gen3r_kernels import Backends
from tests.training.commands import train
from tests.training.scenes import write_scene


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights are loaded before the input is checked")

    for module in (adapter_stage, frozen):
        monkeypatch.setattr(module, "load_component", refuse)


@pytest.fixture
def adapter(data_root: Path, pretrained: Path, tmp_path: Path) -> list[str | Path]:
    models = ["--vggt_path", pretrained, "--wan_vae_path", pretrained]
    return ["--data_root", data_root, *models, "--output_dir", tmp_path / "out"]


@pytest.fixture
def diffusion(data_root: Path, pretrained: Path, tmp_path: Path) -> list[str | Path]:
    given = ["--data_root", data_root, "--pretrained_path", pretrained]
    return [*given, "--output_dir", tmp_path / "out"]


def refused(capsys: pytest.CaptureFixture[str], stage: str, *arguments: str | Path) -> str:
    """The one line of error."""
    capsys.readouterr()
    assert train(stage, *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--num_frames 24", "use 21 or 25"),
        ("--num_frames 0", "use 1"),
        ("--resolution 500", "use 504"),
        ("--task_1view_prob 0.5", "must sum to 1"),
        ("--task_1view_prob 1.4 --task_2view_prob -0.4 --task_allview_prob 0", "lies in 0..1"),
        ("--text_dropout_prob 2", "--text_dropout_prob 2"),
        ("--learning_rate 0", "--learning_rate 0"),
        ("--learning_rate nan", "--learning_rate nan"),
        ("--weighting best", "known: none"),
        ("--mixed_precision fp16", "known: no, bf16"),
        ("--attention fastest", "known: auto"),
        ("--master_weights stochastic", "--mixed_precision bf16"),
        ("--ema 1", "--ema 1"),
        ("--max_steps 0", "--max_steps 0"),
        ("--data_weights 1 2", "2 weights for 1 data roots"),
        ("--data_weights -1", "not negative"),
        ("--steps 3", "unrecognized arguments"),
        ("--batch_size many", "invalid int value"),
    ],
)
def test_numbers_and_names(
    capsys: pytest.CaptureFixture[str], diffusion: list[str | Path], flags: str, told: str
) -> None:
    assert told in refused(capsys, "diffusion", *diffusion, *flags.split())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--lambda_rec 0", "trains nothing"),
        ("--lambda_kl -1", "not be negative"),
        ("--kl_reduction mean", "known: upstream, full"),
        ("--context_parallel 2", "belongs to stage 2"),
        ("--compile", "belongs to stage 2"),
    ],
)
def test_numbers_of_stage_1(
    capsys: pytest.CaptureFixture[str], adapter: list[str | Path], flags: str, told: str
) -> None:
    assert told in refused(capsys, "adapter", *adapter, *flags.split())


def test_data(
    capsys: pytest.CaptureFixture[str], diffusion: list[str | Path], tmp_path: Path
) -> None:
    def told(root: Path, *more: str) -> str:
        return refused(capsys, "diffusion", *diffusion, "--data_root", root, *more)

    assert "no such folder" in told(tmp_path / "nowhere")
    root = tmp_path / "data"
    (root / "train").mkdir(parents=True)
    assert str(root) in told(root)
    scene = write_scene(root / "train" / "a", frames=3, height=8, width=8)
    assert "no --data_root has a folder 'val'" in told(root, "--validate_every", "5")
    cameras = json.loads((scene / "cameras.json").read_text())
    cameras["extrinsics"].pop()
    (scene / "cameras.json").write_text(json.dumps(cameras))
    assert "2" in told(root) and "3" in told(root)
    (scene / "cameras.json").unlink()
    assert "cameras.json" in told(root)


def test_folders(
    capsys: pytest.CaptureFixture[str],
    adapter: list[str | Path],
    diffusion: list[str | Path],
    pretrained: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    empty = tmp_path / "empty"
    empty.mkdir()
    for flags, told in (
        (["--vggt_path", tmp_path / "nowhere"], "--vggt_path"),
        (["--vggt_path", empty], "no safetensors files"),
        (["--wan_vae_path", pretrained / "vggt"], "does not hold the wan_vae"),
        (["--init_from", empty], "--init_from"),
        (["--pretrained_path", empty], "--pretrained_path"),
        (["--output_dir", tmp_path / "file" / "out"], "file"),
        (["--resume", tmp_path / "nowhere"], "--resume"),
    ):
        assert told in refused(capsys, "adapter", *adapter, *flags)
    for flags, told in (
        (["--pretrained_path", tmp_path / "nowhere"], "--pretrained_path"),
        (["--pretrained_path", empty], "problem(s)"),
        (["--geo_adapter", empty], "--geo_adapter"),
        (["--latent_cache", empty], "recipe.json"),
        (["--context_parallel", "3"], "--context_parallel 3"),
    ):
        assert told in refused(capsys, "diffusion", *diffusion, *flags)


def test_a_finished_run_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], adapter: list[str | Path], tmp_path: Path
) -> None:
    (tmp_path / "out" / "final_pipeline" / "geo_adapter").mkdir(parents=True)
    assert "final_pipeline exists" in refused(capsys, "adapter", *adapter)


def save(name: str, folder: Path, **changes: object) -> Path:
    """A component of NANO's with other sizes, untrained."""
    component, config = COMPONENTS[name], replace(getattr(NANO, name), **changes)
    with torch.device("meta"):
        module = component.build(config, Backends())
    save_component(component, module.to_empty(device="cpu"), config, folder)
    return folder


def test_checkpoints_of_another_size(
    capsys: pytest.CaptureFixture[str],
    adapter: list[str | Path],
    diffusion: list[str | Path],
    pretrained: Path,
    tmp_path: Path,
) -> None:
    wide = save("geo_adapter", tmp_path / "wide", input_dim=640, output_dim=640)
    assert "takes 640 channels" in refused(capsys, "adapter", *adapter, "--init_from", wide)
    told = refused(capsys, "diffusion", *diffusion, "--geo_adapter", wide)
    assert "--geo_adapter" in told and "640" in told
    fixed = save("geo_adapter", tmp_path / "fixed", fixed_token_grid=(8, 8))
    assert "use 112" in refused(capsys, "diffusion", *diffusion, "--geo_adapter", fixed)
    deep = save("transformer", tmp_path / "deep", num_layers=2)
    assert "another size" in refused(capsys, "diffusion", *diffusion, "--init_from", deep)
    # Weights without the config that says their sizes are held against the real model's.
    bare = shutil.copytree(pretrained / "vggt", tmp_path / "bare")
    (bare / "config.json").unlink()
    assert "does not hold the vggt" in refused(capsys, "adapter", *adapter, "--vggt_path", bare)
