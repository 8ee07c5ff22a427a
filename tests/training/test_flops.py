"""Counted operations of both stages."""

from __future__ import annotations

import pytest
import torch

from gen3r.config import GEN3R
from gen3r.nano import ARCHITECTURE
from gen3r_training.flops import (
    adapter_flops,
    diffusion_flops,
    encoding_flops,
    peak_flops,
    tokens,
    transformer_forward_flops,
)


def test_transformer() -> None:
    """271.4 TFLOP a forward at the real size; a training step is three of them."""
    assert tokens(GEN3R.transformer, 49, 560) == 31_850
    forward = transformer_forward_flops(GEN3R.transformer, 49, 560)
    assert forward == pytest.approx(271.4e12, rel=1e-3)
    assert diffusion_flops(GEN3R.transformer, 49, 560) == 3 * forward


def test_adapter() -> None:
    """The adapter's backward is about twice its forward; frozen encoders have none."""
    parts = (ARCHITECTURE.vggt, ARCHITECTURE.wan_vae, ARCHITECTURE.geo_adapter, 5, 112)
    encoding, step = encoding_flops(*parts), adapter_flops(*parts)
    assert 0 < encoding < step < 20 * encoding


def test_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
