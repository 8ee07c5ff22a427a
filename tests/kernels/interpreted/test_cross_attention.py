"""Text and image attention in one kernel, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r_kernels.backends import Backends
from gen3r_kernels.cross_attention import (
    _cross_attention,
    cross_attention,
    cross_attention_reference,
)
from gen3r_kernels.cross_attention_triton import cross_attention_portable

TRITON = Backends(attention="triton", operators="triton")
# Batch, queries, text keys, image keys, heads, head size, tokens of each prompt.
CASES = [
    (2, 199, 64, 257, 1, 40, (3, 33)),  # one text block, and several
    (3, 33, 40, 33, 2, 16, (0, 39, 40)),  # no token; one padding key; no padding
    (2, 17, 24, 64, 1, 64, (15, 16)),  # just within the small block, just beyond
]
Case = tuple[int, int, int, int, int, int, tuple[int, ...]]


def operands(case: Case) -> tuple[list[Tensor], Tensor]:
    """q, text keys and values with equal padding, image keys and values; lengths."""
    batch, queries, text, image, heads, head_dim, lengths = case
    q = torch.randn(batch, queries, heads, head_dim)
    keys = [torch.randn(batch, n, heads, head_dim) for n in (text, text, image, image)]
    for x in keys[:2]:
        for b, n in enumerate(lengths):
            x[b, n:] = x[b, n : n + 1]
    return [q, *keys], torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("case", CASES)
def test_forward(case: Case) -> None:
    inputs, lengths = operands(case)
    expected = cross_attention_reference(*inputs)
    for given in (lengths, None):
        out = cross_attention(*inputs, TRITON, text_lengths=given)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=6e-6)


def test_padding_keys_are_not_read() -> None:
    inputs, lengths = operands(CASES[0])
    expected = cross_attention_reference(*inputs)
    for x in inputs[1:3]:
        for b, n in enumerate(CASES[0][-1]):
            x[b, n + 1 :] = float("nan")
    out = cross_attention(*inputs, TRITON, text_lengths=lengths)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=6e-6)


def test_batch_elements_left_to_another_kernel() -> None:
    inputs, lengths = operands(CASES[2])
    out = torch.full_like(inputs[0], 7.0)
    cross_attention_portable(*inputs, lengths, o=out, leave=16)
    assert (out[0] == 7.0).all()  # 15 tokens and one padding key
    expected = cross_attention_reference(*inputs)
    torch.testing.assert_close(out[1], expected[1], rtol=1e-6, atol=6e-6)


def test_half_precision() -> None:
    inputs, lengths = operands(CASES[0])
    half = [x.half() for x in inputs]
    out = cross_attention(*half, TRITON, text_lengths=lengths)
    expected = cross_attention_reference(*half)
    torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("given", [True, False], ids=["lengths", "all"])
def test_backward(case: Case, given: bool) -> None:
    """Every key's own gradient, padding rows included."""
    inputs, lengths = operands(case)
    grad = torch.randn_like(inputs[0])
    for x in inputs:
        x.requires_grad_()
    out = cross_attention(*inputs, TRITON, text_lengths=lengths if given else None)
    ours = torch.autograd.grad(out, inputs, grad)
    theirs = torch.autograd.grad(cross_attention_reference(*inputs), inputs, grad)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_compiled_in_one_graph() -> None:
    inputs, lengths = operands(CASES[2])
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    expected = cross_attention(*inputs, TRITON, text_lengths=lengths)
    assert torch.equal(compiled(*inputs, TRITON, text_lengths=lengths), expected)


def test_opcheck() -> None:
    inputs, lengths = operands((1, 5, 6, 7, 1, 16, (3,)))
    torch.library.opcheck(_cross_attention, (*(x.requires_grad_() for x in inputs), lengths))


def test_refusals() -> None:
    inputs, lengths = operands(CASES[2])
    for wrong in (lengths.long(), lengths[:1]):
        with pytest.raises(ValueError, match=r"expected \[2\] int32"):
            cross_attention(*inputs, TRITON, text_lengths=wrong)
    with pytest.raises(ValueError, match=r"\(image\).* do not fit"):
        cross_attention(*inputs[:4], inputs[4][:, 1:], TRITON)
