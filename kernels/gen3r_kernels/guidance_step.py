# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""Classifier-free guidance and the solver update of the latents, as one element-wise operator.

v = v_uncond + g * (v_cond - v_uncond)                       (arXiv 2207.12598)

Euler:      x' = x + dt * v                                   (flow matching, arXiv 2210.02747)
Multistep:  m = x - sigma * v                                 (prediction of the clean sample)
            c = sum(corrector * (x_last, m_1, m_2, m))        (x itself without a corrector)
            x' = sum(predictor * (c, m, m_1))

The multistep form is UniPC (B2, order 2, arXiv 2302.04867) and DPM-Solver++ (2M, arXiv 2211.01095),
which has no corrector.

Every solver coefficient is a scalar of the schedule, so a step is linear in tensors that are
already there: it reads each once and writes each once. In float32 with guidance that is 16 bytes an
element for Euler (3 reads, 1 write) and 36 for UniPC (6 reads, 3 writes). The real latents
[1, 16, 13, 70, 140] have 2.0 M elements: 33 MB and 73 MB, 11 us and 26 us at the 2.86 TB/s of an
H100 if they came from device memory, of which most lies in the 50 MB L2 cache.

Measured on an H100 (copy 2.97 TB/s in that run): 32 scenes 344 us (Euler) and 782 us (UniPC),
3.0 TB/s, 101 % of the copy, with scalars or coefficients on the device; the reference 3.7 ms. One
scene 43 us and 36 us, launch included, which bounds it; the reference 111 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.dispatch import CompileCase, use_triton


@dataclass(frozen=True)
class EulerStep:
    """x' = x + dt * v with dt = sigma_next - sigma."""

    dt: float


@dataclass(frozen=True)
class MultistepStep:
    """Coefficients of one UniPC or DPM-Solver++ step; see the module's formulas.

    Parameters
    ----------
    sigma : noise level of the incoming sample.
    corrector : weights of (x_last, m_1, m_2, m), or None (c is the incoming sample).
    predictor : weights of (c, m, m_1).
    """

    sigma: float
    corrector: tuple[float, float, float, float] | None
    predictor: tuple[float, float, float]


History = tuple[Tensor, ...]  # multistep: (corrected sample, m_1, m_2), newest first, float32
COEFFICIENTS = 9  # (g, dt) and zeros, or (g, sigma, corrector, predictor)


def coefficient_row(step: EulerStep | MultistepStep, guidance_scale: float) -> list[float]:
    """The step's numbers in the order in which the kernels read them, nine in all."""
    if isinstance(step, EulerStep):
        return [guidance_scale, step.dt, *[0.0] * 7]
    return [guidance_scale, step.sigma, *(step.corrector or (0.0,) * 4), *step.predictor]


def coefficient_table(
    steps: Sequence[EulerStep | MultistepStep], guidance_scale: float, device: torch.device | str
) -> Tensor:  # [len(steps), 9] float32
    """The rows of a whole schedule on the latents' device.

    A graph captured once serves every step of the same structure: copy the step's row into the
    `coefficients` that it reads.
    """
    rows = [coefficient_row(step, guidance_scale) for step in steps]
    return torch.tensor(rows, dtype=torch.float32, device=device)


@triton.jit
def _guided(uncond, cond, offsets, mask, guidance, GUIDED: tl.constexpr):
    velocity = tl.load(cond + offsets, mask=mask).to(tl.float32)
    if GUIDED:
        base = tl.load(uncond + offsets, mask=mask).to(tl.float32)
        velocity = base + guidance * (velocity - base)
    return velocity


