# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton kernels take pointers and numbers that no Python type describes.)
"""One AdamW step of all parameters in one launch, with float32 masters or stochastic rounding.

With the gradient g times `scale` (the clipping factor), decoupled weight decay (arXiv 1711.05101):

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    w = w (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

w is the float32 master, of which the bf16 parameter becomes a copy; or, without masters, the bf16
parameter itself, to which the new value is rounded stochastically: 16 random bits are added below
the last bit kept and the rest is cut off, so that the expectation is exact and updates far smaller
than a bf16 step are not lost (arXiv 2010.06192). The bits come from a counter generator by seed,
step and place: a run repeats itself.

Bytes a parameter: gradient 2, m and v 16, master 8, parameter 2: 28; without masters 22. 1.62 G
parameters: 15.8 and 12.4 ms at the 2.86 TB/s that a copy reaches on an H100. PyTorch's fused AdamW
on float32 masters needs float32 gradients (6 bytes more, and 6.5 GB), their scaling (8) and the
copy to bf16 (6): 48 bytes, 27 ms. Measured on an H100: 17.4 ms the kernel with masters; a whole
update with the norm and the host's part 30.2 ms, without masters 26.4, PyTorch's way 50.2.

Tensors are found through a table of addresses, so that 900 tensors are one launch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gen3r_kernels.backends import DEFAULT_BACKENDS, Backends
from gen3r_kernels.dispatch import CompileCase, use_triton

SIGN_AND_UPPER = -65536  # 0xffff0000: what bf16 keeps of a float32


@triton.jit
def _round_stochastic(x, bits):
    """float32 to bf16, up with the probability of the part that is cut off; bits: 16 random."""
    raw = x.to(tl.int32, bitcast=True)
    # Infinities and NaNs keep their bits: an addition could turn one into the other.
    finite = (raw & 0x7F800000) != 0x7F800000
    raw = tl.where(finite, raw + (bits & 0xFFFF), raw) & SIGN_AND_UPPER_C
    return raw.to(tl.float32, bitcast=True).to(tl.bfloat16)


SIGN_AND_UPPER_C = tl.constexpr(SIGN_AND_UPPER)


# A seed of 1 would be compiled in as a constant, and any other compiled again.
@triton.jit(do_not_specialize=["seed"])
def _adamw_kernel(
    addresses,  # [5, N] int64: parameters, gradients, first and second moments, masters
    sizes,  # [N] int64
    owners,  # [P] int32: the tensor of a program
    starts,  # [P] int64: its first value in the tensor
    count,  # N
    scale,
    decay,  # 1 - lr * wd
    rate,  # lr / (1 - b1^t)
    correction,  # 1 / sqrt(1 - b2^t)
    beta1,
    beta2,
    epsilon,
    seed,
    GRADIENT: tl.constexpr,  # dtype
    MASTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    start = tl.load(starts + program)
    places = start + tl.arange(0, BLOCK).to(tl.int64)
    inside = places < tl.load(sizes + owner)
    addresses += owner
    parameter = tl.load(addresses).to(tl.pointer_type(tl.bfloat16)) + places
    gradient = tl.load(addresses + count).to(tl.pointer_type(GRADIENT)) + places
    first = tl.load(addresses + 2 * count).to(tl.pointer_type(tl.float32)) + places
    second = tl.load(addresses + 3 * count).to(tl.pointer_type(tl.float32)) + places
    g = tl.load(gradient, inside, 0.0).to(tl.float32) * scale
    m = tl.load(first, inside, 0.0)
    v = tl.load(second, inside, 0.0)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    tl.store(first, m, inside)
    tl.store(second, v, inside)
    change = rate * m / (tl.sqrt(v) * correction + epsilon)
    if MASTERS:
        master = tl.load(addresses + 4 * count).to(tl.pointer_type(tl.float32)) + places
        w = tl.load(master, inside, 0.0) * decay - change
        tl.store(master, w, inside)
        tl.store(parameter, w.to(tl.bfloat16), inside)
    else:
        w = tl.load(parameter, inside, 0.0).to(tl.float32) * decay - change
        # A stream of its own for each tensor; within one, by place.
        bits = tl.randint(seed.to(tl.int64) + owner.to(tl.int64) * 0x9E3779B9, places.to(tl.int32))
        tl.store(parameter, _round_stochastic(w, bits.to(tl.int32, bitcast=True)), inside)


@dataclass(frozen=True)
class AdamWConfig:
    """Values and warps a program."""

    block: int = 2048
    num_warps: int = 8

    @classmethod
    def for_arch(cls, capability: tuple[int, int]) -> AdamWConfig:
        """One configuration: the kernel only moves memory."""
        return cls()


@dataclass(frozen=True)
class Moments:
    """What AdamW keeps of every parameter, all float32 and laid out as the parameter.

    first, second : running means of the gradient and of its square
    masters : the parameters in float32, or None for stochastic rounding
    """

    first: Sequence[Tensor]
    second: Sequence[Tensor]
    masters: Sequence[Tensor] | None


@dataclass(frozen=True)
class AdamWStep:
    """Numbers of a step: learning rate, betas, epsilon, weight decay, t (from 1), and `scale`, by
    which gradients are multiplied first; `seed` of the rounding.
    """

    lr: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    step: int
    scale: float = 1.0
    seed: int = 0

    @property
    def decay(self) -> float:
        return 1 - self.lr * self.weight_decay

    @property
    def rate(self) -> float:
        return self.lr / (1 - self.beta1**self.step)

    @property
    def correction(self) -> float:
        return 1 / math.sqrt(1 - self.beta2**self.step)

    @property
    def rounding_seed(self) -> int:
        """A seed of its own for every step, in 31 bits."""
        return (self.seed * 1_000_003 + self.step) % (2**31 - 1)


def stochastic_bf16(
    x: Tensor,  # float32
    bits: Tensor,  # int32, same shape: 16 random bits each
) -> Tensor:  # bf16
    """x rounded up with the probability of the part that is cut off."""
    raw = x.view(torch.int32)
    finite = (raw & 0x7F800000) != 0x7F800000
    raw = torch.where(finite, raw + (bits & 0xFFFF), raw) & SIGN_AND_UPPER
    return raw.view(torch.float32).bfloat16()


def adamw_step_reference(
    parameter: Tensor,  # bf16
    gradient: Tensor,  # same shape
    first: Tensor,  # float32
    second: Tensor,  # float32
    master: Tensor | None,  # float32
    numbers: AdamWStep,
    bits: Tensor | None = None,  # int32, where there is no master
) -> None:
    """The definition, in place, of one parameter."""
    g = gradient.float() * numbers.scale
    first.copy_(numbers.beta1 * first + (1 - numbers.beta1) * g)
    second.copy_(numbers.beta2 * second + (1 - numbers.beta2) * g * g)
    change = numbers.rate * first / (second.sqrt() * numbers.correction + numbers.epsilon)
    w = (parameter.float() if master is None else master) * numbers.decay - change
    if master is None:
        assert bits is not None
        parameter.copy_(stochastic_bf16(w, bits))
    else:
        master.copy_(w)
        parameter.copy_(w)


@dataclass(frozen=True)
class PreparedGradients:
    """gradients : one a parameter, laid out as it; addresses : [5, N] int64, see the kernel."""

    gradients: Sequence[Tensor]
    addresses: Tensor


class AdamWPlan:
    """The tables of a set of parameters: made once, as their addresses do not change.

    Raises
    ------
    ValueError : parameters that are not bf16, or not dense in memory.
    """

    def __init__(self, parameters: Sequence[Tensor], moments: Moments) -> None:
        for p in parameters:
            if p.dtype != torch.bfloat16:
                raise ValueError(
                    f"adamw_step: parameters are bfloat16, got {p.dtype}; "
                    "torch.optim.AdamW(fused=True) takes float32 ones"
                )
            if not torch.empty_like(p).stride() == p.stride():
                raise ValueError(
                    f"adamw_step: a parameter {tuple(p.shape)} with strides {p.stride()} is not "
                    "dense in memory; make it contiguous"
                )
        self.parameters, self.moments = parameters, moments
        device = parameters[0].device
        config = AdamWConfig.for_arch(
            torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        )
        self.config = config
        counts = torch.tensor([p.numel() for p in parameters], dtype=torch.int64)
        programs = (counts + config.block - 1) // config.block
        owners = torch.repeat_interleave(torch.arange(len(counts)), programs)
        base = torch.cumsum(programs, 0) - programs
        starts = (torch.arange(int(programs.sum())) - base[owners]) * config.block
        self.sizes = counts.to(device)
        self.owners, self.starts = owners.to(device, torch.int32), starts.to(device)
        fixed = (moments.first, moments.second, moments.masters or moments.second)
        self.fixed = [[t.data_ptr() for t in tensors] for tensors in fixed]
        self.own = [p.data_ptr() for p in parameters]

    def prepare(self, gradients: Sequence[Tensor]) -> PreparedGradients:
        """Check the gradients and put their addresses on the device.

        Apart from the step itself, so that it can be done while the device still computes them.

        Raises
        ------
        ValueError : gradients that are not one per parameter, not of its shape, or of two dtypes.
        """
        if len(gradients) != len(self.parameters):
            raise ValueError(
                f"adamw_step: {len(gradients)} gradients for {len(self.parameters)} parameters"
            )
        dtypes = {g.dtype for g in gradients}
        if len(dtypes) != 1 or not dtypes <= {torch.bfloat16, torch.float32}:
            raise ValueError(f"adamw_step: gradients are all bfloat16 or all float32, got {dtypes}")
        laid_out = []
        for p, g in zip(self.parameters, gradients, strict=True):
            if p.shape != g.shape:
                raise ValueError(f"adamw_step: a gradient {tuple(g.shape)} for {tuple(p.shape)}")
            if g.stride() != p.stride():
                g = torch.empty_like(p, dtype=g.dtype).copy_(g)
            laid_out.append(g)
        rows = [self.own, [g.data_ptr() for g in laid_out], *self.fixed]
        addresses = torch.tensor(rows, dtype=torch.int64)
        if self.sizes.is_cuda:
            addresses = addresses.pin_memory().to(self.sizes.device, non_blocking=True)
        return PreparedGradients(laid_out, addresses)

    def launch(self, prepared: PreparedGradients, numbers: AdamWStep) -> None:
        """One step of all parameters."""
        gradients = prepared.gradients
        _adamw_kernel[(len(self.owners),)](
            prepared.addresses,
            self.sizes,
            self.owners,
            self.starts,
            len(self.own),
            numbers.scale,
            numbers.decay,
            numbers.rate,
            numbers.correction,
            numbers.beta1,
            numbers.beta2,
            numbers.epsilon,
            numbers.rounding_seed,
            GRADIENT=tl.float32 if gradients[0].dtype == torch.float32 else tl.bfloat16,
            MASTERS=self.moments.masters is not None,
            BLOCK=self.config.block,
            num_warps=self.config.num_warps,
        )


def adamw_step(
    plan: AdamWPlan,
    gradients: Sequence[Tensor] | PreparedGradients,  # bf16 or float32, all of one dtype
    numbers: AdamWStep,
    *,
    backends: Backends = DEFAULT_BACKENDS,
) -> None:
    """One AdamW step of the plan's parameters and moments, in place.

    Raises
    ------
    ValueError : as `AdamWPlan.prepare`.
    """
    with torch.no_grad():
        if not isinstance(gradients, PreparedGradients):
            gradients = plan.prepare(gradients)
        if use_triton("adamw_step", plan.parameters[0], torch.bfloat16, backends):
            plan.launch(gradients, numbers)
        else:
            _plain(plan, gradients.gradients, numbers)


def _plain(plan: AdamWPlan, gradients: Sequence[Tensor], numbers: AdamWStep) -> None:
    moments = plan.moments
    device = plan.sizes.device
    generator = torch.Generator(device).manual_seed(numbers.rounding_seed)
    for i, (p, g) in enumerate(zip(plan.parameters, gradients, strict=True)):
        master = bits = None
        if moments.masters is not None:
            master = moments.masters[i]
        else:
            bits = torch.randint(
                2**16, p.shape, dtype=torch.int32, device=device, generator=generator
            )
        adamw_step_reference(p, g, moments.first[i], moments.second[i], master, numbers, bits)


def compile_cases() -> list[CompileCase]:
    """With masters and with stochastic rounding, gradients in bf16 and float32."""
    config = AdamWConfig()
    pointers = {"addresses": "*i64", "sizes": "*i64", "owners": "*i32", "starts": "*i64"}
    floats = ("scale", "decay", "rate", "correction", "beta1", "beta2", "epsilon")
    signature = pointers | {"count": "i32", "seed": "i32"} | dict.fromkeys(floats, "fp32")
    return [
        CompileCase(
            name=f"adamw-{'masters' if masters else 'stochastic'}-{gradient}",
            kernel=_adamw_kernel,
            signature=signature,
            constexprs={"GRADIENT": gradient, "MASTERS": masters, "BLOCK": config.block},
            options={"num_warps": config.num_warps},
            divisible=tuple(pointers),
        )
        for masters in (True, False)
        for gradient in (tl.bfloat16, tl.float32)
    ]
