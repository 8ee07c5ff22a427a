"""Classifier-free guidance and the solver update of the latents, as one element-wise operator.

v = v_uncond + g * (v_cond - v_uncond)                       (arXiv 2207.12598)

Euler:      x' = x + dt * v                                   (flow matching, arXiv 2210.02747)
Multistep:  m = x - sigma * v                                 (prediction of the clean sample)
            c = sum(corrector * (x_last, m_1, m_2, m))        (x itself without a corrector)
            x' = sum(predictor * (c, m, m_1))

The multistep form is UniPC (B2, order 2, arXiv 2302.04867) and DPM-Solver++ (2M, arXiv 2211.01095),
which has no corrector.

Every solver coefficient is a scalar of the schedule, so a step is linear in tensors that are
already there: it reads each once and writes each once.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class EulerStep:
    """x' = x + dt * v with dt = sigma_next - sigma."""

    dt: float


@dataclass(frozen=True)
class MultistepStep:
    """Coefficients of one UniPC or DPM-Solver++ step; see the module's formulas.

    Parameters
    ----------
    sigma : noise level of the incoming sample.
    corrector : weights of (x_last, m_1, m_2, m), or None (c is the incoming sample).
    predictor : weights of (c, m, m_1).
    """

    sigma: float
    corrector: tuple[float, float, float, float] | None
    predictor: tuple[float, float, float]


History = tuple[Tensor, ...]  # multistep: (corrected sample, m_1, m_2), newest first, float32


def _weighted(terms: list[tuple[float, Tensor]]) -> Tensor:
    (weight, tensor), *rest = [(w, t) for w, t in terms if w != 0.0]
    total = weight * tensor
    for weight, tensor in rest:
        total = total + weight * tensor
    return total


def guidance_step_reference(
    sample: Tensor,  # [B, C, F, H, W]
    uncond: Tensor | None,  # [B, C, F, H, W], None without guidance
    cond: Tensor,  # [B, C, F, H, W]
    guidance_scale: float,
    step: EulerStep | MultistepStep,
    history: History = (),
) -> tuple[Tensor, History]:  # next sample float32, new history
    """The definition in float32."""
    x, velocity = sample.float(), cond.float()
    if uncond is not None:
        velocity = uncond.float() + guidance_scale * (velocity - uncond.float())
    if isinstance(step, EulerStep):
        return x + step.dt * velocity, ()
    m = x - step.sigma * velocity
    corrected = x
    if step.corrector is not None:
        last, *models = history
        padded = [*models, m][:2]  # on the second step there is no m_2 and its weight is 0
        terms = [last, padded[0], padded[-1], m]
        corrected = _weighted(list(zip(step.corrector, terms, strict=True)))
    previous = history[1] if len(history) > 1 else m
    following = _weighted(list(zip(step.predictor, (corrected, m, previous), strict=True)))
    return following, (corrected, m, *history[1:2])


def guidance_step(
    sample: Tensor,  # [B, C, F, H, W]
    uncond: Tensor | None,  # [B, C, F, H, W]
    cond: Tensor,  # [B, C, F, H, W]
    guidance_scale: float,
    step: EulerStep | MultistepStep,
    history: History = (),
) -> tuple[Tensor, History]:  # next sample in the dtype of `sample`, new history
    """Combine the two noise predictions and advance the latents by one solver step."""
    following, history = guidance_step_reference(
        sample, uncond, cond, guidance_scale, step, history
    )
    return following.to(sample.dtype), history
