"""Run the kernel suite: check each provider against the float32 reference, then measure it.

gen3r-engine bench --suite kernels
gen3r-engine bench --suite kernels --case attention --provider triton fa3
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import (
    COMPILE,
    BadInput,
    Measurement,
    environment,
    five_digits,
    percentiles,
    write_rows,
)
from benchmarks.kernels import REAL, SMALL, cases
from benchmarks.kernels.case import Case, Outputs, Problem, Provider, Unavailable, as_tuple
from benchmarks.timing import Ceiling, Stopwatch, exact_float32, measure_ceilings

RATES = {"gbps": ("GB/s", 1e6), "tflops": ("TFLOP/s", 1e9)}  # unit, work per ms that is one of it
METRICS = {unit: metric for metric, (unit, _) in RATES.items()}
# Inductor needs 10 s and more of C++ compilation a case on a CPU.
COMPILE_SECONDS = 50.0  # of torch.compile in one run; further compile providers are left out
SLOW_COMPILE = "minutes of C++ compilation on a CPU; ask for it with --provider compile"


class WrongResult(RuntimeError):
    """A provider whose outputs are not those of the reference."""


@dataclass(frozen=True)
class Selection:
    """Which cases and providers to run; names may hold * and ?. Nothing named: all."""

    cases: Sequence[str] = ()
    providers: Sequence[str] = ()

    def case(self, case: Case) -> bool:
        return not self.cases or any(fnmatchcase(case.name, name) for name in self.cases)

    def provider(self, provider: str) -> bool:
        return not self.providers or any(fnmatchcase(provider, name) for name in self.providers)

    @property
    def everything(self) -> bool:
        return not self.cases and not self.providers


def all_cases(device: torch.device) -> list[Case]:
    """Real sizes on a GPU, small ones on a CPU."""
    return cases(REAL if device.type == "cuda" else SMALL)


def selected_cases(device: torch.device, selection: Selection) -> list[Case]:
    """The cases that hold a provider that was asked for.

    Raises
    ------
    BadInput : names that fit nothing.
    """
    every = all_cases(device)
    found = [c for c in every if selection.case(c) and any(map(selection.provider, c.providers))]
    if not found:
        names = ", ".join(dict.fromkeys(case.name for case in every))
        providers = ", ".join(dict.fromkeys(p for case in every for p in case.providers))
        raise BadInput(
            f"no case fits {list(selection.cases)} with providers {list(selection.providers)}; "
            f"cases: {names}; providers: {providers}"
        )
    return found


def relative_error(outputs: Outputs, expected: Outputs) -> float:
    """|out - reference| / |reference|, or the share of wrong booleans; the worst of all outputs."""
    if len(outputs) != len(expected):
        raise WrongResult(f"{len(outputs)} outputs, the reference has {len(expected)}")
    errors = []
    for out, reference in zip(outputs, expected, strict=True):
        if out.shape != reference.shape:
            raise WrongResult(f"output {list(out.shape)}, the reference {list(reference.shape)}")
        if reference.dtype == torch.bool:
            errors.append((out != reference).float().mean().item())
            continue
        distance = torch.linalg.vector_norm(out.to(reference.dtype) - reference)
        errors.append((distance / torch.linalg.vector_norm(reference)).item())
    return max(errors)


def poison(tensors: Sequence[Tensor]) -> None:
    """Fill memory that the allocator hands out next for such outputs with NaN."""
    for x in tensors:
        if x.dtype.is_floating_point and x.dtype.itemsize > 1:
            x.fill_(float("nan"))


def check(provider: Provider, problem: Problem, expected: Outputs) -> float:
    """The error of a second call, whose outputs lie where NaN was.

    Raises
    ------
    WrongResult : a different number or shape of outputs, or an error beyond the provider's bound.
    """
    device = expected[0].device
    like = [torch.empty_like(x, device="meta") for x in as_tuple(provider.prepare()())]
    work = provider.prepare()
    poison([torch.empty_like(x, device=device) for x in like])
    error = relative_error(problem.select(work()), expected)
    if not error <= provider.max_error:  # NaN is not below anything
        raise WrongResult(f"error {error:.3g} against the reference, allowed {provider.max_error}")
    return error


def measure(
    case: Case,
    name: str,
    problem: Problem,
    expected: Outputs,
    watch: Stopwatch,
    ceilings: Mapping[str, Ceiling],
) -> list[Measurement]:
    """All rows of one provider: time, rates, peak memory and, if it compiles, its first call.

    Raises
    ------
    Unavailable : it cannot run here.
    WrongResult : it ran, and its outputs are wrong.
    """
    provider = problem.providers[name]()
    first = watch.first(provider.prepare)
    error = check(provider, problem, expected)
    times = watch.times(provider.prepare)
    peak = watch.peak_gib(provider.prepare)
    row = partial(Measurement, case.name, name, case.shape, case.dtype, rel_error=error)
    counted = {"bytes": case.bytes, "flops": case.flops, **provider.config}
    rows = [row("time", "ms", times, config=counted)]
    for metric in case.metrics:
        unit, scale = RATES[metric]
        work = case.bytes if metric == "gbps" else case.flops
        rates = [work / ms / scale for ms in times]
        ceiling = ceilings.get("copy" if metric == "gbps" else provider.ceiling)
        config, share = dict(provider.config), None
        if ceiling is not None:
            share = percentiles(rates)[1] / ceiling.value
            config.update(ceiling=ceiling.name, ceiling_value=five_digits(ceiling.value))
        rows.append(row(metric, unit, rates, share_of_ceiling=share, config=config))
    if peak is not None:
        rows.append(row("memory", "GiB", [peak]))
    if provider.compiles and (name == "compile" or watch.device.type == "cuda"):
        rows.append(row("time", "s", [first], config=COMPILE))
    return rows


def ceiling_rows(ceilings: Mapping[str, Ceiling]) -> list[Measurement]:
    """The ceilings as rows of the case "ceiling"."""
    return [
        Measurement("ceiling", c.name, c.shape, c.dtype, METRICS[c.unit], c.unit, c.samples)
        for c in ceilings.values()
    ]


def line(rows: Sequence[Measurement]) -> str:
    """The rows of one provider in one line for the terminal."""
    parts = []
    for row in rows:
        value = percentiles(row.samples)[1]
        share = "" if row.share_of_ceiling is None else f" ({row.share_of_ceiling:.0%})"
        what = {"memory": "peak ", "time": ""}.get(row.metric, "")
        what = "first call " if row.config == COMPILE else what
        parts.append(f"{what}{value:,.4g} {row.unit}{share}")
    if rows[0].rel_error is not None:
        parts.append(f"error {rows[0].rel_error:.2g}")
    return f"  {rows[0].provider:<14} " + "   ".join(parts)


@dataclass
class Report:
    """What a run gave: rows, and texts about providers that failed or were left out."""

    rows: list[Measurement] = field(default_factory=list)
    compile_seconds: float = 0.0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def run_case(
    case: Case,
    selection: Selection,
    watch: Stopwatch,
    ceilings: Mapping[str, Ceiling],
    report: Report,
) -> None:
    """Measure the selected providers of one case; adds to `report` and prints as it goes."""
    print(f"{case.name}  {case.shape}  {case.dtype}", flush=True)
    problem = case.build(watch.device)
    with exact_float32():
        expected = problem.reference()
    for name in filter(selection.provider, case.providers):
        try:
            if name == "compile":
                check_compile_time(watch.device, selection, report)
            start = time.perf_counter()
            rows = measure(case, name, problem, expected, watch, ceilings)
            if name == "compile":
                report.compile_seconds += time.perf_counter() - start
        except Unavailable as reason:
            report.skipped.append(f"{case.label} {name}: {reason}")
            print(f"  {name:<14} skipped: {reason}", flush=True)
        except Exception as error:  # one broken provider must not cost the others their rows
            text = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[-1]}"
            report.failed.append(f"{case.label} {name}: {text}")
            print(f"  {name:<14} FAILED: {text}", flush=True)
        else:
            report.rows += rows
            print(line(rows), flush=True)
        release(watch.device)


def check_compile_time(device: torch.device, selection: Selection, report: Report) -> None:
    """Raise Unavailable where torch.compile would take too long; never if asked for by name."""
    if "compile" in selection.providers:
        return
    if device.type == "cpu":
        raise Unavailable(SLOW_COMPILE)
    if report.compile_seconds > COMPILE_SECONDS:
        spent = f"{report.compile_seconds:.0f} s of torch.compile were enough for one run"
        raise Unavailable(f"{spent}; ask for it with --provider compile")


def release(device: torch.device) -> None:
    """Give freed memory back, so that the next provider meets an empty allocator."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run(selection: Selection, save: Callable[[Report], object]) -> Report:
    """The suite on this machine's GPU, or on its CPU with small shapes; saves after each case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = selected_cases(device, selection)
    watch, report = Stopwatch(device), Report()
    ceilings = measure_ceilings(watch)
    for ceiling in ceilings.values():
        print(f"ceiling {ceiling.name:<6} {ceiling.value:>10,.1f} {ceiling.unit}", flush=True)
    report.rows += ceiling_rows(ceilings)
    release(device)
    for case in chosen:
        with torch.no_grad():
            run_case(case, selection, watch, ceilings, report)
        save(report)
        release(device)
    return report


def listing(device: torch.device, selection: Selection) -> str:
    """The cases that a run would take, one a line."""
    lines = []
    for case in selected_cases(device, selection):
        providers = " ".join(filter(selection.provider, case.providers))
        lines.append(f"{case.name:<28} {case.shape:<46} {case.dtype:<18} {providers}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite and write benchmarks/results/<gpu>/kernels.jsonl; 1 if a provider failed."""
    parser = argparse.ArgumentParser(
        prog="gen3r-engine bench --suite kernels",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--case", nargs="+", default=[], help="names, * and ? allowed")
    parser.add_argument("--provider", nargs="+", default=[], help="names, * and ? allowed")
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    parser.add_argument("--out", type=Path, help="results folder (default: benchmarks/results)")
    parser.add_argument("--commit", "--revision", help="recorded where the tree is no git checkout")
    options = parser.parse_args(argv)
    selection = Selection(options.case, options.provider)
    if options.list:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(listing(device, selection))
        return 0
    where, merge = environment(options.commit), not selection.everything

    def save(report: Report, finished: bool = False) -> Path:
        rows, out = report.rows, options.out
        return write_rows(rows, "kernels", out, merge=merge, where=where, finished=finished)

    report = run(selection, save)
    print(save(report, finished=True))
    print(f"{len(report.skipped)} skipped, {len(report.failed)} failed")
    for text in report.failed:
        print(f"FAILED: {text}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
