"""Attention without a GPU: the table and what `auto` makes of it, kernel choice, padding proof."""

from __future__ import annotations

import dataclasses
import importlib
import math

import pytest
import torch
from torch import Tensor

from gen3r_kernels import attention_backward, attention_triton, backends
from gen3r_kernels.attention import attention, attention_reference, kernel_for
from gen3r_kernels.attention_table import TABLE, measured_order
from gen3r_kernels.backends import ATTENTION_BACKENDS, Backends, choose, explain
from gen3r_kernels.cross_attention import cross_attention
from gen3r_kernels.cross_attention import kernel_for as cross

H100 = "NVIDIA H100 80GB HBM3"


def test_the_table_is_in_order_and_exact() -> None:
    for rows in TABLE.values():
        for row in rows:
            speeds = [measured.tflops for measured in row.order]
            assert speeds == sorted(speeds, reverse=True)
            for measured in row.order:
                assert ATTENTION_BACKENDS[measured.backend].exact


def test_measured_order() -> None:
    assert measured_order("NVIDIA GeForce RTX 4090", 31_850, 128) is None
    assert measured_order(H100, 100, 128) is None
    row = measured_order(H100, 31_850, 128)
    assert row is not None and row.max_head_dim == 128
    narrow = measured_order(H100, 31_850, 64)
    assert narrow is not None and narrow.max_head_dim == 64
    assert measured_order(H100, 31_850, 256) is None


