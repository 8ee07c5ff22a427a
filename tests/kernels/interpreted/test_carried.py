"""Kernels in the form that packages carry: results through plain pointers, in the interpreter.

Only AOTInductor launches these forms (`gen3r_kernels.carried`); here the operators are told that a
package is being made, while their launches stay real.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from gen3r_kernels import (
    Backends,
    causal_conv3d,
    causal_conv3d_reference,
    rms_norm_silu,
    rms_norm_silu_reference,
    upsample_conv2d,
    upsample_conv2d_reference,
)

TRITON = Backends(operators="triton")


@pytest.fixture(autouse=True)
def carried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("causal_conv3d_triton", "upsample_conv2d", "rms_norm_silu"):
        module = importlib.import_module(f"gen3r_kernels.{name}")
        monkeypatch.setattr(module, "carrying", lambda: True)


@pytest.mark.parametrize("channels", [96, 192], ids=str)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_causal_conv3d(channels: int, residual: bool) -> None:
    """More pixels than a program's rectangle, cut at every border; 64 + 32 and 128 + 64."""
    x = torch.randn(1, 16, 2, 9, 18).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = torch.randn(channels, 16, 3, 3, 3) / 20, torch.randn(channels)
    past = torch.randn(1, 16, 2, 9, 18).contiguous(memory_format=torch.channels_last_3d)
    added = torch.randn(1, channels, 2, 9, 18) if residual else None
    found = causal_conv3d(x, weight, bias, past, residual=added, backends=TRITON)
    expected = causal_conv3d_reference(x, weight, bias, past, residual=added)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_causal_conv3d_into_pairs() -> None:
    x = torch.randn(1, 16, 1, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = torch.randn(384, 16, 3, 1, 1) / 7, torch.randn(384)
    how = {"padding": (0, 0, 0), "pairs": True}
    found = causal_conv3d(x, weight, bias, backends=TRITON, **how)
    expected = causal_conv3d_reference(x, weight, bias, **how)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [96, 64], ids=str)
def test_upsample_conv2d(channels: int) -> None:
    x = torch.randn(2, 16, 9, 5).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(channels, 16, 3, 3) / 12, torch.randn(channels)
    found = upsample_conv2d(x, weight, bias, backends=TRITON)
    expected = upsample_conv2d_reference(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [True, False], ids=["channels-last", "contiguous"])
def test_rms_norm_silu_behind_a_lead(last: bool) -> None:
    memory = torch.channels_last_3d if last else torch.contiguous_format
    x = torch.randn(2, 24, 2, 3, 5).contiguous(memory_format=memory)
    lead, gamma = torch.randn(2, 24, 2, 3, 5), torch.randn(24, 1, 1, 1)
    found = rms_norm_silu(x, gamma, lead=lead, backends=TRITON)
    expected = rms_norm_silu_reference(x, gamma, lead=lead)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
