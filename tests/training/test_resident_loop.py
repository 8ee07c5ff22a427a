"""The resident loop and its command, on a tiny model; the VAE's objective."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gen3r.pipeline import Gen3RPipeline
from gen3r_engine.cli import main
from gen3r_training.procedural import save_clips
from gen3r_training.resident.config import DEFAULTS, STAGES, ResidentConfig
from gen3r_training.resident.loop import (
    LOG,
    _Run,
    build_objective,
    check_clips,
    load_model,
    stored_model,
    train_resident,
)
from gen3r_training.resident.vae import VAEObjective
from tests.training.resident_tiny import tiny_clips, tiny_pipeline

FRAMED = ("rgb", "depth", "objects", "c2w")  # tensors of clips that have frames


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    save_clips(tiny_clips(3), folder, "train")
    save_clips(tiny_clips(2), folder, "held_out")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    replace(tiny_pipeline(), untrained=True).save_pretrained(folder)
    return folder


def options(**changes: Any) -> ResidentConfig:
    values = {"stage": "vae", "data": Path("data"), "output": Path("out"), **changes}
    return ResidentConfig(**values)


def quick(data: Path, model: Path, output: Path, **changes: Any) -> ResidentConfig:
    return options(
        data=data,
        model=model,
        output=output,
        **{"steps": 2, "batch": 1, "log_every": 1, "device": "cpu", **changes},
    )


def test_the_trained_component_alone_changes(data: Path, model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = quick(data, model, tmp_path / "new", learning_rate=0.1, warmup=0)
    report = train_resident(config, said.append)
    before = Gen3RPipeline.from_pretrained(model, torch_dtype=torch.float32)
    after = Gen3RPipeline.from_pretrained(config.output, torch_dtype=torch.float32)
    assert report["steps"] == 2 and report["samples"] == 2 and report["skipped"] == 0
    assert report["held_out"]["psnr"] > 0 and any("wrote" in line for line in said)
    for name in ("vggt", "transformer", "geo_adapter"):
        old, new = getattr(before, name).state_dict(), getattr(after, name).state_dict()
        assert all(torch.equal(old[k].half().float(), new[k]) for k in old), name
    old, new = before.wan_vae.state_dict(), after.wan_vae.state_dict()
    assert any(not torch.equal(old[k].half().float(), new[k]) for k in old)
    # Latents were measured: drawn ones of the training clips have mean 0 and deviation 1.
    assert after.config.wan_vae.latents_std != before.config.wan_vae.latents_std
    assert after.untrained
    lines = [json.loads(line) for line in (config.output / LOG).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "step", "evaluation", "report"]


def test_the_log_follows_the_model_and_parts_are_taken(
    data: Path, model: Path, tmp_path: Path
) -> None:
    first = quick(data, model, tmp_path / "first", steps=1)
    train_resident(first, str)
    second = quick(
        data, model, tmp_path / "second", steps=1, take=(("wan_vae", first.output),), seed=3
    )
    pipeline = load_model(second, torch.device("cpu"))
    stored = Gen3RPipeline.from_pretrained(first.output, torch_dtype=torch.float32)
    assert pipeline.config.wan_vae == stored.config.wan_vae
    train_resident(second, str)
    kinds = [json.loads(line)["kind"] for line in (second.output / LOG).read_text().splitlines()]
    assert kinds.count("report") == 2


def test_the_last_stage_takes_the_mark_untrained_away(
    data: Path, model: Path, tmp_path: Path
) -> None:
    config = quick(data, model, tmp_path / "whole", stage="diffusion", steps=1)
    train_resident(config, str)
    assert Gen3RPipeline.from_pretrained(model).untrained
    assert not Gen3RPipeline.from_pretrained(config.output).untrained


def test_what_an_objective_freezes_stays(data: Path, model: Path) -> None:
    config = options(data=data, model=model, stage="vggt", device="cpu")
    device = torch.device("cpu")
    pipeline = load_model(config, device)
    run = _Run(build_objective(pipeline, config, device), pipeline, config, device, str)
    names = {name for name, _ in pipeline.vggt.named_parameters()}
    assert names - set(run.optimizer.masters()) == {"aggregator.patch_embed.mask_token"}


def test_random_weights_are_those_of_the_seed() -> None:
    first, again = (stored_model(options(seed=3), torch.float32) for _ in range(2))
    for name, value in first.transformer.state_dict().items():
        assert torch.equal(value, again.transformer.state_dict()[name]), name


def test_an_evaluation_is_made_once_a_step(data: Path, model: Path, tmp_path: Path) -> None:
    config = quick(data, model, tmp_path / "often", steps=1, evaluate_every=1, log_every=0)
    train_resident(config, str)
    kinds = [json.loads(line)["kind"] for line in (config.output / LOG).read_text().splitlines()]
    assert kinds == ["evaluation", "report"]


def test_clips_that_no_model_takes_are_told(tmp_path: Path, model: Path, capsys: Any) -> None:
    clips = tiny_clips(1)
    for name, wrong, told in (
        ("long", replace(clips, **{n: getattr(clips, n)[:, :4] for n in FRAMED}), "4k + 1"),
        ("wide", replace(clips, depth=clips.depth[..., :40, :40]), "40 x 40"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            check_clips(name, wrong)
    save_clips(clips, tmp_path / "data", "train")
    flags = ["--data", str(tmp_path / "data"), "--model", str(model), "--device", "cpu"]
    assert main(["train", "resident", "vae", *flags, "--output", str(tmp_path / "out")]) == 2
    assert "--held_out K" in capsys.readouterr().err
    flags += ["--take", f"vggt={model}", "--take", f"vggt={model}"]
    assert main(["train", "resident", "vae", *flags, "--output", str(tmp_path / "out")]) == 2
    assert "given twice" in capsys.readouterr().err


def test_minutes_end_a_run(data: Path, model: Path, tmp_path: Path) -> None:
    config = quick(data, model, tmp_path / "short", steps=10**6, minutes=1e-3)
    assert 1 <= train_resident(config, str)["steps"] < 100


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    config = options(learning_rate=1.0, warmup=4)
    assert config.rate(0, 0.0) == pytest.approx(0.25)
    assert config.rate(10, 0.0) == pytest.approx(1.0)
    assert config.rate(10, 0.5) == pytest.approx(0.5)
    assert config.rate(10, 1.0) == config.rate(10, 1.5) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stage": "clip"}, "--stage 'clip' is unknown"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"minutes": 0.0}, "--minutes 0.0 must be above 0"),
        ({"ema": 1.0}, "--ema 1.0"),
        ({"dtype": "float16"}, "--dtype 'float16'"),
        ({"scenes": 0}, "--scenes 0"),
        ({"take": (("head", Path("x")),)}, "--take 'head'"),
    ],
)
def test_wrong_values_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        options(**changes)


def test_every_stage_has_defaults() -> None:
    assert set(DEFAULTS) == set(STAGES)


def test_the_command(data: Path, model: Path, tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "vae"
    flags = ["--data", str(data), "--model", str(model), "--output", str(output), "--batch", "1"]
    flags += ["--steps", "1", "--device", "cpu"]
    assert main(["train", "resident", "vae", *flags]) == 0
    assert (output / "wan_vae" / "config.json").is_file()
    assert main(["train", "resident", "vae", *flags]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["train", "resident", "vae", *flags, "--take", "vggt"]) == 2
    assert "write NAME=DIR" in capsys.readouterr().err


def test_a_batch_of_the_vae(data: Path) -> None:
    clips = tiny_clips(3)
    objective = VAEObjective(tiny_pipeline(), clips, clips, options())
    batch = objective.draw(torch.Generator().manual_seed(1), 4)
    assert batch.frames.shape[:2] == (4, 3) and batch.frames.abs().max() <= 1
    assert batch.noise.shape == batch.disturbance.shape
    again = VAEObjective(tiny_pipeline(), clips, clips, options())
    assert torch.equal(batch.frames, again.draw(torch.Generator().manual_seed(1), 4).frames)
    loss, logs = objective.loss(batch)
    loss.backward()
    missing = [n for n, p in objective.module.named_parameters() if p.grad is None]
    assert loss.isfinite() and not missing and set(logs) == {"psnr", "kl", "absolute"}
