"""guidance_step's kernels in Triton's interpreter, against the reference over whole schedules."""

from __future__ import annotations

import pytest
import torch

from gen3r.schedulers import make_schedule
from gen3r_kernels import Backends, EulerStep, MultistepStep, guidance_step, guidance_step_reference
from gen3r_kernels.guidance_step import COEFFICIENTS, coefficient_table

TRITON = Backends(operators="triton")
SHAPE = (2, 4, 3, 7, 19)  # 3,192 elements: three blocks and a part of one
# A few roundings of float32 on values of size 10: products may be fused with sums.
CLOSE = {"rtol": 1e-6, "atol": 1e-5}


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_schedule(solver: str, guided: bool, on_device: bool) -> None:
    schedule = make_schedule(solver, 5)
    table = coefficient_table(schedule.steps, 5.0, "cpu")
    assert table.shape == (5, COEFFICIENTS)
    sample, history, expected, expected_history = torch.randn(SHAPE), (), None, ()
    expected = sample
    for step, row in zip(schedule.steps, table, strict=True):
        uncond, cond = torch.randn(2, *SHAPE).unbind()
        first = uncond if guided else None
        expected, expected_history = guidance_step_reference(
            expected, first, cond, 5.0, step, expected_history
        )
        numbers = {"coefficients": row} if on_device else {}
        scale = 0.0 if on_device else 5.0  # the row's number counts
        sample, history = guidance_step(
            sample, first, cond, scale, step, history, **numbers, backends=TRITON
        )
        torch.testing.assert_close(sample, expected, **CLOSE)
        assert len(history) == len(expected_history)
        for ours, theirs in zip(history, expected_history, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


def test_missing_predictions_are_this_steps() -> None:
    x, cond, last = torch.randn(3, *SHAPE).unbind()
    step = MultistepStep(0.5, (0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    for history in ((last,), (last, cond), (last, cond, x)):
        out, kept = guidance_step(x, None, cond, 1.0, step, history, backends=TRITON)
        expected, wanted = guidance_step_reference(x, None, cond, 1.0, step, history)
        torch.testing.assert_close(out, expected, **CLOSE)
        assert [k.shape for k in kept] == [w.shape for w in wanted]


def test_half_precision_and_strides() -> None:
    x, uncond, cond = torch.randn(3, *SHAPE).half().unbind()
    x = x.transpose(3, 4).contiguous().transpose(3, 4)
    step = MultistepStep(0.5, None, (0.5, 0.6, 0.7))
    out, history = guidance_step(x, uncond, cond, 5.0, step, backends=TRITON)
    expected, wanted = guidance_step_reference(x, uncond, cond, 5.0, step)
    assert out.dtype == torch.float16 and history[1].dtype == torch.float32
    torch.testing.assert_close(out, expected.half(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(history[1], wanted[1], **CLOSE)


def test_refusals() -> None:
    x = torch.randn(SHAPE)
    euler = EulerStep(-0.1)
    with pytest.raises(ValueError, match="does not fit the sample's"):
        guidance_step(x, None, x[:1], 1.0, euler, backends=TRITON)
    with pytest.raises(ValueError, match=r"expected \[9\] contiguous float32"):
        row = torch.zeros(9, dtype=torch.float64)
        guidance_step(x, None, x, 1.0, euler, coefficients=row, backends=TRITON)
    with pytest.raises(ValueError, match="has no derivative"):
        guidance_step(x.requires_grad_(), None, x, 1.0, euler, backends=TRITON)


def test_opcheck() -> None:
    x, uncond, cond, last = torch.randn(4, 1, 2, 3, 3).unbind()
    row = torch.rand(COEFFICIENTS)
    torch.library.opcheck(
        torch.ops.gen3r.guided_euler.default, (x, uncond, cond, [5.0, 0.1, *[0.0] * 7], None)
    )
    for previous in (None, last):
        torch.library.opcheck(
            torch.ops.gen3r.guided_multistep.default,
            (x, None, cond, previous, last, None, [0.0] * 9, row),
        )
