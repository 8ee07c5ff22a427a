"""guidance_step and unproject on a GPU: whole schedules, real sizes, compiled, captured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r.schedulers import make_schedule
from gen3r_kernels import (
    Backends,
    EulerStep,
    MultistepStep,
    guidance_step,
    guidance_step_reference,
    unproject,
    unproject_reference,
)
from gen3r_kernels.guidance_step import coefficient_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

TRITON = Backends(operators="triton")
LATENTS = (1, 16, 13, 70, 140)
# A few roundings of float32 on values of size 10: products may be fused with sums.
CLOSE = {"rtol": 2e-6, "atol": 2e-5}


@pytest.fixture(autouse=True)
def _poison() -> None:
    """Memory that the operators are given next holds NaN: what they do not write shows."""
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (2**28, 2**24, 2**18)]
    del blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [LATENTS, (2, 3, 5, 7, 19)], ids=str)
@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++"])
def test_schedule(solver: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """dtype : of the velocities; the latents are float32."""
    schedule = make_schedule(solver, 6)
    sample = expected = torch.randn(shape, device="cuda")
    history = expected_history = ()
    for step in schedule.steps:
        uncond, cond = torch.randn(2, *shape, device="cuda", dtype=dtype).unbind()
        expected, expected_history = guidance_step_reference(
            expected, uncond, cond, 5.0, step, expected_history
        )
        sample, history = guidance_step(sample, uncond, cond, 5.0, step, history, backends=TRITON)
        torch.testing.assert_close(sample, expected, **CLOSE)
        for ours, theirs in zip(history, expected_history, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)


def test_compiled() -> None:
    x, uncond, cond = torch.randn(3, *LATENTS, device="cuda").unbind()
    step = MultistepStep(0.5, None, (0.5, 0.6, 0.7))
    run = torch.compile(guidance_step, fullgraph=True)
    out, history = run(x, uncond, cond, 5.0, step)
    expected, wanted = guidance_step_reference(x, uncond, cond, 5.0, step)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(history[1], wanted[1], **CLOSE)


def test_one_captured_graph_serves_every_step() -> None:
    """The step's numbers are read on the device."""
    steps = [EulerStep(-0.1), EulerStep(0.3)]
    table = coefficient_table(steps, 5.0, "cuda")
    row = table[0].clone()
    x, uncond, cond = torch.randn(3, *LATENTS, device="cuda").unbind()

    def run() -> Tensor:
        return guidance_step(x, uncond, cond, 0.0, steps[0], coefficients=row)[0]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for step, values in zip(steps, table, strict=True):
        row.copy_(values)
        graph.replay()
        expected, _ = guidance_step_reference(x, uncond, cond, 5.0, step)
        torch.testing.assert_close(out, expected, **CLOSE)


def scene(frames: int, height: int, width: int) -> tuple[Tensor, ...]:
    rotation, _ = torch.linalg.qr(torch.randn(frames, 3, 3, device="cuda"))
    pose = torch.cat([rotation, torch.randn(frames, 3, 1, device="cuda")], dim=-1)
    k = torch.tensor([[480.0, 0, 279.5], [0, 470, 281], [0, 0, 1]], device="cuda")
    depth = torch.rand(frames, height, width, device="cuda") * 5 + 0.5
    near, far = torch.full((frames,), 0.6, device="cuda"), torch.full((frames,), 5.0, device="cuda")
    return depth, pose, k.expand(frames, 3, 3), near, far


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(49, 560, 560), (3, 37, 53)], ids=str)
def test_unproject(shape: tuple[int, int, int], compiled: bool) -> None:
    inputs = scene(*shape)
    expected, valid = unproject_reference(*inputs)
    run = torch.compile(unproject, fullgraph=True) if compiled else unproject
    # Of the largest term: 4 roundings of the points' dtype.
    largest = inputs[0].abs().max().item() * 2 + inputs[1][..., 3].abs().max().item() * 3
    for dtype, rounding in ((torch.float64, 2.0**-52), (torch.float32, 2.0**-23)):
        points, mask = run(*inputs, out_dtype=dtype)
        assert points.dtype == dtype and torch.equal(mask, valid)
        assert (points - expected).abs().max() <= 4 * rounding * largest


def test_opcheck() -> None:
    depth, pose, k, near, far = scene(2, 5, 9)
    arguments = (depth, pose, k.contiguous(), near, far, torch.float64)
    torch.library.opcheck(torch.ops.gen3r.unproject.default, arguments)
