"""What the resident loop knows of a stage."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Objective(Protocol):
    """What is trained, on what, and how a batch's loss is computed.

    module : what is trained: all its parameters that require gradients
    components : those of its parts that belong to the pipeline, by the component's name
    """

    module: nn.Module
    components: dict[str, nn.Module]

    def draw(self, generator: torch.Generator, count: int) -> Any:
        """A batch of `count` clips: a dataclass of tensors on the device, random by `generator`."""

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss (scalar float32 with graph) and 0-d detached figures. Does not wait."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out clips, the same draws every time."""

    def finish(self) -> None:
        """What follows the last step, with the final weights in the module."""
