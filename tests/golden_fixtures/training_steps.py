"""What both training fixtures share: scripted randomness, frames, checks of single values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.golden_fixtures.golden import END_TO_END_TOLERANCE, Golden
from tests.golden_fixtures.tiny_pipeline import enlarge

IMAGE_SIZE = 560  # upstream's adapter always returns 40 x 40 tokens, so these files use 560 px


def training_frames(
    golden: Golden,
) -> Tensor:  # [F, 3, 560, 560] float32 in [0, 1]
    """The stored frames, every pixel repeated."""
    return enlarge(golden["in/frames_u8"], IMAGE_SIZE)


def shared_noise(golden: Golden, name: str) -> Tensor:
    """``noise`` or ``vae_posterior_noise`` of the fixture's frame count, from the file e2e."""
    return golden.sibling("e2e")[f"shared_F{golden.meta['num_frames']}/{name}"]


def posterior_noise(
    golden: Golden,
    draw: int,
) -> Tensor:  # [1, 16, f, h, w]
    """Draw k of the scripted randomness: the shared noise rolled by k along the channels."""
    return torch.roll(shared_noise(golden, "vae_posterior_noise"), draw, 1)


def check_value(
    golden: Golden,
    name: str,
    actual: float,
    reference: float,
    tolerance: float = END_TO_END_TOLERANCE,
) -> None:
    """Compare with a number of the metadata."""
    pair = (torch.tensor([value], dtype=torch.float64) for value in (actual, reference))
    golden.compare(name, *pair, tolerance)


def check_gradients(
    golden: Golden,
    gradients: Mapping[str, Tensor | None],
    norms: Mapping[str, float],
    total: float,
    prefix: str = "",
    tolerance: float = END_TO_END_TOLERANCE,
) -> None:
    """Every parameter's gradient norm, the total norm, and the gradients stored under
    ``<prefix>grad/``.
    """
    flowing = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    assert set(flowing) == set(norms)
    for name, norm in norms.items():
        check_value(
            golden, f"{prefix}grad_norm/{name}", flowing[name].norm().item(), norm, tolerance
        )
    all_norms = torch.stack([gradient.norm() for gradient in flowing.values()])
    check_value(golden, f"{prefix}total_grad_norm", all_norms.norm().item(), total, tolerance)
    for name in golden.names:
        if name.startswith(f"{prefix}grad/"):
            golden.check(name, flowing[name.removeprefix(f"{prefix}grad/")], tolerance)
