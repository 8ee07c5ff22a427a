"""The portable attention kernels, forward and backward, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r_kernels.attention import attention, attention_forward, attention_reference
from gen3r_kernels.attention_backward import attention_backward
from gen3r_kernels.backends import Backends

TRITON = Backends(attention="triton")
# Batch, queries, keys, heads, head size: no multiple of any block, and one block exactly.
SHAPES = [(2, 33, 57, 3, 16), (1, 199, 257, 2, 40), (1, 64, 64, 1, 64), (1, 70, 33, 2, 200)]


def operands(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """q, k, v and a gradient of the output."""
    batch, queries, keys, heads, head_dim = shape
    return [
        torch.randn(batch, length, heads, head_dim).to(dtype)
        for length in (queries, keys, keys, queries)
    ]


def log_sum(q: Tensor, k: Tensor) -> Tensor:
    """Natural logarithm of the softmax's denominator, [B, H, Sq]."""
    scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    return torch.logsumexp(scores, -1)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: tuple[int, int, int, int, int]) -> None:
    q, k, v, _ = operands(shape)
    out, lse = attention_forward(q, k, v)
    # Sums of a few hundred float32 terms of order one.
    torch.testing.assert_close(out, attention_reference(q, k, v), rtol=0, atol=4e-6)
    torch.testing.assert_close(lse, log_sum(q, k), rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_backward(shape: tuple[int, int, int, int, int]) -> None:
    q, k, v, grad = operands(shape)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ours = torch.autograd.grad(attention(q, k, v, TRITON), inputs, grad)
    theirs = torch.autograd.grad(attention_reference(q, k, v), inputs, grad)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_half_precision() -> None:
    q, k, v, grad = operands((1, 70, 57, 2, 64), torch.float16)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    out, reference = attention(q, k, v, TRITON), attention_reference(*exact)
    # Half an ulp of float16 at 1 is 2.4e-4, once for p and once for the output.
    torch.testing.assert_close(out.float(), reference, rtol=1e-3, atol=1e-3)
    ours = torch.autograd.grad(out, inputs, grad)
    theirs = torch.autograd.grad(reference, exact, grad.float())
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual.float(), expected, rtol=4e-3, atol=2e-3)


def test_strides() -> None:
    """q, k, v as slices of one projection, heads before tokens, and a last axis that is strided."""
    fused = torch.randn(2, 37, 3, 2, 24)
    q, k, v = fused.unbind(2)
    assert not q.is_contiguous()
    torch.testing.assert_close(
        attention(q, k, v, TRITON), attention_reference(q, k, v), rtol=0, atol=4e-6
    )
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    grad = torch.randn(2, 24, 2, 37).permute(0, 3, 2, 1)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ours = torch.autograd.grad(attention(q, k, v, TRITON), inputs, grad)
    theirs = torch.autograd.grad(attention_reference(q, k, v), inputs, grad)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_scores_far_from_zero() -> None:
    """exp would overflow or vanish without the running maximum; padding must not add to dq."""
    q, k, v, grad = operands((1, 33, 41, 1, 16))
    for shift in (-300.0, 300.0):
        k_far = k.clone()
        k_far[..., 0] = shift
        q_far = q.clone()
        q_far[..., 0] = 4.0
        inputs = [x.requires_grad_() for x in (q_far, k_far, v)]
        out, lse = attention_forward(*inputs)
        torch.testing.assert_close(lse, log_sum(q_far, k_far), rtol=1e-5, atol=0)
        ours = torch.autograd.grad(out, inputs, grad)
        theirs = torch.autograd.grad(attention_reference(*inputs), inputs, grad)
        for actual, expected in zip(ours, theirs, strict=True):
            assert actual.isfinite().all()
            # Scores of order 300 carry an error of 300 * 2**-24 into p.
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=3e-3)


def test_refusals() -> None:
    q, k, v, grad = operands((1, 4, 4, 1, 16))
    out, lse = attention_forward(q, k, v)
    with pytest.raises(ValueError, match="provider 'fast' is unknown; known: auto, fa4, fa4_"):
        attention_backward(grad, q, k, v, out, lse, "fast")
    with pytest.raises(ValueError, match=r"k \(1, 4, 1, 16\), v \(1, 3, 1, 16\) do not fit"):
        attention_forward(q, k, v[:, :3])
    with pytest.raises(ValueError, match="is empty"):
        attention_forward(q, k[:, :0], v[:, :0])
    with pytest.raises(ValueError, match="differ in dtype"):
        attention_forward(q, k.half(), v)
    with pytest.raises(ValueError, match="head size 300 is above 256"):
        wide = torch.zeros(1, 1, 1, 300)
        attention(wide, wide, wide, TRITON)


def test_compiled_in_one_graph() -> None:
    q, k, v, grad = operands((1, 19, 23, 2, 16))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, TRITON), fullgraph=True, backend="aot_eager"
    )
    ours = torch.autograd.grad(compiled(q, k, v), inputs, grad)
    theirs = torch.autograd.grad(attention(q, k, v, TRITON), inputs, grad)
    for actual, expected in zip(ours, theirs, strict=True):
        assert torch.equal(actual, expected)


def test_opcheck() -> None:
    q, k, v, grad = operands((1, 5, 6, 1, 16))
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    torch.library.opcheck(attention_forward, inputs)
    out, lse = attention_forward(*(x.detach() for x in inputs))
    saved = tuple(x.detach() for x in (grad, *inputs, out, lse))
    torch.library.opcheck(attention_backward, saved)
