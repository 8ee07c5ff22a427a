"""Named attention backends and the value that selects them.

A backend is a library or kernel that computes softmax(q k^T / sqrt(D)) v. Each one declares what it
needs (device, compute capability, dtypes, head sizes, backward) and can be asked whether it is
there; asking for one that is not there raises and says how to install it or what to use.

The name ``auto`` stands for the fastest backend of the table measured on this GPU, or on one of its
architecture (``attention_table``), that can take the tensors, and for ``sdpa`` on the CPU, on a GPU
without a table and on short sequences. It never stands for an 8-bit backend, whose results differ.
What it takes, and why faster ones were passed over, `choose` and `explain` tell.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gen3r_kernels.attention_table import ARCHITECTURES, measured_order

_HALF = (torch.float16, torch.bfloat16)
_ALL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# torch.compile shall see a constant: neither the import system nor the driver can be traced.
@torch.compiler.assume_constant_result
def _first_installed(modules: tuple[str, ...]) -> str:
    """The first of `modules` that can be imported, or an empty text."""
    return next((name for name in modules if is_installed(name)), "")


def is_installed(module: str) -> bool:
    """Whether a module is there; of a dotted name the packages above it are imported to see."""
    parent = module.rpartition(".")[0]
    return (not parent or is_installed(parent)) and importlib.util.find_spec(module) is not None


@torch.compiler.assume_constant_result
def _capability() -> tuple[int, int]:
    """Compute capability of the current GPU; (0, 0) without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


@torch.compiler.assume_constant_result
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    # Imported here: dispatch needs Backends from this module.
    from gen3r_kernels.dispatch import INTERPRETED

    return INTERPRETED


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention over q, k, v of shape [B, S, H, D].

    Parameters
    ----------
    name, run : how it is called.
    dtypes, max_head_dim : what it takes.
    head_dims : where not empty, the only head sizes it takes.
    cuda_only, min_capability, max_capability : the devices it runs on.
    interpretable : also runs on the CPU under Triton's interpreter.
    modules : Python packages that provide it, any one of them, in order of preference.
    install : how to get them.
    has_backward : whether gradients pass.
    exact : False where inputs are rounded to 8 bit; ``auto`` then never takes it.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    dtypes: tuple[torch.dtype, ...] = _ALL
    max_head_dim: int = 256
    head_dims: tuple[int, ...] = ()
    cuda_only: bool = False
    min_capability: tuple[int, int] = (0, 0)
    max_capability: tuple[int, int] = (99, 0)
    interpretable: bool = False
    modules: tuple[str, ...] = ()
    install: str = ""
    has_backward: bool = True
    exact: bool = True

    def why_not(self) -> str | None:
        """None when this machine can run the backend, else the reason in a few words."""
        if self.modules and not _first_installed(self.modules):
            return f"python package {' or '.join(self.modules)} is not installed ({self.install})"
        if self.cuda_only and not (self.interpretable and _interpreted()):
            capability = _capability()
            if capability[0] == 0:
                return "needs a CUDA GPU"
            # As numbers: torch.compile does not trace comparisons of tuples.
            number = 10 * capability[0] + capability[1]
            lowest = 10 * self.min_capability[0] + self.min_capability[1]
            highest = 10 * self.max_capability[0] + self.max_capability[1]
            if number < lowest or number > highest:
                return (
                    f"needs compute capability {self.min_capability} to {self.max_capability}, "
                    f"this GPU has {capability}"
                )
        return None

    def refusal(self, q: Tensor, *others: Tensor) -> str | None:
        """None when the backend takes q [B, S, H, D] (and k, v), else the reason."""
        reason = self.why_not()
        if reason is not None:
            return reason
        if self.cuda_only and not (q.is_cuda or (self.interpretable and _interpreted())):
            return f"the tensors are on {q.device}, not on a CUDA GPU"
        if q.dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            return f"dtype {str(q.dtype).removeprefix('torch.')} is not one of {names}"
        if self.head_dims and q.shape[-1] not in self.head_dims:
            return f"head size {q.shape[-1]} is not one of {', '.join(map(str, self.head_dims))}"
        if q.shape[-1] > self.max_head_dim:
            return f"head size {q.shape[-1]} is above {self.max_head_dim}"
        if not self.has_backward and torch.is_grad_enabled():
            for x in (q, *others):
                if x.requires_grad:
                    return "it has no backward"
        return None

    def check(self, q: Tensor, *others: Tensor) -> None:
        """Raise ValueError when q [B, S, H, D] (or k, v) is outside what the backend takes."""
        reason = self.refusal(q, *others)
        if reason is not None:
            raise ValueError(f"attention backend '{self.name}': {reason}; use 'sdpa' instead")


# The functions behind the names. Those with an operator of ours import it when they run, for
# gen3r_kernels.attention needs Backends from this module.


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from gen3r_kernels.attention import attention_reference

    return attention_reference(q, k, v).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from gen3r_kernels.attention import attention_forward

    return attention_forward(q, k, v)[0]


def _triton_int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from gen3r_kernels.attention import attention_forward_8bit

    return attention_forward_8bit(q, k, v, "int8")


def _triton_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from gen3r_kernels.attention import attention_forward_8bit

    return attention_forward_8bit(q, k, v, "fp8")


def _fa2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from gen3r_kernels.attention import attention_forward_fa3

    return attention_forward_fa3(q, k, v)[0]


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


