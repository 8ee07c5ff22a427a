"""How far a result is from what it should be: one number per tensor and per graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Bounds on `relative_error` against PyTorch in float32, by the precision of the exported graph.
BOUNDS = {"fp32": 1e-4, "fp16": 2e-3}


def relative_error(
    found: Tensor,
    expected: Tensor,  # same shape
) -> float:
    """||found - expected|| / ||expected|| (Euclidean, in float64); inf where not finite.

    Raises
    ------
    ValueError : shapes that differ.
    """
    if found.shape != expected.shape:
        raise ValueError(
            f"a result of shape {tuple(found.shape)} cannot be compared with "
            f"{tuple(expected.shape)}"
        )
    wide = expected.detach().to("cpu", torch.float64)
    difference = found.detach().to("cpu", torch.float64) - wide
    size = float(wide.norm())
    error = float(difference.norm()) / size if size > 0 else float(difference.norm())
    return error if error == error else float("inf")


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest `relative_error` of several tensors. ValueError where their numbers differ."""
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