class OnGpu:
    """As much of a CUDA tensor as the choice looks at."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, length: int, dtype: torch.dtype, requires_grad: bool) -> None:
        self.shape, self.dtype = (1, length, 2, 128), dtype
        self.requires_grad = requires_grad


def chosen(length: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> list[str]:
    """Name that auto takes, then the names passed over."""
    x = OnGpu(length, dtype, grad)
    choice = choose(x, x, x)  # type: ignore[arg-type]
    return [choice.backend.name, *(name.split()[0] for name, _ in choice.passed_over)]


def test_auto_takes_the_fastest_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_gpu_name", lambda index: H100)
    monkeypatch.setattr(backends, "_capability", lambda: (9, 0))
    monkeypatch.setattr(backends, "_first_installed", lambda modules: modules[0])
    row = measured_order(H100, 31_850, 128)
    assert row is not None
    first, second = row.order[0].backend, row.order[1].backend
    assert chosen(31_850) == [first]
    assert chosen(100) == ["sdpa"]
    assert chosen(31_850, torch.float32)[0] in ("sdpa", "triton")
    x = OnGpu(31_850, torch.bfloat16, False)
    assert "TFLOP/s measured on NVIDIA H100" in explain(x)[0]  # type: ignore[arg-type]
    forward_only = dataclasses.replace(ATTENTION_BACKENDS[first], has_backward=False)
    monkeypatch.setitem(ATTENTION_BACKENDS, first, forward_only)
    assert chosen(31_850, grad=True) == [second, first]
    assert chosen(31_850) == [first]


def test_auto_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_gpu_name", lambda index: H100)
    monkeypatch.setattr(backends, "_capability", lambda: (9, 0))
    monkeypatch.setattr(backends, "_first_installed", lambda modules: "")
    x = OnGpu(31_850, torch.bfloat16, False)
    lines = explain(x)  # type: ignore[arg-type]
    assert any("passed over fa3" in line and "gen3r-engine[fa3]" in line for line in lines)


def test_auto_takes_the_order_of_the_same_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_gpu_name", lambda index: "NVIDIA H20")
    monkeypatch.setattr(backends, "_first_installed", lambda modules: modules[0])
    x = OnGpu(31_850, torch.bfloat16, False)
    monkeypatch.setattr(backends, "_capability", lambda: (9, 0))
    assert "on NVIDIA H100, the same architecture" in explain(x)[0]  # type: ignore[arg-type]
    monkeypatch.setattr(backends, "_capability", lambda: (8, 0))
    assert chosen(31_850) == ["sdpa"]


def test_auto_on_the_cpu_is_sdpa() -> None:
    q = torch.zeros(1, 8192, 1, 128, dtype=torch.bfloat16)
    assert explain(q) == ["auto takes sdpa: nothing is measured off CUDA GPUs"]


def test_refusals() -> None:
    q = torch.zeros(1, 2, 1, 64)
    if not torch.cuda.is_available():
        for name in ("triton", "triton_int8", "triton_fp8"):
            with pytest.raises(ValueError, match=f"'{name}': needs a CUDA GPU; use 'sdpa'"):
                attention(q, q, q, Backends(attention=name))
        with pytest.raises(ValueError, match="needs CUDA tensors, got one on cpu"):
            keys = (q, q, q, q)
            cross_attention(q, *keys, Backends(operators="triton"))
    only_128 = dataclasses.replace(ATTENTION_BACKENDS["sdpa"], head_dims=(128,))
    with pytest.raises(ValueError, match="head size 64 is not one of 128"):
        only_128.check(q)
    needs_grad = torch.zeros(1, 2, 1, 64).requires_grad_()
    forward_only = dataclasses.replace(ATTENTION_BACKENDS["sdpa"], has_backward=False)
    with pytest.raises(ValueError, match="it has no backward"):
        forward_only.check(q, needs_grad)


def test_kernel_choice_is_a_function_of_shapes() -> None:
    real = (2, 31_850, 31_850, 12, 128)
    assert kernel_for(real, torch.bfloat16, (9, 0)) == "hopper"
    assert kernel_for(real, torch.bfloat16, (8, 0)) == "portable"
    assert kernel_for(real, torch.float32, (9, 0)) == "portable"
    assert kernel_for((*real[:4], 64), torch.float16, (9, 0)) == "hopper"
    assert kernel_for((*real[:4], 96), torch.float16, (9, 0)) == "portable"
    provider = attention_backward.provider_for
    long, short = (31_850, 31_850, 128), (31_850, 257, 128)
    assert provider(long, torch.bfloat16, (9, 0)) == "cudnn"
    assert provider(long, torch.bfloat16, (9, 0), fa4=True) == "fa4"
    assert provider(short, torch.bfloat16, (9, 0), fa4=True) == "cudnn"
    repeated = {"fa4": True, "deterministic": True}
    assert provider(long, torch.bfloat16, (9, 0), **repeated) == "fa4_deterministic"
    assert provider(short, torch.bfloat16, (9, 0), **repeated) == "triton"
    assert provider(long, torch.bfloat16, (8, 0), fa4=True) == "triton"
    assert provider(long, torch.float32, (9, 0), fa4=True) == "triton"
    assert provider((512, 512, 256), torch.bfloat16, (9, 0)) == "triton"
    assert cross(128, 257, True, torch.bfloat16, (9, 0)) == "hopper"
    for wrong in ((64, 257, True), (128, 300, True), (128, 257, False)):
        assert cross(*wrong, torch.bfloat16, (9, 0)) == "portable"
    assert cross(128, 257, True, torch.bfloat16, (8, 0)) == "portable"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 128, 256])
def test_configs_exist_everywhere(head_dim: int, capability: tuple[int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        config = attention_triton.Config.for_shape(head_dim, dtype, capability)
        assert config.block_m >= 16 and config.block_n >= 16
        assert attention_backward.Config.for_shape(head_dim, dtype, capability).kept >= 16


# ----------------------------------------------------------------------------- the padding's proof


def with_one_padding_key(q: Tensor, k: Tensor, v: Tensor, real: int) -> Tensor:
    """Attention to `real` keys and one more, which counts for all padding by a bias."""
    used = min(real + 1, k.shape[1])
    scores = q.transpose(1, 2) @ k[:, :used].permute(0, 2, 3, 1) * q.shape[-1] ** -0.5
    if used > real:
        scores[..., real] += math.log(k.shape[1] - real)
    return (scores.softmax(-1) @ v[:, :used].transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("real", [0, 1, 77, 511, 512])
def test_equal_padding_keys_are_one_key_with_a_bias(real: int) -> None:
    q = torch.randn(1, 19, 2, 64, dtype=torch.float64)
    k, v = torch.randn(2, 1, 512, 2, 64, dtype=torch.float64).unbind()
    if real < 512:
        k[:, real:], v[:, real:] = k[:, real : real + 1].clone(), v[:, real : real + 1].clone()
    expected = attention(q, k, v, Backends(attention="reference"))
    torch.testing.assert_close(with_one_padding_key(q, k, v, real), expected, rtol=0, atol=1e-13)


def test_lengths_change_nothing_on_the_cpu() -> None:
    q = torch.randn(2, 5, 2, 16)
    keys = [torch.randn(2, n, 2, 16) for n in (7, 7, 3, 3)]
    lengths = torch.tensor([2, 7], dtype=torch.int32)
    plain = cross_attention(q, *keys, Backends())
    given = cross_attention(q, *keys, Backends(), text_lengths=lengths)
    assert torch.equal(plain, given)


def test_the_reference_writes_large_score_matrices_head_by_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64) for n in (5, 7, 7))
    whole = attention_reference(q, k, v)
    monkeypatch.setattr(importlib.import_module("gen3r_kernels.attention"), "MOST_SCORES", 10)
    assert torch.allclose(attention_reference(q, k, v), whole, rtol=1e-14, atol=1e-14)
