"""How far a denoising loop's latents are from those of the plain pipeline, step by step.

The plain pipeline is `gen3r.stages.denoise`: nothing hoisted, nothing shared, and in float32 no
TF32. A curve holds, after every step, |x - reference| / |reference| and the cosine of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gen3r import stages
from gen3r.run import full_float32
from gen3r.schedulers import Schedule
from gen3r.transformer import Conditions, WanTransformer
from gen3r_engine.denoiser import Denoiser

Keep = Callable[[int, Tensor], None]  # index of the step, latents [n, C, f, h, 2 w] float32 on host


@dataclass(frozen=True)
class Curve:
    """Per step |x - reference| / |reference| (0 is equal) and cosine (1 is equal)."""

    rel_error: tuple[float, ...]
    cosine: tuple[float, ...]

    @property
    def last(self) -> float:
        """The relative error after the last step."""
        return self.rel_error[-1]


def compare(
    found: Tensor,  # [n, C, f, h, 2 w]
    reference: Tensor,  # the same shape
) -> tuple[float, float]:
    """Relative error and cosine, summed in float64.

    Raises
    ------
    ValueError : different shapes.
    """
    if found.shape != reference.shape:
        raise ValueError(
            f"latents {list(found.shape)} and reference {list(reference.shape)} differ in shape; "
            "compare runs of the same request"
        )
    x, y = found.double().flatten(), reference.double().flatten()
    size = float(y.norm())
    product = float(x.norm()) * size
    error = float((x - y).norm())
    relative = error / size if size > 0 else (0.0 if error == 0 else math.inf)
    cosine = float(x @ y) / product if product > 0 else (1.0 if error == 0 else 0.0)
    return relative, cosine


def curve(found: Sequence[Tensor], reference: Sequence[Tensor]) -> Curve:
    """The curve of a run over the steps that the reference has.

    Raises
    ------
    ValueError : fewer steps than the reference, no steps, or different shapes.
    """
    if not reference or len(found) < len(reference):
        raise ValueError(f"{len(found)} steps to compare with {len(reference)} of the reference")
    pairs = [compare(x, y) for x, y in zip(found, reference, strict=False)]
    return Curve(tuple(e for e, _ in pairs), tuple(c for _, c in pairs))


class Recorder:
    """Keeps the latents of every step on the host. Pass it as `on_step`."""

    def __init__(self) -> None:
        self.latents: list[Tensor] = []

    def __call__(self, index: int, timestep: float, latents: Tensor) -> None:
        self.latents.append(latents.detach().float().cpu().clone())


def part_of(schedule: Schedule, start: int, stop: int) -> Schedule:
    """Steps `start` to `stop` (excluded) of a schedule; Euler's steps do not know their past."""
    return replace(
        schedule,
        timesteps=schedule.timesteps[start:stop],
        sigmas=schedule.sigmas[start : stop + 1],
        steps=schedule.steps[start:stop],
    )


@torch.no_grad()
def plain_latents(
    transformer: WanTransformer,
    conditions: Conditions,
    noise: Tensor,  # [n, C, f, h, 2 w] float32
    schedule: Schedule,
    guidance_scale: float,
    keep: Keep | None = None,
) -> list[Tensor]:
    """Latents after every step of the plain pipeline, on the host; `keep` is told each at once."""
    recorder = Recorder()

    def on_step(index: int, timestep: float, latents: Tensor) -> None:
        recorder(index, timestep, latents)
        if keep is not None:
            keep(index, recorder.latents[-1])

    with full_float32(transformer.dtype == torch.float32):
        stages.denoise(transformer, conditions, noise, schedule, guidance_scale, on_step)
    return recorder.latents


@torch.no_grad()
def engine_latents(
    denoiser: Denoiser,
    conditions: Conditions,
    noise: Tensor,  # [n, C, f, h, 2 w] float32
    schedule: Schedule,
    guidance_scale: float,
) -> list[Tensor]:
    """Latents after every step of the engine's loop, on the host."""
    recorder = Recorder()
    with full_float32(denoiser.transformer.dtype == torch.float32):
        denoiser.run(conditions, noise, schedule, guidance_scale, recorder)
    return recorder.latents
