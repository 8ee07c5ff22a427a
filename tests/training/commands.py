"""The training commands in this process, small, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

from gen3r_training import command

SMALL = (
    *("--mixed_precision", "no", "--device", "cpu", "--num_frames", "5", "--resolution", "56"),
    *("--max_stride", "1", "--num_workers", "0", "--report", "none", "--schedule", "constant"),
    *("--gradient_checkpointing", "none"),
)


def train(stage: str, *arguments: str | Path) -> int:
    """`training/train_STAGE.py` with small numbers; the exit code."""
    return command.main(stage, None, [*SMALL, *map(str, arguments)])


def metrics(output: Path) -> list[dict[str, float]]:
    """What every step of a run logged."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output)]
