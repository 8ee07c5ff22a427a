"""Quantisation for 8-bit attention, interpreted: the kernels against the float32 definition."""

from __future__ import annotations

import pytest
import torch

from gen3r_kernels.attention_8bit import quantize_attention, quantize_attention_reference


@pytest.mark.parametrize(("queries", "keys", "outlier"), [(199, 257, 1.0), (130, 130, 50.0)])
def test_quantize_attention(queries: int, keys: int, outlier: float) -> None:
    q, k = torch.randn(1, queries, 2, 128), torch.randn(1, keys, 2, 128) + torch.randn(128)
    k[..., 5] *= outlier
    q[:, 3] = 0.0  # a row of zeros has a scale of its own
    actual = quantize_attention(q, k)
    expected = quantize_attention_reference(q, k)
    for scale in (1, 3):
        torch.testing.assert_close(actual[scale], expected[scale], rtol=1e-5, atol=0)
    for values in (0, 2):
        assert actual[values].dtype == torch.int8
        # beside a half a rounding error of the scale may tip a value to its neighbour
        difference = (actual[values].float() - expected[values]).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_an_unknown_format_is_refused() -> None:
    q = torch.randn(1, 4, 1, 128)
    with pytest.raises(ValueError, match="format 'int4' is unknown; known: int8, fp8"):
        quantize_attention(q, q, "int4")
