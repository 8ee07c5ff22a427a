"""rms_norm_silu's kernels in Triton's interpreter: values and gradients against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r_kernels import Backends, rms_norm_silu, rms_norm_silu_reference

TRITON = Backends(operators="triton")
SHAPES = [(2, 12, 3, 5, 7), (1, 96, 2, 9, 3), (2, 37, 5, 7), (1, 1, 1, 3, 2)]


def arrange(x: Tensor, memory: str) -> Tensor:
    last = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    if memory == "last":
        return x.contiguous(memory_format=last)
    return x.contiguous() if memory == "first" else x.transpose(-1, -2)


def inputs(shape: tuple[int, ...], memory: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(*shape)
    x[:, :2] *= 50.0  # outlier channels
    gamma = torch.randn(shape[1], *([1] * (len(shape) - 2)))
    return arrange(x, memory), gamma


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("memory", ["last", "first", "neither"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], memory: str, silu: bool) -> None:
    x, gamma = inputs(shape, memory)
    leaves = [(x.clone().requires_grad_(), gamma.clone().requires_grad_()) for _ in range(2)]
    out = rms_norm_silu(*leaves[0], silu, backends=TRITON)
    expected = rms_norm_silu_reference(*leaves[1], silu)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(expected)
    actual = torch.autograd.grad(out, leaves[0], dy)
    wanted = torch.autograd.grad(expected, leaves[1], dy)
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-4)


def test_zeros_stay_zero_and_differentiable() -> None:
    x, gamma = inputs((1, 6, 1, 2, 2), "last")
    x[..., 0, 0] = 0.0
    x.requires_grad_()
    out = rms_norm_silu(x, gamma, backends=TRITON)
    assert not out[..., 0, 0].any()
    # The reference's gradient is NaN there: autograd takes the square root's slope at 0.
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_half_precision_keeps_dtype_and_memory_format() -> None:
    x, gamma = inputs((1, 24, 2, 5, 4), "last")
    out = rms_norm_silu(x.half(), gamma.half(), backends=TRITON)
    assert out.dtype == torch.float16 and out.stride() == x.stride()
    expected = rms_norm_silu_reference(x.half(), gamma.half())
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=1e-3)


def test_batch_and_frame_slices() -> None:
    x, gamma = inputs((2, 8, 4, 3, 3), "last")
    part = x[:, :, 1:3]
    out = rms_norm_silu(part, gamma, backends=TRITON)
    torch.testing.assert_close(out, rms_norm_silu_reference(part, gamma), rtol=1e-5, atol=1e-5)


def test_refuses_too_many_channels() -> None:
    with pytest.raises(ValueError, match=r"4097 channels are above 4096; use operators='ref"):
        rms_norm_silu(torch.zeros(1, 4097, 1, 1), torch.ones(4097, 1, 1), backends=TRITON)


def test_opcheck() -> None:
    x, gamma = inputs((1, 6, 2, 3, 3), "last")
    torch.library.opcheck(
        torch.ops.gen3r.rms_norm_silu.default,
        (x.requires_grad_(), gamma.requires_grad_(), True, torch.float32, x.detach()[:, :, :1]),
    )


@pytest.mark.parametrize("memory", ["last", "first"])
def test_frames_in_front_and_another_dtype(memory: str) -> None:
    x, gamma = inputs((2, 24, 3, 5, 4), memory)
    lead = arrange(torch.randn(2, 24, 2, 5, 4), memory)
    leaves = [[t.clone().requires_grad_() for t in (x, gamma, lead)] for _ in range(2)]
    out = rms_norm_silu(*leaves[0][:2], lead=leaves[0][2], backends=TRITON)
    expected = rms_norm_silu_reference(*leaves[1][:2], lead=leaves[1][2])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(expected)
    actual = torch.autograd.grad(out, leaves[0], dy)
    for a, w in zip(actual, torch.autograd.grad(expected, leaves[1], dy), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-4)
    half = rms_norm_silu(x, gamma, lead=lead.half(), out_dtype=torch.float16, backends=TRITON)
    assert half.dtype == torch.float16 and half.stride() == out.stride()
    torch.testing.assert_close(half.float(), expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"lead of shape .* does not fit x"):
        rms_norm_silu(x, gamma, lead=lead[:, :, :, :1], backends=TRITON)
