"""Training steps of both stages, upstream's way beside ours: time, peak memory, MFU.

gen3r-engine bench --suite training
gen3r-engine bench --suite training --case diffusion_step --preset exact -- --checkpointing full
gen3r-engine bench --suite training -- --model nano --frames 5 --size 112        # a quick look

Cases: diffusion_step (stage 2 from latents: forward, backward, update), diffusion_step_encoded
(the same from frames: VGGT, both autoencoders), adapter_step (stage 1 from frames; 25 frames by
default), optimizer_step (the update alone), optimizer_step_stochastic (without float32 masters).
Memory is all that PyTorch holds at the step's peak, weights, moments and frozen modules included.
MFU counts the operations of the mathematics (`gen3r_training.flops`) against the data sheet's dense
bf16 rate.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch

from benchmarks.decode.cases import Setting
from benchmarks.engine.common import (
    Options,
    Provider,
    Rows,
    Unavailable,
    parser,
    release,
    resolve_options,
)
from benchmarks.harness import COMPILE, BadInput
from benchmarks.training.steps import (
    CLIP_NORM,
    LEARNING_RATE,
    EagerAdamW,
    StepOptions,
    StepProblem,
    adapter_problem,
    diffusion_problem,
)
from benchmarks.weights import build_transformer
from gen3r_training.flops import peak_flops
from gen3r_training.optimizer import Optimizer

ADAPTER_FRAMES = 25
WARM_STEPS = 1


def _from_latents(setting: Setting, options: StepOptions) -> StepProblem:
    return diffusion_problem(setting, options, encode=False)


def _from_frames(setting: Setting, options: StepOptions) -> StepProblem:
    return diffusion_problem(setting, options, encode=True)


def _update(setting: Setting, options: StepOptions) -> StepProblem:
    """The optimiser's step of the transformer with gradients that are there."""
    o = setting.options
    transformer = build_transformer(
        o.model.transformer, o.dtype, setting.device, setting.backends
    ).requires_grad_(True)
    if o.dtype == torch.float32:
        optimizer: Any = Optimizer(transformer, lr=LEARNING_RATE)
    elif setting.upstream:
        optimizer = EagerAdamW(transformer)
    else:
        optimizer = Optimizer(transformer, lr=LEARNING_RATE, master=options.master_weights)

    def run() -> tuple[float, float]:
        for parameter in transformer.parameters():
            parameter.grad = parameter.detach()
        return 0.0, optimizer.step(LEARNING_RATE, CLIP_NORM)

    return StepProblem(run, 0.0)


def _update_stochastic(setting: Setting, options: StepOptions) -> StepProblem:
    """The same without masters; upstream has no such form."""
    if setting.upstream or setting.options.dtype == torch.float32:
        raise Unavailable("stochastic rounding is ours, for bf16 weights")
    return _update(setting, dataclasses.replace(options, master_weights="stochastic"))


CASES: dict[str, Callable[[Setting, StepOptions], StepProblem]] = {
    "diffusion_step": _from_latents,
    "diffusion_step_encoded": _from_frames,
    "adapter_step": adapter_problem,
    "optimizer_step": _update,
    "optimizer_step_stochastic": _update_stochastic,
}


class WrongResult(RuntimeError):
    """A loss that is not finite."""


