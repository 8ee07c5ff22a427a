"""Forward and backward of one batch, plain or replayed as a CUDA graph.

A model of a few million parameters has kernels of a few microseconds, which the host cannot launch
as fast as they run: replaying a step takes its launches away. Batches of one form (names, shapes
and dtypes of their tensors) share a graph, whose static tensors are filled before the replay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gen3r_training.resident.objective import Objective

WARMING = 3  # plain steps on a side stream before a capture, as PyTorch advises
Form = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclasses.dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    loss: Tensor
    logs: dict[str, Tensor]
    gradients: dict[str, Tensor]


class Stepper:
    """Runs an objective's loss and its gradients; these are left in the parameters' ``.grad``.

    captured : replay CUDA graphs (for an objective on a GPU).
    """

    def __init__(self, objective: Objective, *, captured: bool) -> None:
        self.objective, self.captured = objective, captured
        self.trained = {n: p for n, p in objective.module.named_parameters() if p.requires_grad}
        self._graphs: dict[Form, _Graph] = {}
        self._pool: Any = None

    def run(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of the batch, valid until the next call."""
        if not self.captured:
            return self._plain(batch)
        tensors = _tensors(batch)
        form = tuple((name, tuple(t.shape), t.dtype) for name, t in tensors.items())
        found = self._graphs.get(form)
        if found is None:
            found = self._graphs[form] = self._capture(batch, tensors)
        for name, tensor in tensors.items():
            found.inputs[name].copy_(tensor)
        found.graph.replay()
        for name, parameter in self.trained.items():
            parameter.grad = found.gradients.get(name)
        return found.loss, found.logs

    def _plain(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logs = self.objective.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), logs

    def _capture(self, batch: Any, tensors: Mapping[str, Tensor]) -> _Graph:
        inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        static = dataclasses.replace(batch, **inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMING):
                self._plain(static)
                self._forget()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss, logs = self._plain(static)
        self._pool = self._pool or graph.pool()
        gradients = {n: p.grad for n, p in self.trained.items() if p.grad is not None}
        self._forget()
        return _Graph(graph, inputs, loss, logs, gradients)

    def _forget(self) -> None:
        for parameter in self.trained.values():
            parameter.grad = None


def _tensors(batch: Any) -> dict[str, Tensor]:
    """The batch's tensors by field; a graph cannot see a change of anything else."""
    found = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
