"""Upstream's operators of the diffusion transformer: what `eager` trains with.

Norms in float32 between casts, the rotation in complex128, modulation and residual updates apart:
the functions that the kernel suite calls `eager`, put in the place of the operators while a block
runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernels.transformer_norms import eager_modulate, eager_rope
from gen3r import transformer_blocks
from gen3r_kernels import Backends

Ignored = Backends | None


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype = torch.float32,
    backends: Ignored = None,
) -> Tensor:
    """See `gen3r_kernels.layer_norm_modulate`."""
    if scale is not None and shift is not None:
        return eager_modulate(x, scale, shift, out_dtype)
    gain, offset = (None if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], gain, offset, eps).type_as(x).to(out_dtype)


def gated_residual(
    stream: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype = torch.float32,
    backends: Ignored = None,
) -> tuple[Tensor, Tensor]:
    """See `gen3r_kernels.gated_residual`."""
    stream = stream + (y if gate is None else y * gate)
    tables = (scale, shift, weight, bias)
    return stream, layer_norm_modulate(stream, *tables, eps=eps, out_dtype=out_dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, backends: Ignored = None) -> Tensor:
    """See `gen3r_kernels.rms_norm`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def rms_norm_rope(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    eps: float = 1e-6,
    backends: Ignored = None,
) -> tuple[Tensor, Tensor]:
    """See `gen3r_kernels.rms_norm_rope`."""
    turns = torch.complex(cos.double(), sin.double())[:, None]
    return eager_rope(q, weight_q, turns, num_heads), eager_rope(k, weight_k, turns, num_heads)


@contextmanager
def upstream_blocks() -> Iterator[None]:
    """Inside, the transformer's blocks run the functions above, in the backward pass too."""
    with patch.multiple(
        transformer_blocks,
        layer_norm_modulate=layer_norm_modulate,
        gated_residual=gated_residual,
        rms_norm=rms_norm,
        rms_norm_rope=rms_norm_rope,
    ):
        yield