@dataclass
class TrainingSuite:
    """One run of the suite."""

    options: Options
    rows: Rows
    cases: list[str]
    step_options: StepOptions
    repeats: int
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def measure(self, provider: Provider) -> None:
        """All cases of a provider; one that breaks does not cost the others their rows."""
        for case in self.cases:
            options = self.options
            if case == "adapter_step" and options.arguments.frames is None:
                options = dataclasses.replace(options, frames=min(ADAPTER_FRAMES, options.frames))
            try:
                self._measure(case, provider, options)
            except Unavailable as reason:
                print(f"{case} {provider.name}: skipped: {reason}", flush=True)
            except Exception as error:
                text = f"{case} {provider.name}: {type(error).__name__}: {error}"
                self.rows.failed.append(text)
                print(f"FAILED: {text}", flush=True)
            release(self.options.device)

    def _measure(self, case: str, provider: Provider, options: Options) -> None:
        cuda = options.cuda
        problem = CASES[case](Setting(options, provider, options.device), self.step_options)
        if cuda:
            torch.cuda.synchronize()
        seconds, found = [], []
        for step in range(1 + WARM_STEPS + self.repeats):
            if cuda and step == 1:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            found.append(problem.run())  # ends with the loss on the host
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            if not all(map(torch.tensor(found[-1]).isfinite().tolist().__getitem__, (0, 1))):
                raise WrongResult(f"step {step}: loss and gradient norm {found[-1]}")
        times = seconds[1 + WARM_STEPS :]
        config = self._config(case, provider, found)
        shape = f"{options.frames}x{options.size}x{options.size}"
        self.rows.add(case, provider.name, "time", "s", times, shape=shape, **config)
        peak = peak_flops(options.device)
        if problem.flops:
            rates = [1e-12 * problem.flops / s for s in times]
            share = None if peak is None else 1e12 * sorted(rates)[len(rates) // 2] / peak
            self.rows.add(
                *(case, provider.name, "tflops", "TFLOP/s", rates),
                share=share,
                shape=shape,
                ceiling="data sheet, dense bf16 (MFU)",
                flops=problem.flops,
            )
        if cuda:
            gib = torch.cuda.max_memory_allocated() / 2**30
            self.rows.add(case, provider.name, "memory", "GiB", [gib], shape=shape)
        self.rows.add(case, provider.name, "time", "s", seconds[:1], shape=shape, **COMPILE)

    def _config(
        self, case: str, provider: Provider, found: list[tuple[float, float]]
    ) -> dict[str, Any]:
        """Losses and gradient norms by step, and how far they lie from those of `eager`."""
        config: dict[str, Any] = {
            "losses": [loss for loss, _ in found],
            "gradient_norms": [norm for _, norm in found],
        }
        if provider.preset is not None:
            config |= dataclasses.asdict(self.step_options)
        eager = self.losses.get(case)
        if provider.preset is None:
            self.losses[case] = found
        elif eager is not None:
            pairs = zip(found, eager, strict=True)
            apart = [
                abs(a - b) / max(abs(b), 1e-12) for x, y in pairs for a, b in zip(x, y, strict=True)
            ]
            config["from_eager"] = float(f"{max(apart):.3g}")
        return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite and write benchmarks/results/<gpu>/training.jsonl; 1 if a case failed."""
    made = parser("training", __doc__, ("eager", "exact"))
    made.add_argument("--case", nargs="+", default=[], help="only these cases (* and ? allowed)")
    made.add_argument("--checkpointing", choices=("none", "selective", "full"), default="selective")
    made.add_argument("--kept_blocks", type=int, default=0, help="whose linear layers are kept")
    made.add_argument("--master_weights", choices=("float32", "stochastic"), default="float32")
    made.add_argument("--compiled", action="store_true", help="blocks through torch.compile")
    made.add_argument("--repeats", type=int, default=3, help="timed steps (default: 3)")
    arguments = made.parse_args(argv)
    options = resolve_options(arguments)
    if options.size % 112:
        raise BadInput(f"--size {options.size} is not a multiple of 112: latents would be padded")
    cases = [c for c in CASES if any(fnmatch(c, p) for p in arguments.case or ["*"])]
    if not cases:
        raise BadInput(f"no case fits {arguments.case}; known: {', '.join(CASES)}")
    chosen = StepOptions(
        arguments.checkpointing,
        arguments.kept_blocks,
        arguments.master_weights,
        arguments.compiled,
    )
    rows = Rows("training", options)
    suite = TrainingSuite(options, rows, cases, chosen, arguments.repeats)
    rows.each(suite.measure)
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())
