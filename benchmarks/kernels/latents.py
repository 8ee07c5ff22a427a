"""guidance_step and unproject: what runs once a step and once a scene.

Their references are plain PyTorch, operator by operator, in the precision that upstream uses
(float32 and float64): they are the eager provider as well.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import gen3r_kernels as ops
from benchmarks.kernels.case import Case, Draw, Outputs, Problem, Sizes, as_tuple, providers_of
from benchmarks.timing import dtype_name, shape_name
from gen3r_kernels import EulerStep, MultistepStep

NAMES = ("eager", "compile", "gen3r")
PLAIN = ("eager", "gen3r")  # torch.compile is tried once per operator, not once per size
GUIDANCE = 5.0
EULER = EulerStep(dt=-0.02)
# The size of a UniPC step's weights in mid-schedule.
MULTISTEP = MultistepStep(0.6, (0.97, -0.01, 0.05, -0.01), (0.96, 0.06, -0.02))


def build_guidance(
    step: EulerStep | MultistepStep, shape: tuple[int, ...], device: torch.device
) -> Problem:
    draw = Draw(device)
    sample, uncond, cond = (draw.normal(*shape, dtype=torch.float32) for _ in range(3))
    past = 3 if isinstance(step, MultistepStep) else 0
    history = tuple(draw.normal(*shape, dtype=torch.float32) for _ in range(past))

    def eager(sample: Tensor, uncond: Tensor, cond: Tensor, *history: Tensor) -> Outputs:
        return as_tuple(ops.guidance_step_reference(sample, uncond, cond, GUIDANCE, step, history))

    def ours(sample: Tensor, uncond: Tensor, cond: Tensor, *history: Tensor) -> Outputs:
        return as_tuple(ops.guidance_step(sample, uncond, cond, GUIDANCE, step, history))

    args = (sample, uncond, cond, *history)
    return Problem(
        providers_of({"eager": eager, "gen3r": ours}, {"": args}),
        lambda: eager(*args),
    )


def build_unproject(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """A turning camera inside a room of random depth."""
    draw, n, side = Draw(device), sizes.frames, sizes.side
    depth = draw.uniform(n, side, side, low=0.5, high=6.0)
    angle = torch.linspace(0, 0.5, n, device=device, dtype=torch.float64)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = [angle.cos(), zero, angle.sin(), angle, zero, one, zero, -angle]
    rows += [-angle.sin(), zero, angle.cos(), 2 * angle]
    extrinsics = torch.stack(rows, dim=-1).unflatten(-1, (3, 4)).float()
    k = torch.tensor([[0.86, 0, 0.5], [0, 0.86, 0.5], [0, 0, 1 / side]], device=device) * side
    near, far = torch.full((n,), 0.6, device=device), torch.full((n,), 5.5, device=device)
    args = (depth, extrinsics, k.expand(n, 3, 3).contiguous(), near, far)

    def eager(*args: Tensor) -> Outputs:
        points, mask = ops.unproject_reference(*args)
        return points.to(dtype), mask

    ours = partial(ops.unproject, out_dtype=dtype)
    return Problem(
        providers_of({"eager": eager, "gen3r": ours}, {"": args}),
        lambda: ops.unproject_reference(*args),
    )


def cases(sizes: Sizes) -> list[Case]:
    found = []
    for step, count in ((EULER, 1), (EULER, sizes.many_latents), (MULTISTEP, sizes.many_latents)):
        shape = (count, *sizes.latents)
        elements = torch.Size(shape).numel()
        euler = isinstance(step, EulerStep)
        found.append(
            Case(
                name="guidance_step",
                shape=f"{shape_name(*shape)} {'euler' if euler else 'multistep'}",
                dtype="float32",
                providers=PLAIN if count == 1 else NAMES,
                # Euler: three tensors in, one out. Multistep: six in, three out (the fourth output,
                # m_1, is an input passed on).
                bytes=elements * 4 * (4 if euler else 9),
                flops=elements * (5 if euler else 17),
                metrics=("gbps",),
                build=partial(build_guidance, step, shape),
            )
        )
    pixels = sizes.frames * sizes.side**2
    for dtype in (torch.float64, torch.float32):
        found.append(
            Case(
                name="unproject",
                shape=shape_name(sizes.frames, sizes.side, sizes.side),
                dtype=f"float32->{dtype_name(dtype)}",
                providers=NAMES if dtype == torch.float64 else PLAIN,
                bytes=pixels * (4 + 3 * dtype.itemsize + 1),
                flops=pixels * 24,
                metrics=("gbps",),
                build=partial(build_unproject, sizes, dtype),
            )
        )
    return found
