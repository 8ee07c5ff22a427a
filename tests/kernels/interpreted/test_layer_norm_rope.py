"""layer_norm_rope's kernel in Triton's interpreter, against the float32 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r_kernels import Backends, layer_norm_rope, layer_norm_rope_reference

TRITON = Backends(operators="triton")
Norms = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def tables(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Angles that differ by token and pair; both members of a pair share theirs."""
    angles = torch.randn(tokens, 2, 1, head_dim // 4).expand(-1, -1, 2, -1).reshape(tokens, -1)
    return angles.cos(), angles.sin()


def norms(head_dim: int) -> Norms:
    def one() -> tuple[Tensor, Tensor]:
        return 1 + 0.2 * torch.randn(head_dim), torch.randn(head_dim)

    return one(), one()


@pytest.mark.parametrize(
    ("batch", "tokens", "views", "heads", "head_dim"),
    [(2, 5, 1, 2, 64), (1, 7, 3, 3, 8), (2, 3, 2, 1, 12), (1, 40, 1, 4, 32)],
)
def test_values(batch: int, tokens: int, views: int, heads: int, head_dim: int) -> None:
    # Queries, keys and values side by side, as the model's projection leaves them, far from zero.
    packed = torch.randn(batch, tokens * views, 3, heads, head_dim) + 3
    q, k, _ = packed.unbind(2)
    given, turns = norms(head_dim), tables(tokens, head_dim)
    found = layer_norm_rope(q, k, *given, turns, backends=TRITON)
    expected = layer_norm_rope_reference(q, k, *given, turns)
    plain = layer_norm_rope(q, k, *given, turns)
    for ours, theirs, other in zip(found, expected, plain, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(other, theirs, rtol=1e-5, atol=2e-5)


def test_heads_that_are_not_side_by_side_and_half_precision() -> None:
    q, k = (torch.randn(1, 2, 6, 8).transpose(1, 2).half() for _ in range(2))
    given, turns = norms(8), tables(6, 8)
    half = tuple((w.half(), b.half()) for w, b in given)
    found = layer_norm_rope(q, k, *half, turns, backends=TRITON)
    for ours, theirs in zip(found, layer_norm_rope_reference(q, k, *half, turns), strict=True):
        assert ours.dtype == torch.float16
        assert ((ours.float() - theirs).abs() <= 2**-10 * theirs.abs() + 1e-4).all()


def test_differentiates_through_pytorch() -> None:
    q, k = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(2))
    found = layer_norm_rope(q, k, *norms(8), tables(4, 8))
    (found[0].square().sum() + found[1].sum()).backward()
    assert q.grad is not None and k.grad is not None and k.grad.any()
    with pytest.raises(ValueError, match="no derivative"):
        layer_norm_rope(q, k, *norms(8), tables(4, 8), backends=TRITON)


def test_refusals() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="no multiple of the tables' 3"):
        layer_norm_rope(q, q, *norms(8), tables(3, 8))
    with pytest.raises(ValueError, match=r"twice \[P, D\]"):
        layer_norm_rope(q, q, *norms(8), tables(4, 12))
    with pytest.raises(ValueError, match="two alike"):
        torch.ops.gen3r.layer_norm_rope(q, q.half(), *(torch.ones(8),) * 4, *tables(4, 8), 1e-5)


def test_opcheck() -> None:
    q = torch.randn(1, 4, 2, 8)
    arguments = (q, q, *(torch.ones(8),) * 4, *tables(4, 8), 1e-5)
    torch.library.opcheck(torch.ops.gen3r.layer_norm_rope, arguments)
