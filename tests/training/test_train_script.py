"""training/train.sh: which commands it runs, in which order, and what it skips."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gen3r_training.arguments import add_arguments, config_from
from gen3r_training.config import AdapterConfig, DiffusionConfig, TrainConfig
from tests.conftest import REPOSITORY
from tests.engine.commands import environment

SCRIPT = REPOSITORY / "training" / "train.sh"
# Stands for python: notes its arguments, and leaves what a finished run leaves.
RECORDER = """#!/usr/bin/env bash
echo "$@" >> "$(dirname "$0")/log"
while [[ $1 != --output_dir ]]; do shift; done
mkdir -p "$2/final_pipeline"
"""


def script(*arguments: str, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    given = {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**environment(), **given},
        capture_output=True,
        text=True,
    )


def parsed(line: str) -> TrainConfig:
    """The configuration of a recorded command."""
    name, *flags = shlex.split(line)
    stage = Path(name).stem.removeprefix("train_")
    parser = argparse.ArgumentParser()
    add_arguments(parser, stage)
    return config_from(parser.parse_args(flags), stage)


def test_two_runs_of_stage_1_then_stage_2(tmp_path: Path) -> None:
    recorder = tmp_path / "recorder"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    variables = {"DATA_ROOT": "one two", "CHECKPOINTS_DIR": "models", "LAUNCH": str(recorder)}
    variables |= {"OUTPUT_DIR": str(tmp_path / "out"), "ADAPTER_ARGS": "--ema --batch_size 2"}
    assert script(**variables).returncode == 0
    short, long, last = map(parsed, (tmp_path / "log").read_text().splitlines())
    assert isinstance(short, AdapterConfig) and isinstance(long, AdapterConfig)
    assert isinstance(last, DiffusionConfig)
    assert (short.num_frames, long.num_frames, last.num_frames) == (25, 49, 49)
    assert short.data_root == (Path("one"), Path("two"))
    assert short.ema == 0.999 and long.batch_size == 2
    assert short.init_from is None
    assert long.init_from == short.output_dir / "final_pipeline"
    assert last.geo_adapter == long.output_dir / "final_pipeline"
    assert {config.resume for config in (short, long, last)} == {"auto"}

    (last.output_dir / "final_pipeline").rmdir()
    assert script(**variables).returncode == 0
    assert len((tmp_path / "log").read_text().splitlines()) == 4


def test_what_is_missing_is_told() -> None:
    found = script(DATA_ROOT="data", CHECKPOINTS_DIR="models")
    assert found.returncode == 2
    assert found.stderr.strip().startswith("error: OUTPUT_DIR is not set")
    assert script("--help").returncode == 0 and script("--frames").returncode == 2


@pytest.mark.slow
def test_the_whole_way(data_root: Path, pretrained: Path, tmp_path: Path) -> None:
    small = "--mixed_precision no --device cpu --resolution 56 --num_workers 0 --report none"
    found = script(
        **{"DATA_ROOT": data_root, "CHECKPOINTS_DIR": pretrained, "OUTPUT_DIR": tmp_path},
        **{"FRAMES": "1", "LAUNCH": sys.executable, "ADAPTER_ARGS": f"{small} --max_steps 1"},
        DIFFUSION_ARGS=f"{small} --max_steps 1 --num_frames 1",
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "diffusion" / "final_pipeline" / "model_index.json").is_file()
    assert os.listdir(tmp_path / "adapter_1" / "final_pipeline") == ["geo_adapter"]
