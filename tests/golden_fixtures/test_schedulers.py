"""schedulers: tables, traces and complete runs of Euler, UniPC and DPM-Solver++."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from gen3r.schedulers import Schedule, dpm_sigmas, make_euler_scheduler, make_schedule
from gen3r_kernels import EulerStep, guidance_step
from tests.golden_fixtures.golden import COMPONENT_TOLERANCE, Golden, relative_error

KIND = "schedulers"
SOLVERS = {"euler": "euler", "unipc": "unipc", "dpm": "dpm++"}


def trace(golden: Golden, schedule: Schedule, length: int) -> Tensor:
    sample, history, samples = golden["trace/x0"], (), []
    for step, velocity in zip(schedule.steps[:length], golden["trace/model_outputs"], strict=False):
        sample, history = guidance_step(sample, None, velocity, 1.0, step, history)
        samples.append(sample)
    return torch.stack(samples)


def test_euler(golden: Golden) -> None:
    config = {k: v for k, v in golden.meta["euler_config"].items() if not k.startswith("_")}
    scheduler = make_euler_scheduler(**config)
    golden.check("euler/train_sigmas", scheduler.sigmas[: len(golden["euler/train_sigmas"])])
    golden.check("euler/train_timesteps", scheduler.timesteps)
    for steps in golden.cases(r"euler/sigmas_(\d+)"):
        schedule = make_schedule("euler", int(steps), euler=scheduler)
        golden.check(f"euler/sigmas_{steps}", torch.tensor(schedule.sigmas))
        golden.check(f"euler/timesteps_{steps}", torch.tensor(schedule.timesteps))
        if f"euler/trace_{steps}" in golden:
            name = f"euler/trace_{steps}"
            golden.check(name, trace(golden, schedule, len(golden[name])))


def test_multistep(golden: Golden) -> None:
    for prefix in golden.cases(r"(unipc|dpm)/"):
        for case in golden.cases(rf"{prefix}/sigmas_(\d+_shift[\d.]+)"):
            steps, shift = re.fullmatch(r"(\d+)_shift([\d.]+)", case).groups()
            schedule = make_schedule(SOLVERS[prefix], int(steps), shift=float(shift))
            golden.check(f"{prefix}/sigmas_{case}", torch.tensor(schedule.sigmas))
            timesteps = torch.tensor(schedule.timesteps).long()
            golden.check(f"{prefix}/timesteps_{case}", timesteps, 0.0)
            if (name := f"{prefix}/trace_{case}") in golden:
                golden.check(name, trace(golden, schedule, len(golden[name])))
            if prefix == "dpm":
                sigmas = torch.from_numpy(dpm_sigmas(int(steps), float(shift)))
                golden.check(f"dpm/sampling_sigmas_{case}", sigmas)


def test_complete_runs(golden: Golden) -> None:
    for case in golden.cases(r"((?:unipc|dpm)/full\d+)_sigmas"):
        prefix, steps = re.fullmatch(r"(\w+)/full(\d+)", case).groups()
        # The run's shift is not named: solve its second noise level for it.
        sigma = golden[f"{case}_sigmas"].double()[1].item()
        linear = np.linspace(0.999 if prefix == "unipc" else 1.0, 0, int(steps) + 1)[1]
        shift = round(sigma * (1 - linear) / (linear * (1 - sigma)), 2)
        schedule = make_schedule(SOLVERS[prefix], int(steps), shift=shift)
        golden.check(f"{case}_sigmas", torch.tensor(schedule.sigmas))
        golden.check(f"{case}_timesteps", torch.tensor(schedule.timesteps).long(), 0.0)
        golden.check(f"{case}_trace", trace(golden, schedule, int(steps)))


def test_single_shift_is_wrong(golden: Golden) -> None:
    """Euler's tables with the shift applied once, as a plain reading of the paper gives."""
    for steps in golden.cases(r"euler/timesteps_(\d+)"):
        if int(steps) == 1:  # the first timestep is the same either way
            continue
        shift = golden.meta["euler_config"]["shift"]
        once = np.linspace(1.0, 1 / 1000, int(steps))
        wrong = torch.from_numpy(1000 * shift * once / (1 + (shift - 1) * once))
        reference = golden[f"euler/timesteps_{steps}"]
        assert relative_error(wrong, reference) > 10 * COMPONENT_TOLERANCE


def test_euler_steps_are_differences_of_sigmas() -> None:
    schedule = make_schedule("euler", 7)
    for step, (a, b) in zip(
        schedule.steps, zip(schedule.sigmas, schedule.sigmas[1:], strict=False), strict=True
    ):
        assert step == EulerStep(b - a)
