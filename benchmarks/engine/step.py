"""The denoising step and the 50-step loop: upstream's way, and the engine's presets.

gen3r-engine bench --suite step
gen3r-engine bench --suite step --preset exact fp8 -- --steps 50 --eager_steps 3
gen3r-engine bench --suite step -- --steps 4 --frames 5 --size 112        # a quick look

Only the transformer is built, with the seeded weights of benchmarks/weights.py. Rows: denoise_step
(each step of the loop; its first call apart), denoise_loop_<steps>, host_gap.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.energy import Meter
from benchmarks.engine.common import (
    EAGER,
    GUIDANCE,
    Options,
    Provider,
    Rows,
    Unavailable,
    parser,
    release,
    resolve_options,
    tflops_rows,
)
from benchmarks.engine.gaps import profiled_gaps
from benchmarks.engine.inputs import StepInputs, make_inputs
from benchmarks.engine.work import step_flops
from benchmarks.harness import COMPILE
from benchmarks.timing import Ceiling, Stopwatch, measure_ceilings
from benchmarks.weights import build_transformer
from gen3r import stages
from gen3r.precision import EXACT, apply_precision
from gen3r.schedulers import Schedule, make_schedule
from gen3r.transformer import WanTransformer
from gen3r_engine.caches import CacheFolder, preload_compiler
from gen3r_engine.denoiser import Denoiser
from gen3r_engine.fidelity import part_of
from gen3r_kernels import Backends

WARM_STEPS = 2
GAP_STEPS = 6


class WrongResult(RuntimeError):
    """Latents that are not finite, or not the ones that eager arrives at."""


@dataclass
class Loop:
    """What one denoising loop gave.

    latents : after the last step. step_ms, gap_ms : per step. seconds : of the whole call.
    joules, peak_gib : None where they cannot be read.
    """

    latents: Tensor
    step_ms: list[float]
    gap_ms: list[float]
    seconds: float
    joules: float | None
    peak_gib: float | None


class Clock:
    """Ends of steps: CUDA events on a GPU, else the processor's clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.stamps: list[torch.cuda.Event | float] = []

    def __call__(self, *_: object) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.stamps.append(event)
        else:
            self.stamps.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between neighbouring stamps."""
        found = []
        for before, after in zip(self.stamps, self.stamps[1:], strict=False):
            if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                found.append(before.elapsed_time(after))
            elif isinstance(before, float) and isinstance(after, float):
                found.append(1000 * (after - before))
        return found


def eager_loop(
    transformer: WanTransformer, inputs: StepInputs, schedule: Schedule, meter: Meter
) -> Loop:
    """The loop as `Gen3RPipeline` runs it."""
    clock = Clock(inputs.noise.device)

    def run() -> Tensor:
        clock()
        return stages.denoise(
            transformer, inputs.conditions, inputs.noise, schedule, GUIDANCE, clock
        )

    return _measured(run, inputs, meter, lambda: (clock.milliseconds(), []))


def engine_loop(denoiser: Denoiser, inputs: StepInputs, schedule: Schedule, meter: Meter) -> Loop:
    """The loop as the engine runs it."""
    clock = Clock(inputs.noise.device)
    timed = None if clock.cuda else clock  # a GPU's steps are timed by the denoiser's own events

    def run() -> Tensor:
        clock()
        return denoiser.run(inputs.conditions, inputs.noise, schedule, GUIDANCE, timed)

    def times() -> tuple[list[float], list[float]]:
        if clock.cuda:
            return list(denoiser.step_times), list(denoiser.gaps)
        return clock.milliseconds(), []

    return _measured(run, inputs, meter, times)


def _measured(
    run: Callable[[], Tensor],
    inputs: StepInputs,
    meter: Meter,
    times: Callable[[], tuple[list[float], list[float]]],
) -> Loop:
    device = inputs.noise.device
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, start = meter.read(), time.perf_counter()
    with torch.no_grad():
        latents = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds, after = time.perf_counter() - start, meter.read()
    if not latents.isfinite().all():
        raise WrongResult("the latents are not finite")
    step_ms, gap_ms = times()
    joules = None if before is None or after is None else after - before
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return Loop(latents, step_ms, gap_ms, seconds, joules, peak)


def make_denoiser(transformer: WanTransformer, provider: Provider, options: Options) -> Denoiser:
    """The engine's denoiser in the provider's precision.

    Raises
    ------
    Unavailable : the preset does not run here, or not with this model.
    """
    config, choice = provider.config(options), provider.choice(options)
    if choice.precision != EXACT:
        try:
            apply_precision(transformer, choice.precision)
        except ValueError as error:
            raise Unavailable(str(error)) from error
    if config.compiled:
        CacheFolder.of(config.cache_dir).use_for_compiling()
        preload_compiler()
    return Denoiser(transformer, compiled=config.compiled, captured=config.captured)


def backends_of(provider: Provider, options: Options) -> Backends:
    """The operators that the provider's transformer is built with."""
    if provider.preset is None:
        return EAGER
    return Backends(attention=provider.choice(options).attention)


