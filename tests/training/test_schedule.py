"""Learning rate and clip norm against tables worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from gen3r_training.config import DiffusionConfig, TrainConfig
from gen3r_training.schedule import clip_norm, learning_rate


def make(**changes: object) -> TrainConfig:
    given = {"data_root": (Path("d"),), "output_dir": Path("o"), "pretrained_path": Path("p")}
    return DiffusionConfig(**{**given, "learning_rate": 1.0, "warmup_steps": 4, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "table"),
    [
        ({}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 23: 1.0}),
        ({"warmup_steps": 0}, {0: 1.0, 23: 1.0}),
        # Half a cosine from step 4 to step 24: at its middle 0.2 + 0.8 / 2, at a quarter
        # 0.2 + 0.8 (1 + sqrt(1/2)) / 2.
        (
            {"schedule": "cosine", "min_lr_ratio": 0.2},
            {3: 1.0, 4: 1.0, 9: 0.8828427, 14: 0.6, 24: 0.2, 30: 0.2},
        ),
        ({"schedule": "cosine", "min_lr_ratio": 0.0}, {14: 0.5, 24: 0.0}),
        # A warm-up longer than the run.
        ({"schedule": "cosine", "warmup_steps": 48}, {0: 1 / 48, 23: 0.5}),
    ],
)
def test_learning_rate(changes: dict[str, object], table: dict[int, float]) -> None:
    config = make(**changes)
    found = {step: learning_rate(config, step, 24) for step in table}
    assert found == pytest.approx(table, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("norms", "total", "table"),
    [
        ((0.5, 0.25), 200, {0: 0.5, 10: 0.375, 20: 0.25, 199: 0.25}),
        ((0.5, 0.5), 200, {0: 0.5, 10: 0.5, 199: 0.5}),
        ((0.5, 0.25), 3, {0: 0.5, 1: 0.25}),  # shorter than ten steps
        ((0.0, 0.25), 200, {0: 0.0, 199: 0.0}),  # off
    ],
)
def test_clip_norm(norms: tuple[float, float], total: int, table: dict[int, float]) -> None:
    config = make(clip_norm=norms[0], clip_norm_end=norms[1])
    assert {step: clip_norm(config, step, total) for step in table} == pytest.approx(table)