@triton.jit
def _euler_kernel(
    sample,  # [elements]
    uncond,  # [elements] if GUIDED
    cond,  # [elements]
    following,  # [elements]
    table,  # [9] float32 if TABLE
    guidance,
    dt,
    elements,
    GUIDED: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if TABLE:
        guidance = tl.load(table)
        dt = tl.load(table + 1)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    x = tl.load(sample + offsets, mask=mask).to(tl.float32)
    x += dt * _guided(uncond, cond, offsets, mask, guidance, GUIDED)
    tl.store(following + offsets, x.to(following.dtype.element_ty), mask=mask)


@triton.jit
def _multistep_kernel(
    sample,  # [elements]
    uncond,  # [elements] if GUIDED
    cond,  # [elements]
    last,  # [elements] float32 if CORRECTED
    m_1,  # [elements] float32 if HAS_M1
    m_2,  # [elements] float32 if HAS_M2
    following,  # [elements]
    corrected,  # [elements] float32 if CORRECTED
    prediction,  # [elements] float32
    table,  # [9] float32 if TABLE
    guidance,
    sigma,
    c_last,
    c_1,
    c_2,
    c_m,
    p_c,
    p_m,
    p_1,
    elements,
    GUIDED: tl.constexpr,
    CORRECTED: tl.constexpr,
    HAS_M1: tl.constexpr,
    HAS_M2: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if TABLE:
        guidance = tl.load(table)
        sigma = tl.load(table + 1)
        c_last = tl.load(table + 2)
        c_1 = tl.load(table + 3)
        c_2 = tl.load(table + 4)
        c_m = tl.load(table + 5)
        p_c = tl.load(table + 6)
        p_m = tl.load(table + 7)
        p_1 = tl.load(table + 8)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    x = tl.load(sample + offsets, mask=mask).to(tl.float32)
    m = x - sigma * _guided(uncond, cond, offsets, mask, guidance, GUIDED)
    # A prediction that is not there yet is replaced by this step's, as in the reference.
    previous = m
    if HAS_M1:
        previous = tl.load(m_1 + offsets, mask=mask)
    if CORRECTED:
        earlier = m
        if HAS_M2:
            earlier = tl.load(m_2 + offsets, mask=mask)
        x = c_last * tl.load(last + offsets, mask=mask) + c_1 * previous + c_2 * earlier + c_m * m
        tl.store(corrected + offsets, x, mask=mask)
    tl.store(prediction + offsets, m, mask=mask)
    x = p_c * x + p_m * m + p_1 * previous
    tl.store(following + offsets, x.to(following.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Config:
    """Elements and warps of one program."""

    block: int
    warps: int

    @classmethod
    def for_shape(cls, elements: int) -> Config:
        """Eight elements a thread: two 16-byte accesses to each float32 tensor."""
        return cls(1024, 4)


def _check(sample: Tensor, others: Sequence[Tensor | None], table: Tensor | None) -> None:
    for tensor in others:
        if tensor is not None and (tensor.shape != sample.shape or tensor.device != sample.device):
            raise ValueError(
                f"guidance_step: a tensor of shape {tuple(tensor.shape)} on {tensor.device} does "
                f"not fit the sample's {tuple(sample.shape)} on {sample.device}"
            )
    if table is not None and (
        table.shape != (COEFFICIENTS,)
        or table.dtype != torch.float32
        or not table.is_contiguous()
        or table.device != sample.device
    ):
        raise ValueError(
            f"guidance_step: coefficients of shape {tuple(table.shape)}, {table.dtype} on "
            f"{table.device}; expected [{COEFFICIENTS}] contiguous float32 on {sample.device}: a "
            "row of coefficient_table"
        )


@torch.library.custom_op("gen3r::guided_euler", mutates_args=())
def _euler(
    sample: Tensor,  # [...] contiguous, as all
    uncond: Tensor | None,
    cond: Tensor,
    values: Sequence[float],  # 9, unused with a table
    table: Tensor | None,  # [9] float32
) -> Tensor:  # as sample
    _check(sample, (uncond, cond), table)
    following = torch.empty_like(sample)
    config = Config.for_shape(sample.numel())
    _euler_kernel[(triton.cdiv(sample.numel(), config.block),)](
        sample,
        cond if uncond is None else uncond,
        cond,
        following,
        sample if table is None else table,
        *values[:2],
        sample.numel(),
        uncond is not None,
        table is not None,
        config.block,
        num_warps=config.warps,
    )
    return following


@_euler.register_fake
def _(
    sample: Tensor,
    uncond: Tensor | None,
    cond: Tensor,
    values: Sequence[float],
    table: Tensor | None,
) -> Tensor:
    return torch.empty_like(sample)


@torch.library.custom_op("gen3r::guided_multistep", mutates_args=())
def _multistep(
    sample: Tensor,  # [...] contiguous, as all
    uncond: Tensor | None,
    cond: Tensor,
    last: Tensor | None,  # float32; None: no corrector
    m_1: Tensor | None,  # float32
    m_2: Tensor | None,  # float32
    values: Sequence[float],  # 9, unused with a table
    table: Tensor | None,  # [9] float32
) -> tuple[Tensor, Tensor, Tensor]:  # next as sample, corrected float32 (empty without), m float32
    _check(sample, (uncond, cond, last, m_1, m_2), table)
    following = torch.empty_like(sample)
    prediction = torch.empty_like(sample, dtype=torch.float32)
    corrected = prediction.new_empty(0) if last is None else torch.empty_like(prediction)
    config = Config.for_shape(sample.numel())
    _multistep_kernel[(triton.cdiv(sample.numel(), config.block),)](
        sample,
        cond if uncond is None else uncond,
        cond,
        prediction if last is None else last,
        prediction if m_1 is None else m_1,
        prediction if m_2 is None else m_2,
        following,
        prediction if last is None else corrected,
        prediction,
        prediction if table is None else table,
        *values,
        sample.numel(),
        uncond is not None,
        last is not None,
        m_1 is not None,
        m_2 is not None,
        table is not None,
        config.block,
        num_warps=config.warps,
    )
    return following, corrected, prediction


@_multistep.register_fake
def _(
    sample: Tensor,
    uncond: Tensor | None,
    cond: Tensor,
    last: Tensor | None,
    m_1: Tensor | None,
    m_2: Tensor | None,
    values: Sequence[float],
    table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    prediction = torch.empty_like(sample, dtype=torch.float32)
    corrected = prediction.new_empty(0) if last is None else torch.empty_like(prediction)
    return torch.empty_like(sample), corrected, prediction


def _weighted(terms: list[tuple[float, Tensor]]) -> Tensor:
    (weight, tensor), *rest = [(w, t) for w, t in terms if w != 0.0]
    total = weight * tensor
    for weight, tensor in rest:
        total = total + weight * tensor
    return total


def guidance_step_reference(
    sample: Tensor,  # [B, C, F, H, W]
    uncond: Tensor | None,  # [B, C, F, H, W], None without guidance
    cond: Tensor,  # [B, C, F, H, W]
    guidance_scale: float,
    step: EulerStep | MultistepStep,
    history: History = (),
) -> tuple[Tensor, History]:  # next sample float32, new history
    """The definition in float32."""
    x, velocity = sample.float(), cond.float()
    if uncond is not None:
        velocity = uncond.float() + guidance_scale * (velocity - uncond.float())
    if isinstance(step, EulerStep):
        return x + step.dt * velocity, ()
    m = x - step.sigma * velocity
    corrected = x
    if step.corrector is not None:
        last, *models = history
        padded = [*models, m][:2]  # on the second step there is no m_2 and its weight is 0
        terms = [last, padded[0], padded[-1], m]
        corrected = _weighted(list(zip(step.corrector, terms, strict=True)))
    previous = history[1] if len(history) > 1 else m
    following = _weighted(list(zip(step.predictor, (corrected, m, previous), strict=True)))
    return following, (corrected, m, *history[1:2])


def guidance_step(
    sample: Tensor,  # [B, C, F, H, W]
    uncond: Tensor | None,  # [B, C, F, H, W]
    cond: Tensor,  # [B, C, F, H, W]
    guidance_scale: float,
    step: EulerStep | MultistepStep,
    history: History = (),
    *,
    coefficients: Tensor | None = None,  # [9] float32 on the sample's device
    backends: Backends = DEFAULT_BACKENDS,
) -> tuple[Tensor, History]:  # next sample in the dtype of `sample`, new history
    """Combine the two noise predictions and advance the latents by one solver step.

    coefficients : a row of `coefficient_table`, read on the device instead of the numbers in
        `guidance_scale` and `step`, whose structure (Euler or not, corrector or not) still counts.
        With it one compiled or captured graph serves all steps of a structure. The reference copies
        the row to the host.

    The kernels have no derivative: where autograd records, the reference runs.

    Raises
    ------
    ValueError : tensors or coefficients that do not fit; a corrector without history; on the Triton
        path by name (`operators="triton"`), inputs that require gradients.
    """
    corrector = isinstance(step, MultistepStep) and step.corrector is not None
    if corrector and not history:
        raise ValueError("guidance_step: a corrector needs the history that the last step returned")
    tensors = [t for t in (sample, uncond, cond, *history) if t is not None]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if differentiable and backends.operators == "triton":
        raise ValueError(
            "guidance_step: operators='triton' has no derivative and an input requires gradients; "
            "use operators='auto', or call it under torch.no_grad()"
        )
    kernels = use_triton("guidance_step", sample, sample.dtype, backends, any_dtype=True)
    if kernels and not differentiable:
        return _step(sample, uncond, cond, guidance_scale, step, history, coefficients)
    if coefficients is not None:
        guidance_scale, step = _from_row(coefficients.tolist(), step)
    following, history = guidance_step_reference(
        sample, uncond, cond, guidance_scale, step, history
    )
    return following.to(sample.dtype), history


def _from_row(
    row: list[float], step: EulerStep | MultistepStep
) -> tuple[float, EulerStep | MultistepStep]:
    guidance, level, *weights = row
    if isinstance(step, EulerStep):
        return guidance, EulerStep(level)
    c_last, c_1, c_2, c_m, p_c, p_m, p_1 = weights
    corrector = None if step.corrector is None else (c_last, c_1, c_2, c_m)
    return guidance, MultistepStep(level, corrector, (p_c, p_m, p_1))


def _step(
    sample: Tensor,
    uncond: Tensor | None,
    cond: Tensor,
    guidance_scale: float,
    step: EulerStep | MultistepStep,
    history: History,
    table: Tensor | None,
) -> tuple[Tensor, History]:
    """The kernels' path of `guidance_step`."""
    sample, cond = sample.contiguous(), cond.contiguous()
    uncond = None if uncond is None else uncond.contiguous()
    row = coefficient_row(step, guidance_scale)
    if isinstance(step, EulerStep):
        return torch.ops.gen3r.guided_euler(sample, uncond, cond, row, table), ()
    last, m_1, m_2 = (*(t.float().contiguous() for t in history), None, None, None)[:3]
    if step.corrector is None:
        last = m_2 = None
    following, corrected, m = torch.ops.gen3r.guided_multistep(
        sample, uncond, cond, last, m_1, m_2, row, table
    )
    if step.corrector is None:
        corrected = sample.float()
    return following, (corrected, m, *history[1:2])


def compile_cases() -> list[CompileCase]:
    """Both kernels with float32 latents and bf16 velocities, with scalars and with a table."""
    config = Config.for_shape(0)
    euler = ("sample", "uncond", "cond", "following", "table")
    multistep = (*euler[:3], "last", "m_1", "m_2", "following", "corrected", "prediction", "table")
    weights = ("c_last", "c_1", "c_2", "c_m", "p_c", "p_m", "p_1")
    cases = []
    for table in (False, True):
        for name, kernel, tensors, scalars, flags in (
            ("Euler", _euler_kernel, euler, ("dt",), {}),
            (
                "multistep",
                _multistep_kernel,
                multistep,
                ("sigma", *weights),
                {"CORRECTED": True, "HAS_M1": True, "HAS_M2": True},
            ),
        ):
            pointers = {t: "*bf16" if t in ("uncond", "cond") else "*fp32" for t in tensors}
            numbers = {s: "fp32" for s in ("guidance", *scalars)}
            cases.append(
                CompileCase(
                    f"{name}, coefficients {'on the device' if table else 'as scalars'}",
                    kernel,
                    pointers | numbers | {"elements": "i32"},
                    {"GUIDED": True, "TABLE": table, "BLOCK": config.block, **flags},
                    {"num_warps": config.warps},
                    (*tensors, "elements"),
                )
            )
    return cases
