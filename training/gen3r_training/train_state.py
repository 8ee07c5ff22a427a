"""What a run changes as it goes, apart from its number of steps: weights, moments, averages.

A checkpoint is these tensors, each rank's random state, and a few facts (`gen3r_training.loop`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gen3r_training import checkpoints
from gen3r_training.config import TrainConfig
from gen3r_training.ema import Ema
from gen3r_training.parallel import Parallel, make_optimizer
from gen3r_training.stages import Stage


@dataclass
class Skipped:
    """Steps whose loss or gradient was not finite, in all and in a row."""

    total: int = 0
    in_a_row: int = 0

    def count(self, finite: bool) -> None:
        """Take in one step."""
        self.total += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1


class TrainState:
    """The optimizer of a stage's module, the averaged weights (None: off), the skipped steps."""

    def __init__(self, stage: Stage, config: TrainConfig, parallel: Parallel) -> None:
        self.parallel, self.device = parallel, stage.device
        self.optimizer = make_optimizer(stage.module, config, parallel)
        self.ema = Ema(self.optimizer.masters(), config.ema) if config.ema else None
        self.skipped = Skipped()
        # Ranks differ in what they draw from the global generators.
        torch.manual_seed(config.seed * 1_000_003 + parallel.rank)

    def weights(self) -> dict[str, Tensor]:
        """What the run has made: the averaged weights where they are on, else the masters."""
        return self.optimizer.masters() if self.ema is None else self.ema.average

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, the live tensors; the random states of this rank's devices too."""
        tensors = {f"model.{n}": t.detach() for n, t in self.optimizer.masters().items()}
        tensors |= {f"optimizer.{n}": t for n, t in self.optimizer.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.average.items()}
        tensors[self._rng("cpu")] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors[self._rng("cuda")] = torch.cuda.get_rng_state(self.device)
        return tensors

    def load(self, path: Path, skipped: Mapping[str, int]) -> None:
        """Take up the checkpoint in `path`. Collective; raises what `checkpoints.load` raises."""
        tensors = self.tensors()
        loaded = checkpoints.load(path, tensors, self.parallel)
        self.optimizer.publish()
        prefix = "optimizer."
        self.optimizer.load_state_dict(
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        )
        if self._rng("cpu") in loaded:
            torch.set_rng_state(tensors[self._rng("cpu")])
        if self._rng("cuda") in loaded:
            torch.cuda.set_rng_state(tensors[self._rng("cuda")], self.device)
        self.skipped = Skipped(**skipped)

    def _rng(self, device: str) -> str:
        return f"{checkpoints.RNG}{self.parallel.rank}.{device}"
