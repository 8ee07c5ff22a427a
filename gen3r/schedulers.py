"""Noise schedules and solver coefficients: Euler as upstream configures it, UniPC and DPM-Solver++.

A `Schedule` is a table made once per request: timesteps for the model and, per step, the scalars of
`gen3r_kernels.guidance_step`. Behaviour 10: diffusers applies Euler's shift twice when it makes
inference steps, and the `shift` of a call does nothing for Euler; UniPC and DPM-Solver++ take it
and truncate their timesteps to integers.

Sources: flow matching (arXiv 2210.02747), UniPC (arXiv 2302.04867), DPM-Solver++
(arXiv 2211.01095).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler

from gen3r_kernels import EulerStep, MultistepStep

SOLVERS = ("euler", "unipc", "dpm++")
EULER_SHIFT = 2.0
CALL_SHIFT = 5.0  # upstream's `shift` argument
TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Schedule:
    """Everything a denoising loop needs to know about its solver.

    timesteps : per step, the model's timestep (0 to 1000)
    sigmas : per step the noise level, and a final 0
    steps : per step, the coefficients of `guidance_step`
    """

    solver: str
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    steps: tuple[EulerStep | MultistepStep, ...]

    def __len__(self) -> int:
        return len(self.steps)


def make_euler_scheduler(**overrides: Any) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' scheduler with upstream's configuration (shift 2)."""
    return FlowMatchEulerDiscreteScheduler(
        **{"num_train_timesteps": TRAIN_STEPS, "shift": EULER_SHIFT, **overrides}
    )


def make_schedule(
    solver: str,
    num_steps: int,
    *,
    shift: float = CALL_SHIFT,
    euler: FlowMatchEulerDiscreteScheduler | None = None,
) -> Schedule:
    """Tables for `num_steps` steps of ``euler``, ``unipc`` or ``dpm++``.

    shift : of UniPC and DPM-Solver++. euler : the checkpoint's scheduler; None takes upstream's.

    Raises
    ------
    ValueError : an unknown solver, or fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_inference_steps {num_steps} is below 1")
    if solver == "euler":
        return _euler(num_steps, euler or make_euler_scheduler())
    if solver == "unipc":
        sigmas = unipc_sigmas(num_steps, shift)
        return _multistep("unipc", sigmas, _unipc_steps(sigmas))
    if solver == "dpm++":
        sigmas = dpm_sigmas(num_steps, shift)
        return _multistep("dpm++", sigmas, _dpm_steps(sigmas))
    raise ValueError(f"solver '{solver}' is unknown; known: {', '.join(SOLVERS)}")


def _euler(num_steps: int, scheduler: FlowMatchEulerDiscreteScheduler) -> Schedule:
    scheduler = type(scheduler).from_config(scheduler.config)  # set_timesteps changes the object
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.tolist()
    steps = tuple(EulerStep(b - a) for a, b in pairwise(sigmas))
    return Schedule("euler", tuple(scheduler.timesteps.tolist()), tuple(sigmas), steps)


def _shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def unipc_sigmas(num_steps: int, shift: float) -> np.ndarray:
    """UniPC's noise levels [num_steps] float64: shifted, from 1 - 1/1000 down, no final 0."""
    start = float(np.float32(1 - 1 / TRAIN_STEPS))
    return _shifted(np.linspace(start, 0.0, num_steps + 1)[:-1], shift)


def dpm_sigmas(num_steps: int, shift: float) -> np.ndarray:
    """DPM-Solver++'s noise levels [num_steps] float64: shifted, from 1 down, no final 0."""
    return _shifted(np.linspace(1.0, 0.0, num_steps + 1)[:-1], shift)


def _multistep(solver: str, sigmas: np.ndarray, steps: tuple[MultistepStep, ...]) -> Schedule:
    timesteps = tuple(float(int(s * TRAIN_STEPS)) for s in sigmas)
    levels = tuple(np.append(sigmas, 0.0).astype(np.float32).tolist())
    return Schedule(solver, timesteps, levels, steps)


def _log_snr(sigma: float) -> float:
    """lambda = log(alpha) - log(sigma) with alpha = 1 - sigma."""
    if sigma <= 0:
        return math.inf
    if sigma >= 1:
        return -math.inf
    return math.log(1 - sigma) - math.log(sigma)


def _predictor(s: float, t: float) -> tuple[float, float, float]:
    """(sigma ratio, factor, lambda step) of the first-order exponential update s -> t.

    x_t = ratio * x_s + factor * m, factor = alpha_t * (1 - exp(-h)), h = lambda_t - lambda_s.
    """
    h = _log_snr(t) - _log_snr(s)
    return t / s, (1 - t) * -math.expm1(-h), h


def _second_order(sigmas: list[float], i: int, h: float) -> float:
    """r = (lambda_i - lambda_{i-1}) / h: length of the previous step in units of this one."""
    return (_log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])) / h


def _unipc_steps(table: np.ndarray) -> tuple[MultistepStep, ...]:
    """UniPC with B2 = e^-h - 1, order 2, first order on the first and last step."""
    sigmas = [*table.tolist(), 0.0]
    count = len(table)
    steps = []
    for i in range(count):
        corrector = None
        if i > 0:
            corrector = _unipc_corrector(sigmas, i, order=min(2, i, count - i + 1))
        ratio, factor, h = _predictor(sigmas[i], sigmas[i + 1])
        latest, previous = factor, 0.0
        if i > 0 and i < count - 1:
            previous = factor * 0.5 / _second_order(sigmas, i, h) * -1
            latest = factor - previous
        steps.append(MultistepStep(sigmas[i], corrector, (ratio, latest, previous)))
    return tuple(steps)


def _unipc_corrector(sigmas: list[float], i: int, order: int) -> tuple[float, float, float, float]:
    """Weights of (x_{i-1}, m_{i-1}, m_{i-2}, m_i) that correct the sample at step i."""
    ratio, factor, h = _predictor(sigmas[i - 1], sigmas[i])
    if order == 1:
        return ratio, factor * 0.5, 0.0, factor * 0.5
    # Two conditions on the weights of the differences (arXiv 2302.04867, eq. 10, for -h).
    r = -_second_order(sigmas, i - 1, h)
    phi = math.expm1(-h)
    phi_2 = phi / -h - 1
    phi_3 = phi_2 / -h - 0.5
    rhs = (phi_2 / phi, 2 * phi_3 / phi)
    old = (rhs[1] - rhs[0]) / (r - 1)
    new = rhs[0] - old
    slope = factor * old / r
    return ratio, factor - slope - factor * new, slope, factor * new


def _dpm_steps(table: np.ndarray) -> tuple[MultistepStep, ...]:
    """DPM-Solver++ 2M (midpoint), first order on the first and last step."""
    sigmas = [*table.tolist(), 0.0]
    steps = []
    for i in range(len(table)):
        ratio, factor, h = _predictor(sigmas[i], sigmas[i + 1])
        latest, previous = factor, 0.0
        # From sigma = 1 the previous step is infinitely long: its difference has no weight.
        if 0 < i < len(table) - 1 and math.isfinite(_log_snr(sigmas[i - 1])):
            previous = -factor * 0.5 / _second_order(sigmas, i, h)
            latest = factor - previous
        steps.append(MultistepStep(sigmas[i], None, (ratio, latest, previous)))
    return tuple(steps)
