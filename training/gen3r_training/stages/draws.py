"""All randomness of a step: numbers that follow from a sample's seed and from what they are for.

Drawn on the CPU in float32, so that a CPU and every GPU see the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gen3r_training.data.samples import derive_seed


def generator(
    seed: int,
    purpose: str,
) -> torch.Generator:
    """A CPU generator of its own for one purpose of one sample."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose))


def normal(
    seed: int,
    purpose: str,
    shape: Sequence[int],
) -> Tensor:  # float32 on the CPU
    """Standard normal numbers."""
    return torch.randn(tuple(shape), generator=generator(seed, purpose))


def uniform(seed: int, purpose: str) -> float:
    """A number in [0, 1), in steps of 2^-53."""
    return float(torch.rand((), generator=generator(seed, purpose), dtype=torch.float64))