# Two packages hold FlashAttention-3: the forward alone as a wheel, or both built from source.
FA3_MODULES = ("fa3_fwd_interface", "flash_attn_interface")
_HOPPER: dict[str, Any] = {"cuda_only": True, "min_capability": (9, 0), "max_capability": (9, 0)}
_8BIT: dict[str, Any] = {
    **_HOPPER,
    "dtypes": _HALF,
    "head_dims": (128,),
    "has_backward": False,
    "exact": False,
}

ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        AttentionBackend("reference", _reference, max_head_dim=1024),
        AttentionBackend("sdpa", _sdpa, max_head_dim=1024),
        AttentionBackend("cudnn", _cudnn, _HALF, 128, cuda_only=True, min_capability=(8, 0)),
        AttentionBackend(
            "triton",
            _triton,
            (torch.float32, *_HALF),
            cuda_only=True,
            min_capability=(8, 0),
            interpretable=True,
            modules=("triton",),
            install="pip install triton",
        ),
        AttentionBackend("triton_int8", _triton_int8, **_8BIT),
        AttentionBackend("triton_fp8", _triton_fp8, **_8BIT),
        AttentionBackend(
            "fa2",
            _fa2,
            _HALF,
            cuda_only=True,
            min_capability=(8, 0),
            # FlashAttention-4 has a package of the same name, without this module.
            modules=("flash_attn.flash_attn_interface",),
            install="pip install 'gen3r-engine[flash]'",
        ),
        AttentionBackend(
            "fa3",
            _fa3,
            _HALF,
            **_HOPPER,
            modules=FA3_MODULES,
            install="pip install 'gen3r-engine[fa3]'",
        ),
        AttentionBackend(
            "xformers",
            _xformers,
            (torch.float32, *_HALF),
            cuda_only=True,
            min_capability=(7, 0),
            modules=("xformers",),
            install="pip install 'gen3r-engine[xformers]'",
        ),
    )
}


class Choice(NamedTuple):
    """What ``auto`` takes: the backend, where that comes from, and what was passed over and why."""

    backend: AttentionBackend
    source: str
    passed_over: tuple[tuple[str, str], ...]


def choose(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, H, D]
    v: Tensor,  # [B, Sk, H, D]
) -> Choice:
    """The backend that ``auto`` stands for with these tensors."""
    sdpa = ATTENTION_BACKENDS["sdpa"]
    if not q.is_cuda:
        return Choice(sdpa, "nothing is measured off CUDA GPUs", ())
    if q.dtype not in _HALF:
        return Choice(sdpa, "speeds are measured in half precision", ())
    gpu = _gpu_name(q.device.index or 0)
    length = min(q.shape[1], k.shape[1])
    row, place = measured_order(gpu, length, q.shape[-1]), gpu
    if row is None:
        capability = _capability()
        # As a number: see `why_not`.
        twin = ARCHITECTURES.get(10 * capability[0] + capability[1])
        if twin is not None:
            row, place = measured_order(twin, length, q.shape[-1]), f"{twin}, the same architecture"
    if row is None:
        return Choice(sdpa, f"nothing is measured on {gpu} at this length and head size", ())
    passed: list[tuple[str, str]] = []
    for name, tflops in row.order:
        backend = ATTENTION_BACKENDS[name]
        reason = None if backend.exact else "its results differ"
        reason = reason or backend.refusal(q, k, v)
        if reason is None:
            source = f"{tflops:.0f} TFLOP/s measured on {place} at {row.shape}"
            return Choice(backend, source, tuple(passed))
        passed.append((f"{name} ({tflops:.0f} TFLOP/s)", reason))
    return Choice(sdpa, f"no backend measured on {gpu} takes these tensors", tuple(passed))


def explain(q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> list[str]:
    """Which backend ``auto`` takes for q (self-attention without k, v) and why, a line each."""
    backend, source, passed_over = choose(q, q if k is None else k, q if v is None else v)
    lines = [f"auto takes {backend.name}: {source}"]
    return lines + [f"passed over {name}: {reason}" for name, reason in passed_over]


OPERATOR_MODES = ("auto", "reference", "triton")


@dataclass(frozen=True)
class Backends:
    """Which implementation each operator uses. Fixed when a model is built.

    Parameters
    ----------
    attention : name in ``ATTENTION_BACKENDS``, or ``auto`` (what `choose` says for the tensors).
    operators : ``auto`` (Triton for CUDA tensors in reduced precision, reference otherwise),
        ``reference`` (plain PyTorch everywhere) or ``triton`` (Triton everywhere).

    Raises
    ------
    ValueError : a name that no backend has.
    """

    attention: str = "auto"
    operators: str = "auto"

    def __post_init__(self) -> None:
        if self.attention != "auto" and self.attention not in ATTENTION_BACKENDS:
            known = ", ".join(["auto", *ATTENTION_BACKENDS])
            raise ValueError(f"attention backend '{self.attention}' is unknown; known: {known}")
        if self.operators not in OPERATOR_MODES:
            raise ValueError(
                f"operators '{self.operators}' is unknown; known: {', '.join(OPERATOR_MODES)}"
            )

    @property
    def attention_backend(self) -> AttentionBackend:
        """The backend by name; for ``auto`` the one that runs wherever no table has a better."""
        return ATTENTION_BACKENDS["sdpa" if self.attention == "auto" else self.attention]


DEFAULT_BACKENDS = Backends()
