"""The kernel cases through pytest-benchmark.

    pytest benchmarks --benchmark-only
    pytest benchmarks --benchmark-only -k "layer_norm_modulate and gen3r"

The same cases and providers as `gen3r-engine bench --suite kernels`, checked against the reference
first. pytest-benchmark times with the processor's clock, launch included, so that its figures of
short operators are higher than those of the suite, which uses GPU events. Plain `pytest` does not
collect this file: testpaths is `tests`.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.kernels.case import Case, Outputs, Problem, Unavailable
from benchmarks.kernels.suite import SLOW_COMPILE, all_cases, check, release
from benchmarks.timing import Stopwatch, Work, exact_float32, repeats

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = all_cases(DEVICE)
PAIRS = [(case, provider) for case in CASES for provider in case.providers]
SECONDS = 0.1


@lru_cache(maxsize=1)  # pairs come case by case; two cases at once might not fit a GPU
def problem_of(case: Case) -> tuple[Problem, Outputs]:
    release(DEVICE)
    problem = case.build(DEVICE)
    with exact_float32():
        return problem, problem.reference()


@pytest.mark.parametrize(
    ("case", "name"), PAIRS, ids=[f"{case.label}-{name}".replace(" ", "_") for case, name in PAIRS]
)
def test_kernel(benchmark: BenchmarkFixture, case: Case, name: str) -> None:
    if name == "compile" and DEVICE.type == "cpu":
        pytest.skip(SLOW_COMPILE.split(";")[0])
    with torch.no_grad():
        problem, expected = problem_of(case)
        try:
            provider = problem.providers[name]()
        except Unavailable as reason:
            pytest.skip(str(reason))
        error = check(provider, problem, expected)
        watch = Stopwatch(DEVICE)

        def setup() -> tuple[tuple[Work], dict[str, object]]:
            work = provider.prepare()
            watch.flush()
            watch.synchronize()
            return (work,), {}

        def run(work: Work) -> None:
            work()
            watch.synchronize()

        estimate = 1000 * watch.first(provider.prepare)
        rounds = min(repeats(estimate, SECONDS), 50)
        benchmark.group = f"{case.name} {case.shape} {case.dtype}"
        benchmark.extra_info.update(
            provider=name, rel_error=error, bytes=case.bytes, flops=case.flops
        )
        benchmark.pedantic(run, setup=setup, rounds=rounds, iterations=1, warmup_rounds=1)
    release(DEVICE)
