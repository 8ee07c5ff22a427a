"""The two stages of training behind one small interface, which is all that the loop knows.

`plan_stage` checks everything that can be checked without loading weights or touching a GPU (data,
folders, names and shapes of tensors); `build_stage` loads what the plan names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from gen3r_training.config import AdapterConfig, DiffusionConfig, TrainConfig

if TYPE_CHECKING:
    from gen3r_training.data import Sample, SceneDataset
    from gen3r_training.parallel import Parallel

__all__ = ["Plan", "Stage", "StepResult", "ValidationResult", "build_stage", "plan_stage"]


@dataclass(frozen=True)
class StepResult:
    """What one micro step computed.

    loss : scalar with graph, the mean over the micro step's samples
    logs : by name; tensors are detached scalars
    """

    loss: Tensor
    logs: dict[str, float | Tensor]


@dataclass(frozen=True)
class ValidationResult:
    """scalars and videos (uint8 [F, H, W, 3]) by name; text : a line for the log."""

    scalars: dict[str, float] = field(default_factory=dict)
    videos: dict[str, Tensor] = field(default_factory=dict)
    text: str = ""


class Stage(Protocol):
    """What is trained, on what, and how a step of it is computed.

    module : what is trained; parameters float32 or bf16
    dataset : the training split
    flops : model FLOP of one sample's forward and backward, without recomputation
    """

    name: str
    dataset: SceneDataset
    device: torch.device
    flops: float

    @property
    def module(self) -> nn.Module: ...

    def step(self, samples: list[Sample]) -> StepResult:
        """Forward of one micro step; all randomness comes from each sample's seed."""

    def validate(self, folder: Path, step: int) -> ValidationResult:
        """Losses and videos on the validation split, the same draws every time.

        To be called on every rank, since a sharded module needs all of them.
        """

    def save_final(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write `folder`, whole or not at all, from full CPU weights of `module`. Main rank only.

        Raises
        ------
        FileExistsError : the folder exists. OSError : it cannot be written.
        """


class Plan(Protocol):
    """A checked configuration with what the check has read: headers, configs, scene lists."""

    @property
    def dataset(self) -> SceneDataset: ...

    def outline(self) -> nn.Module:
        """What is trained, on the meta device: names and shapes."""

    def build(self, parallel: Parallel) -> Stage:
        """Load the modules on the rank's device."""


def plan_stage(config: TrainConfig) -> Plan:
    """Check data, folders and tensor names for a run, reading headers only.

    Raises
    ------
    ValueError, OSError : whatever is wrong, in one line.
    """
    if isinstance(config, AdapterConfig):
        from gen3r_training.stages.adapter_stage import plan_adapter

        return plan_adapter(config)
    if isinstance(config, DiffusionConfig):
        from gen3r_training.stages.diffusion_stage import plan_diffusion

        return plan_diffusion(config)
    raise ValueError(
        f"no stage takes a {type(config).__name__}; use AdapterConfig or DiffusionConfig"
    )


def build_stage(config: TrainConfig, parallel: Parallel) -> Stage:
    """`plan_stage` and `Plan.build` in one."""
    return plan_stage(config).build(parallel)
