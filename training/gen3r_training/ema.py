"""An exponential moving average of the master weights, float32, sharded as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def decay_at(step: int, decay: float) -> float:
    """Decay of the update after step `step` (from 0): min(decay, (1 + step) / (10 + step)).

    The ramp forgets the first weights, which a plain average of decay 0.999 would hold for
    thousands of steps.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """average <- d average + (1 - d) master, with d = `decay_at`.

    Parameters
    ----------
    masters : tensors or DTensors by parameter name; the average begins as their float32 copy
    decay : below 1
    """

    def __init__(self, masters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.average = {
            name: master.detach().to(torch.float32, copy=True) for name, master in masters.items()
        }

    @torch.no_grad()
    def update(self, masters: Mapping[str, Tensor], step: int) -> None:
        """Take in the masters after step `step` (from 0)."""
        averages = [_local(average) for average in self.average.values()]
        current = [_local(masters[name]).float() for name in self.average]
        torch._foreach_lerp_(averages, current, 1 - decay_at(step, self.decay))

    @contextlib.contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Inside, the module holds the average (rounded to its dtype); after, its own weights,
        bit for bit.
        """
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        kept = {name: parameters[name].clone() for name in self.average}
        try:
            _fill(parameters, self.average)
            yield
        finally:
            _fill(parameters, kept)


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name, source in sources.items():
        _local(targets[name]).copy_(_local(source))


def _local(tensor: Tensor) -> Tensor:
    """This rank's part; the arithmetic here is per element, so no rank needs another's."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
