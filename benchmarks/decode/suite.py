"""Decoders, encoders, heads and fusion: each stage alone, upstream's way beside ours.

gen3r-engine bench --suite decode
gen3r-engine bench --suite decode --case vae_decode adapter_decode --preset exact
gen3r-engine bench --suite decode --case encode_precision
gen3r-engine bench --suite decode -- --model nano --frames 5 --size 56      # a quick look

Rows: vae_encode, vae_decode, adapter_decode, camera_depth_heads, vggt_49, decode_stage, fuse_points
(time, TFLOP/s with the share of the ceiling, memory: weights of the stage and what the call
allocates at its peak), and encode_precision (latents against the float32 encoder's). Counted work
is upstream's, whatever a provider leaves out. `from_eager` in a row's config is how far the outputs
lie from those of provider `eager`, where that ran before.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.decode.cases import CASES, Problem, Setting
from benchmarks.decode.precision import encode_precision
from benchmarks.engine.common import (
    PROVIDERS,
    Options,
    Provider,
    Rows,
    Unavailable,
    parser,
    release,
    resolve_options,
    tflops_rows,
)
from benchmarks.harness import COMPILE, BadInput
from benchmarks.kernels.case import as_tuple
from benchmarks.timing import Ceiling, Stopwatch, measure_ceilings

PRECISION = "encode_precision"
ALL_CASES = (*CASES, PRECISION)
COMPARED = 2**20  # values of an output that are kept to compare providers


class WrongResult(RuntimeError):
    """An output that is not finite."""


def chosen_cases(patterns: Sequence[str]) -> list[str]:
    """The cases that fit, in their order. BadInput where none does."""
    found = [c for c in ALL_CASES if any(fnmatch.fnmatch(c, p) for p in patterns or ["*"])]
    if not found:
        raise BadInput(f"no case fits {list(patterns)}; known: {', '.join(ALL_CASES)}")
    return found


def counted_flops(case: str, options: Options) -> int:
    """Operations of upstream's way, counted from shapes on the meta device."""
    setting = Setting(options, PROVIDERS["eager"], torch.device("meta"))
    try:
        problem = CASES[case](setting)
    except Unavailable:
        return 0
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        problem.run()
    return int(counter.get_total_flops())


def sample_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Evenly spaced values of every output, on the host, in float64.

    Raises
    ------
    WrongResult : values that are not finite.
    """
    found = []
    for index, output in enumerate(outputs):
        flat = output.flatten()
        values = flat[:: max(1, flat.numel() // COMPARED)].double().cpu()
        if not values.isfinite().all():
            raise WrongResult(f"output {index} of {list(output.shape)} is not finite")
        found.append(values)
    return found


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative difference (Frobenius) among the outputs."""
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(ours, theirs, strict=True)
    )


@dataclass
class DecodeSuite:
    """One run of the suite."""

    options: Options
    rows: Rows
    cases: list[str]
    eager: dict[str, list[Tensor]] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.options.device)
        self.ceilings: dict[str, Ceiling] = measure_ceilings(self.watch)
        self.rows.ceilings(self.ceilings)

    def measure(self, provider: Provider) -> None:
        """All cases of a provider; one that breaks does not cost the others their rows."""
        for case in self.cases:
            if case == PRECISION:
                continue
            try:
                setting = Setting(self.options, provider, self.options.device)
                with torch.no_grad():
                    self._measure(case, provider, CASES[case](setting))
            except Unavailable as reason:
                print(f"{case} {provider.name}: skipped: {reason}", flush=True)
            except Exception as error:
                text = f"{case} {provider.name}: {type(error).__name__}: {error}"
                self.rows.failed.append(text)
                print(f"FAILED: {text}", flush=True)
            release(self.options.device)

    def _measure(self, case: str, provider: Provider, problem: Problem) -> None:
        first = self.watch.first(lambda: problem.run)
        config: dict[str, Any] = {}
        if problem.compared:
            outputs = sample_of(as_tuple(problem.run()))
            if provider.preset is None:
                self.eager[case] = outputs
            elif case in self.eager:
                share = difference(outputs, self.eager[case])
                config["from_eager"] = float(f"{share:.3g}")
        times = self.watch.times(lambda: problem.run)
        self.rows.add(case, provider.name, "time", "ms", times, **config)
        flops = self.flops.get(case)
        if flops is None:
            flops = self.flops[case] = counted_flops(case, self.options)
        if flops:
            tflops_rows(self.rows, case, provider, times, flops, self.ceilings)
        working = self.watch.peak_gib(lambda: problem.run)
        if working is not None:
            held = sum(
                p.numel() * p.element_size() for m in problem.modules for p in m.parameters()
            )
            weights = held / 2**30
            self.rows.add(
                *(case, provider.name, "memory", "GiB", [weights + working]),
                weights_gib=weights,
                working_gib=working,
            )
        self.rows.add(case, provider.name, "time", "s", [first], **COMPILE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite and write benchmarks/results/<gpu>/decode.jsonl; 1 if a case failed."""
    made = parser("decode", __doc__, ("eager", "exact"))
    made.add_argument("--case", nargs="+", default=[], help="only these cases (* and ? allowed)")
    options = resolve_options(made.parse_args(argv))
    cases = chosen_cases(options.arguments.case)
    rows = Rows("decode", options)
    suite = DecodeSuite(options, rows, cases)
    rows.each(suite.measure)
    if PRECISION in cases:
        encode_precision(options, rows, suite.watch)
    return rows.finish()


if __name__ == "__main__":
    sys.exit(main())
