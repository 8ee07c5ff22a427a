"""Transformer block and rotary tables that VGGT's encoder, aggregator and camera head share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r_kernels import Backends, attention

MLP_RATIO = 4

RopeTables = tuple[Tensor, Tensor]  # cos and sin, both [N, D] float32


def rope_tables(
    positions: Tensor,  # [N, 2] integer (row, column)
    head_dim: int,
    frequency: float = 100.0,
) -> RopeTables:  # [N, head_dim] float32 each
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


def apply_rope(
    x: Tensor,  # [B, N, H, D]
    tables: RopeTables,
) -> Tensor:  # [B, N, H, D], dtype of x; computed in float32
    """Rotate the heads of a sequence by its tables."""
    cos, sin = (t[:, None, :] for t in tables)
    wide = x.float()
    first, second = wide.unflatten(-1, (2, 2, -1)).unbind(-2)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    return (wide * cos + turned * sin).to(x.dtype)


class LayerScale(nn.Module):
    """A learned gain per channel on a residual branch (arXiv 2103.17239)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:  # [..., C] to [..., C]
        return x * self.gamma


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:  # [..., dim] to [..., out]
        return self.fc2(F.gelu(self.fc1(x)))


class SelfAttention(nn.Module):
    """Multi-head attention with a fused projection; optionally normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, backends: Backends) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backends = backends
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm: nn.Module = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,  # [B, N, C]
        rope: RopeTables | None = None,
    ) -> Tensor:  # [B, N, C]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
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
        rope: RopeTables | None = None,
    ) -> Tensor:  # [B, N, C]
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))
