"""Named attention backends and the value that selects them.

A backend is a library or kernel that computes softmax(q k^T / sqrt(D)) v. Each one declares what it
needs (device, compute capability, dtypes, head sizes, backward) and can be asked whether it is
there; asking for one that is not there raises and says how to install it. Nothing is chosen
silently: the name ``auto`` stands for ``sdpa`` on every device until measured tables say otherwise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_HALF = (torch.float16, torch.bfloat16)
_ALL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute attention over q, k, v of shape [B, S, H, D]."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    dtypes: tuple[torch.dtype, ...] = _ALL
    max_head_dim: int = 256
    cuda_only: bool = False
    min_capability: tuple[int, int] = (0, 0)
    max_capability: tuple[int, int] = (99, 0)
    module: str | None = None
    install: str = ""
    has_backward: bool = True

    def why_not(self) -> str | None:
        """None when this machine can run the backend, else the reason in a few words."""
        if self.module is not None and importlib.util.find_spec(self.module) is None:
            return f"python package {self.module} is not installed ({self.install})"
        if self.cuda_only:
            if not torch.cuda.is_available():
                return "needs a CUDA GPU"
            capability = torch.cuda.get_device_capability()
            if not self.min_capability <= capability <= self.max_capability:
                return (
                    f"needs compute capability {self.min_capability} to {self.max_capability}, "
                    f"this GPU has {capability}"
                )
        return None

    def check(self, q: Tensor) -> None:
        """Raise ValueError when q [B, S, H, D] is outside what the backend takes."""
        reason = self.why_not()
        if reason is None and self.cuda_only and q.device.type != "cuda":
            reason = f"the tensors are on {q.device}, not on a CUDA GPU"
        if reason is None and q.dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            reason = f"dtype {str(q.dtype).removeprefix('torch.')} is not one of {names}"
        if reason is None and q.shape[-1] > self.max_head_dim:
            reason = f"head size {q.shape[-1]} is above {self.max_head_dim}"
        if reason is None and q.requires_grad and torch.is_grad_enabled() and not self.has_backward:
            reason = "it has no backward"
        if reason is not None:
            raise ValueError(f"attention backend '{self.name}': {reason}; use 'sdpa' instead")


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from gen3r_kernels.attention import attention_reference

    return attention_reference(q, k, v).to(q.dtype)


def _fa2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from fa3_fwd_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    backend.name: backend
    for backend in (
        AttentionBackend("reference", _math, max_head_dim=1024),
        AttentionBackend("sdpa", _sdpa, max_head_dim=1024),
        AttentionBackend("cudnn", _cudnn, _HALF, 128, cuda_only=True, min_capability=(8, 0)),
        AttentionBackend(
            "fa2",
            _fa2,
            _HALF,
            cuda_only=True,
            min_capability=(8, 0),
            module="flash_attn",
            install="pip install 'gen3r-engine[flash]'",
        ),
        AttentionBackend(
            "fa3",
            _fa3,
            _HALF,
            cuda_only=True,
            min_capability=(9, 0),
            max_capability=(9, 0),
            module="fa3_fwd_interface",
            install="pip install 'gen3r-engine[fa3]'",
            has_backward=False,
        ),
        AttentionBackend(
            "xformers",
            _xformers,
            (torch.float32, *_HALF),
            cuda_only=True,
            min_capability=(7, 0),
            module="xformers",
            install="pip install 'gen3r-engine[xformers]'",
        ),
    )
}


@dataclass(frozen=True)
class Backends:
    """Which implementation each operator uses. Fixed when a model is built.

    Parameters
    ----------
    attention : name in ``ATTENTION_BACKENDS``, or ``auto`` (= ``sdpa`` until tables are measured).

    Raises
    ------
    ValueError : a name that no backend has.
    """

    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.attention != "auto" and self.attention not in ATTENTION_BACKENDS:
            known = ", ".join(["auto", *ATTENTION_BACKENDS])
            raise ValueError(f"attention backend '{self.attention}' is unknown; known: {known}")

    @property
    def attention_backend(self) -> AttentionBackend:
        return ATTENTION_BACKENDS["sdpa" if self.attention == "auto" else self.attention]
