"""Transformer block and rotary tables that VGGT's encoder, aggregator and camera head share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r_kernels import Backends, attention, layer_norm_rope

MLP_RATIO = 4

PlaneTables = tuple[Tensor, Tensor]  # cos and sin, both [N, D] float32


def rope_tables(
    positions: Tensor,  # [N, 2] integer (row, column)
    head_dim: int,
    frequency: float = 100.0,
) -> PlaneTables:  # [N, head_dim] float32 each
    """Rotary tables over a plane: a head's first half turns with the row, its second the column.

    Within each half of width h, channels i and i + h/2 form a pair that turns by
    position * frequency ** (-2i / h). Source: rotary embedding (arXiv 2104.09864) in the
    two-dimensional form of VGGT (arXiv 2503.11651).

    Raises
    ------
    ValueError : a head size that is not a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(
            f"VGGT head size {head_dim} must be a multiple of 4 for its rotary embedding"
        )
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half
    angles = positions[..., None].float() * frequency**-exponents  # [N, 2, half / 2]
    angles = torch.cat([angles, angles], dim=-1).flatten(1)
    return angles.cos(), angles.sin()


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch (arXiv 2103.17239)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(
        self,
        x: Tensor,  # [..., C]
        branch: Tensor,  # [..., C]
    ) -> Tensor:  # [..., C]
        """x + branch * gain, in one pass."""
        return torch.addcmul(x, branch, self.gamma)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:  # [..., dim] to [..., out]
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """Multi-head attention with a fused projection.

    qk_norm : queries and keys are normalised and turned; `forward` then needs the rotary tables.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, backends: Backends) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backends = backends
        self.qkv = nn.Linear(dim, 3 * dim)
        if qk_norm:
            self.q_norm = nn.LayerNorm(dim // num_heads)
            self.k_norm = nn.LayerNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        rope: PlaneTables | None = None,  # of one view, where N is several
    ) -> Tensor:  # [B, N, C]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if rope is not None:
            q, k = layer_norm_rope(
                q,
                k,
                (self.q_norm.weight, self.q_norm.bias),
                (self.k_norm.weight, self.k_norm.bias),
                rope,
                eps=self.q_norm.eps,
                backends=self.backends,
            )
        return self.proj(attention(q, k, v, self.backends).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block whose two residual branches have a LayerScale.

    Parameters
    ----------
    eps : of the two block norms (DINOv2 uses 1e-6, the rest of VGGT 1e-5).
    layer_scale : value the LayerScale gains start from.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        backends: Backends,
        *,
        qk_norm: bool = False,
        eps: float = 1e-5,
        layer_scale: float = 0.01,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"VGGT block width {dim} is not a multiple of its {num_heads} heads")
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, num_heads, qk_norm, backends)
        self.ls1 = LayerScale(dim, layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, MLP_RATIO * dim, dim)
        self.ls2 = LayerScale(dim, layer_scale)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        rope: PlaneTables | None = None,
    ) -> Tensor:  # [B, N, C]
        x = self.ls1(x, self.attn(self.norm1(x), rope))
        return self.ls2(x, self.mlp(self.norm2(x)))
