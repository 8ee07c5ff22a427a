"""causal_conv3d on a CPU: the library path, its memory of the past, and what the kernel takes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gen3r_kernels import Backends, causal_conv3d, causal_conv3d_reference
from gen3r_kernels.causal_conv3d import choose, supported


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 1, 1)])
def test_values_and_gradients(batch: int, kernel: tuple[int, int, int]) -> None:
    x, bias = torch.randn(batch, 7, 5, 13, 11), torch.randn(5)
    weight = torch.randn(5, 7, *kernel, requires_grad=True)
    past = torch.randn(batch, 7, kernel[0] - 1, 13, 11)
    options = {"stride": (2, 1, 1), "padding": (0, kernel[1] // 2, kernel[2] // 2)}
    out = causal_conv3d(x, weight, bias, past, **options)
    expected = F.conv3d(torch.cat([past, x], 2), weight, bias, *options.values())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=3e-5)
    reference = causal_conv3d_reference(x, weight, bias, past, **options)
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=3e-5)
    gradients = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)


def test_without_a_past_come_zeros_and_chunks_join_up() -> None:
    x, weight, bias = torch.randn(1, 4, 5, 6, 7), torch.randn(8, 4, 3, 3, 3), torch.randn(8)
    whole = causal_conv3d(x, weight, bias)
    zeros = torch.zeros(1, 4, 2, 6, 7)
    torch.testing.assert_close(whole, causal_conv3d(x, weight, bias, zeros))
    later = causal_conv3d(x[:, :, 3:], weight, bias, x[:, :, 1:3])
    torch.testing.assert_close(whole[:, :, 3:], later, rtol=0, atol=1e-5)


def test_dtype() -> None:
    x, weight = torch.randn(1, 4, 2, 6, 7).bfloat16(), torch.randn(8, 4, 3, 3, 3).bfloat16()
    assert causal_conv3d(x, weight, None).dtype == torch.bfloat16


def test_the_kernel_needs_a_gpu() -> None:
    x, weight = torch.randn(1, 8, 2, 6, 7), torch.randn(8, 8, 3, 3, 3)
    with pytest.raises(ValueError, match="needs CUDA tensors, got one on cpu"):
        causal_conv3d(x, weight, None, backends=Backends(operators="triton"))


def test_which_shapes_the_kernel_takes() -> None:
    clip, small, weight = (1, 96, 4, 560, 560), (1, 96, 4, 70, 70), (96, 96, 3, 3, 3)
    same = (1, 1, 1), (0, 1, 1)
    assert choose(clip, weight, *same) == choose(clip, (96, 192, 1, 3, 3), *same) == "kernel"
    assert choose(small, weight, *same) == "library"  # slower there
    assert supported((768, 384, 3, 1, 1), (1, 1, 1), (0, 0, 0))
    assert not supported(weight, (1, 2, 2), (0, 1, 1))
    assert not supported(weight, (1, 1, 1), (0, 0, 0))
