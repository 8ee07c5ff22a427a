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


def wrong(error: float, precision: str, own: float) -> str | None:
    """Why a result with this error against float32 is not to be accepted; None: it may be.

    own : PyTorch's error in the same precision; twice that is allowed where it is above the bound.
    What 8 bits cost is not PyTorch's to say: in fp8 results must only be finite.
    """
    if error == float("inf"):
        return f"it gives numbers that are not finite in {precision}"
    limit = max(BOUNDS.get(precision, 0.0), 2 * own)
    if precision == "fp8" or error <= limit:
        return None
    return (
        f"it differs from float32 by {error:.2e}, PyTorch in {precision} by {own:.2e}; "
        f"the bound is {limit:.2e}"
    )


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest `relative_error` of several tensors. ValueError where their numbers differ."""
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