class StepSuite:
    """Measures provider after provider."""

    def __init__(self, options: Options, rows: Rows) -> None:
        self.options, self.rows = options, rows
        self.meter = Meter(options.device)
        if self.meter.why_not is not None:
            print(f"no energy rows: {self.meter.why_not}", flush=True)
        self.schedule = make_schedule("euler", options.steps)
        self.flops = step_flops(
            options.model.transformer, options.frames, options.size, options.batch
        )
        watch = Stopwatch(options.device)
        self.ceilings: dict[str, Ceiling] = measure_ceilings(watch)
        rows.ceilings(self.ceilings)
        del watch
        release(options.device)
        self.eager_latents: Tensor | None = None

    def measure(self, provider: Provider) -> None:
        """All rows of a provider."""
        options = self.options
        backends = backends_of(provider, options)
        transformer = build_transformer(
            options.model.transformer, options.dtype, options.device, backends
        )
        inputs = make_inputs(transformer, options.frames, options.size, options.batch)
        if provider.preset is None:
            self._eager(provider, transformer, inputs)
        else:
            self._engine(provider, transformer, inputs)

    def _eager(self, provider: Provider, transformer: WanTransformer, inputs: StepInputs) -> None:
        count = min(self.options.arguments.eager_steps, len(self.schedule))
        warm = part_of(self.schedule, 0, 1)
        started = time.perf_counter()
        eager_loop(transformer, inputs, warm, self.meter)
        first = time.perf_counter() - started
        loop = eager_loop(transformer, inputs, part_of(self.schedule, 0, count), self.meter)
        if count >= WARM_STEPS:
            short = part_of(self.schedule, 0, WARM_STEPS)
            self.eager_latents = (
                loop.latents
                if count == WARM_STEPS
                else eager_loop(transformer, inputs, short, self.meter).latents
            ).cpu()
        self._step_rows(provider, loop, first)

    def _engine(self, provider: Provider, transformer: WanTransformer, inputs: StepInputs) -> None:
        denoiser = make_denoiser(transformer, provider, self.options)
        count = min(WARM_STEPS, len(self.schedule))
        started = time.perf_counter()
        warm = engine_loop(denoiser, inputs, part_of(self.schedule, 0, count), self.meter)
        first = time.perf_counter() - started
        config: dict[str, Any] = {}
        if self.eager_latents is not None and count == WARM_STEPS:
            difference = (warm.latents.cpu() - self.eager_latents).norm()
            share = float(difference / self.eager_latents.norm())
            config["from_eager_after_2_steps"] = float(f"{share:.4g}")
        captures = denoiser.captures
        loop = engine_loop(denoiser, inputs, self.schedule, self.meter)
        if denoiser.captures != captures:
            raise WrongResult("the step was captured again for a shape that was known")
        self._step_rows(provider, loop, first, **config)
        name = f"denoise_loop_{len(self.schedule)}"
        self.rows.add(name, provider.name, "time", "s", [loop.seconds])
        if loop.joules is not None:
            self.rows.add(name, provider.name, "energy", "J", [loop.joules])
        self._gap_rows(provider, denoiser, inputs, loop)
        denoiser.release()

    def _gap_rows(
        self, provider: Provider, denoiser: Denoiser, inputs: StepInputs, loop: Loop
    ) -> None:
        """Time in which the GPU ran nothing between two steps."""
        if not denoiser.captured:
            return
        short = part_of(self.schedule, 0, min(GAP_STEPS, len(self.schedule)))
        gaps = profiled_gaps(lambda: engine_loop(denoiser, inputs, short, self.meter))
        config: dict[str, Any] = {"method": "profiler"}
        if not gaps:
            print("no kernels in the profile: host_gap is that between events", flush=True)
            gaps, config = loop.gap_ms, {"method": "events"}
        self.rows.add("host_gap", provider.name, "time", "ms", gaps, **config)

    def _step_rows(self, provider: Provider, loop: Loop, first: float, **config: Any) -> None:
        add, name, case = self.rows.add, provider.name, "denoise_step"
        add(case, name, "time", "ms", loop.step_ms, flops=self.flops, **config)
        tflops_rows(self.rows, case, provider, loop.step_ms, self.flops, self.ceilings)
        if loop.peak_gib is not None:
            add(case, name, "memory", "GiB", [loop.peak_gib], note="transformer alone")
        if loop.joules is not None:
            add(case, name, "energy", "J", [loop.joules / len(loop.step_ms)])
        add(case, name, "time", "s", [first], **COMPILE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite and write benchmarks/results/<gpu>/step.jsonl; 1 if a provider failed."""
    made = parser("step", __doc__, ("eager", "exact", "fp8"))
    made.add_argument("--eager_steps", type=int, default=3, help="timed steps of eager (3)")
    options = resolve_options(made.parse_args(argv))
    rows = Rows("step", options)
    suite = StepSuite(options, rows)
    rows.each(suite.measure)
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())
