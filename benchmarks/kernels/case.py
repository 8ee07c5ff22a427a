"""A case as data: what is computed on which shapes, what it must move, and who can compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Prepare

Outputs = tuple[Tensor, ...]
Function = Callable[..., Any]

HALF_ERROR = 0.02  # no right bf16 operator is further from float32; what is, is wrong
EIGHT_BIT_ERROR = 0.1


class Unavailable(Exception):
    """A provider that cannot run here; the text says why."""


@dataclass(frozen=True)
class Sizes:
    """Every size the cases are made of. `REAL` is 49 frames of 560 x 560 as a guided pair."""

    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    grid: tuple[int, int, int] = (13, 35, 70)  # tokens: frames, rows, columns
    heads: int = 12
    head_dim: int = 128
    ffn: int = 8960
    text: int = 512
    real_text: tuple[int, ...] = (4, 77)  # tokens of the negative prompt and of a usual prompt
    image: int = 257
    latents: tuple[int, ...] = (16, 13, 70, 140)
    many_latents: int = 64  # so many that they exceed any cache
    frames: int = 49
    side: int = 560
    # Channels, frames, side: a decoder's widest activations, one latent frame at a time.
    videos: tuple[tuple[int, int, int], ...] = ((96, 4, 560), (192, 4, 280), (384, 2, 140))
    # VGGT: width of the dense head's maps; views, tokens, heads, head size of the aggregator.
    features: int = 256
    views: tuple[int, int, int, int] = (49, 1605, 16, 64)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


REAL = Sizes()
SMALL = Sizes(  # seconds on a CPU, which computes in float32
    dtype=torch.float32,
    grid=(5, 7, 14),
    heads=4,
    head_dim=32,
    ffn=512,
    text=32,
    real_text=(3, 9),
    image=17,
    latents=(16, 5, 14, 28),
    many_latents=4,
    frames=9,
    side=112,
    videos=((12, 4, 112), (24, 4, 56)),
    features=16,
    views=(2, 69, 4, 16),
)


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    prepare : untimed work of each repeat; returns the call that is timed
    ceiling : of `measure_ceilings`, for the rate in TFLOP/s
    compiles : its first call compiles kernels, and gets a row of its own
    """

    prepare: Prepare
    ceiling: str = "bf16"
    compiles: bool = False
    max_error: float = HALF_ERROR
    config: Mapping[str, Any] = field(default_factory=dict)


def as_tuple(outputs: Any) -> Outputs:
    """The tensors of whatever an operator returns: a tensor, a tuple, tuples in a tuple."""
    if isinstance(outputs, Tensor):
        return (outputs,)
    return tuple(tensor for item in outputs for tensor in as_tuple(item))


@dataclass(frozen=True)
class Problem:
    """A case with its tensors.

    select : of what a provider returns, the tensors that `reference` computes
    """

    providers: Mapping[str, Callable[[], Provider]]
    reference: Callable[[], Outputs]
    select: Callable[[Any], Outputs] = as_tuple


@dataclass(frozen=True)
class Case:
    """One row's worth of work, without tensors.

    bytes : each input read once, each output written once
    flops : floating-point operations; of memory-bound cases a rough count, for the roofline only
    metrics : the rates that bound it: "gbps", "tflops" or both
    """

    name: str
    shape: str
    dtype: str
    providers: tuple[str, ...]
    bytes: int
    flops: int
    metrics: tuple[str, ...]
    build: Callable[[torch.device], Problem]

    @property
    def label(self) -> str:
        return f"{self.name} {self.shape}"


def call(function: Function, *args: Any) -> Prepare:
    """The forward pass, nothing to prepare."""
    return lambda: lambda: function(*args)


def gradients(
    function: Function, args: Sequence[Any], wrt: Sequence[int], grads: Sequence[Tensor]
) -> Prepare:
    """The backward pass with respect to `args[i] for i in wrt`; the forward pass is preparation."""

    def prepare() -> Callable[[], Outputs]:
        with torch.enable_grad():
            leaves = [
                arg.detach().requires_grad_() if i in wrt else arg for i, arg in enumerate(args)
            ]
            outputs = as_tuple(function(*leaves))
        wanted = [leaves[i] for i in wrt]
        return lambda: torch.autograd.grad(outputs, wanted, grads)

    return prepare


def compiled(function: Function) -> Function:
    """torch.compile for one shape, without graph breaks."""
    torch.compiler.reset()  # each case is judged by itself; recompile limits are per function
    return torch.compile(function, fullgraph=True, dynamic=False)


def providers_of(
    functions: Mapping[str, Function],
    args: Mapping[str, Sequence[Any]],
    wrt: Sequence[int] = (),
    grads: Sequence[Tensor] = (),
    ceiling: str = "bf16",
) -> dict[str, Callable[[], Provider]]:
    """Providers from plain functions; "compile" is made from "eager".

    args : arguments by provider name, "" for all others. With `wrt` the backward pass is measured.
    """

    def make(name: str) -> Callable[[], Provider]:
        def provider() -> Provider:
            compiles = name in ("compile", "gen3r")
            function = compiled(functions["eager"]) if name == "compile" else functions[name]
            own = args.get("eager" if name == "compile" else name, args.get(""))
            assert own is not None
            prepare = gradients(function, own, wrt, grads) if wrt else call(function, *own)
            return Provider(prepare, ceiling, compiles)

        return provider

    return {name: make(name) for name in ("compile", *functions)}


def reference_gradients(
    function: Function, args: Sequence[Any], wrt: Sequence[int], grads: Sequence[Tensor]
) -> Outputs:
    """float32 gradients of the reference."""
    wide = [arg.float() if i in wrt else arg for i, arg in enumerate(args)]
    return as_tuple(gradients(function, wide, wrt, [g.float() for g in grads])()())


class Draw:
    """Random tensors with a seed of their own."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, device=self.device, dtype=dtype, generator=self.generator)
        return x.mul_(scale)

    def uniform(self, *shape: int, low: float, high: float) -> Tensor:
        x = torch.rand(*shape, device=self.device, generator=self.generator)
        return x.mul_(high - low).add_(low)
