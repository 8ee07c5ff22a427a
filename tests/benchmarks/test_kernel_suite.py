"""The kernel suite on a CPU: names, counted work, checks against the reference, rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.kernels import REAL, SMALL, cases
from benchmarks.kernels.case import Case, Problem, Provider, Unavailable, call
from benchmarks.kernels.suite import (
    Report,
    Selection,
    WrongResult,
    check,
    relative_error,
    run_case,
    selected_cases,
)
from benchmarks.timing import Ceiling, Stopwatch

CPU = torch.device("cpu")
NAMES = {
    *("layer_norm_modulate", "layer_norm_modulate_backward", "gated_residual"),
    *("gated_residual_backward", "rms_norm_rope", "rms_norm_rope_backward", "guidance_step"),
    *("unproject", "rms_norm_silu", "rms_norm_silu_backward", "causal_conv3d", "linear_qkv"),
    *("linear_o", "linear_ffn1", "linear_ffn2", "linear_layer", "attention"),
    *("attention_backward", "cross_attention", "conv2d_add_relu", "resize_bilinear"),
    *("dense_output", "layer_norm_rope", "upsample_conv2d"),
}
CEILINGS = {
    "copy": Ceiling("copy", "8", "float32", "GB/s", [10.0]),
    "bf16": Ceiling("bf16", "8x8x8", "float32", "TFLOP/s", [0.1]),
}


def find(name: str) -> Case:
    return next(case for case in cases(SMALL) if case.name == name)


def test_both_sizes_have_the_same_cases() -> None:
    assert {case.name for case in cases(REAL)} == {case.name for case in cases(SMALL)} == NAMES
    labels = [(case.label, case.dtype) for case in cases(REAL)]
    assert len(labels) == len(set(labels))


def test_counted_work_of_the_real_shapes() -> None:
    """By hand: what the issue's tables and the operators' docstrings say."""
    real = {case.name: case for case in reversed(cases(REAL))}
    stream = 2 * 31_850 * 1536
    assert real["layer_norm_modulate"].bytes == stream * 6
    assert real["gated_residual"].bytes == stream * 12
    assert real["rms_norm_rope"].bytes == stream * 8
    assert real["unproject"].bytes == 49 * 560 * 560 * 29
    assert real["guidance_step"].bytes == 16 * 13 * 70 * 140 * 16
    assert real["rms_norm_silu"].bytes == 96 * 4 * 560 * 560 * 4
    assert real["attention"].flops == 4 * 2 * 12 * 31_850**2 * 128
    assert real["attention_backward"].flops == 10 * 2 * 12 * 31_850**2 * 128
    assert real["linear_layer"].flops == 2 * 63_700 * 1536 * (6 * 1536 + 2 * 8960)
    padded = next(case for case in cases(REAL) if "text 4x77" in case.shape)
    assert padded.flops == 4 * 12 * 31_850 * 128 * (5 + 257 + 78 + 257)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_provider_agrees_with_the_reference(name: str) -> None:
    torch.manual_seed(0)
    case, checked = find(name), []
    with torch.no_grad():
        problem = case.build(CPU)
        expected = problem.reference()
        for provider in case.providers:
            if provider == "compile":  # minutes of C++ compilation
                continue
            try:
                made = problem.providers[provider]()
            except Unavailable as reason:
                assert str(reason)
                continue
            assert check(made, problem, expected) < 1e-5
            checked.append(provider)
    assert len(checked) >= 2


def test_rows_of_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    report, case = Report(), find("layer_norm_modulate")
    run_case(case, Selection(providers=["eager", "gen3r"]), Stopwatch(CPU), CEILINGS, report)
    assert not report.failed and not report.skipped
    found = [(r.provider, r.metric, r.unit) for r in report.rows]
    assert found == [
        ("eager", "time", "ms"),
        ("eager", "gbps", "GB/s"),
        ("gen3r", "time", "ms"),
        ("gen3r", "gbps", "GB/s"),
    ]
    time, rate = report.rows[:2]
    assert time.config["bytes"] == case.bytes and len(time.samples) >= timing.FEWEST
    assert rate.samples[0] == pytest.approx(case.bytes / time.samples[0] / 1e6)
    median = sorted(rate.samples)[len(rate.samples) // 2]
    assert rate.share_of_ceiling == pytest.approx(median / 10.0, rel=0.2)
    assert rate.config["ceiling"] == "copy" and rate.rel_error is not None
    assert "eager" in capsys.readouterr().out


def with_provider(make: Callable[[], Provider]) -> Case:
    """A case with a right provider and another one."""
    x = torch.ones(4)

    def build(device: torch.device) -> Problem:
        providers = {"right": lambda: Provider(call(torch.clone, x)), "other": make}
        return Problem(providers, lambda: (torch.ones(4),))

    return Case("test", "4", "float32", ("other", "right"), 32, 4, ("gbps",), build)


def raising(error: Exception) -> Callable[[], Provider]:
    def make() -> Provider:
        raise error

    return make


@pytest.mark.parametrize(
    ("make", "skipped", "failed"),
    [
        (raising(Unavailable("not installed")), ["test 4 other: not installed"], []),
        (raising(RuntimeError("broke")), [], ["test 4 other: RuntimeError: broke"]),
        (
            lambda: Provider(call(torch.zeros, 4)),
            [],
            ["test 4 other: WrongResult: error 1 against the reference, allowed 0.02"],
        ),
        (
            lambda: Provider(call(torch.full, (4,), float("nan"))),
            [],
            ["test 4 other: WrongResult: error nan against the reference, allowed 0.02"],
        ),
    ],
)
def test_a_provider_that_does_not_work_costs_only_itself(
    make: Callable[[], Provider],
    skipped: list[str],
    failed: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = Report()
    run_case(with_provider(make), Selection(), Stopwatch(CPU), CEILINGS, report)
    assert report.skipped == skipped and report.failed == failed
    assert {row.provider for row in report.rows} == {"right"}
    assert ("skipped: not installed" if skipped else "FAILED") in capsys.readouterr().out


def test_selection_by_name_and_pattern() -> None:
    found = selected_cases(CPU, Selection(["*_backward"], ["gen3r"]))
    assert {case.name for case in found} == {
        *("layer_norm_modulate_backward", "gated_residual_backward"),
        *("rms_norm_rope_backward", "rms_norm_silu_backward"),
    }
    with pytest.raises(ValueError, match=r"no case fits \['attn'\].*cases: layer_norm_modulate,"):
        selected_cases(CPU, Selection(["attn"]))


def test_relative_error() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert relative_error((torch.tensor([3.0, 4.5]),), (reference,)) == pytest.approx(0.1)
    masks = (torch.tensor([True, False]), torch.tensor([True, True]))
    assert relative_error(masks[:1], masks[1:]) == 0.5
    assert relative_error((reference, *masks[:1]), (reference, *masks[1:])) == 0.5
    with pytest.raises(WrongResult, match=r"output \[1\], the reference \[2\]"):
        relative_error((reference[:1],), (reference,))
    with pytest.raises(WrongResult, match="1 outputs, the reference has 2"):
        relative_error((reference,), (reference, reference))


def test_repeats() -> None:
    assert timing.repeats(0.01) == timing.MOST
    assert timing.repeats(3.0) == 50
    assert timing.repeats(9.0) == timing.FEWEST
    assert timing.repeats(20.0) == 8
    assert timing.repeats(500.0) == timing.FEWEST_LONG


def test_what_is_prepared_is_not_timed() -> None:
    prepared: list[Tensor] = []

    def prepare() -> Callable[[], Tensor]:
        prepared.append(torch.ones(1))
        return prepared[-1].clone

    watch = Stopwatch(CPU)
    times = watch.times(prepare)
    assert len(times) == timing.CPU_MOST and len(prepared) == timing.CPU_MOST + 3
    assert watch.peak_gib(prepare) is None
