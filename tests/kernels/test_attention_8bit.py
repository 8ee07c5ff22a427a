"""8-bit attention's definition: what rounding costs, and that its transformations cost nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gen3r_kernels.attention import attention_reference
from gen3r_kernels.attention_8bit import (
    _attention_quantized_op,
    attention_8bit_reference,
    attention_quantized,
    quantize_attention_reference,
)
from gen3r_kernels.attention_hopper import HopperConfig, launch_hopper


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1024, 2, 128, generator=rng) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize(("fmt", "limit"), [("int8", 0.015), ("fp8", 0.045)])
def test_error_of_normal_data(fmt: str, limit: float) -> None:
    """int8: 0.6 % and 0.9 %; e4m3: 2.45 % twice (see the module)."""
    q, k, v = inputs()
    found = error(attention_8bit_reference(q, k, v, fmt), attention_reference(q, k, v))
    assert limit / 3 < found < limit


def test_a_common_part_of_the_keys_costs_nothing() -> None:
    q, k, v = inputs()
    shifted = k + 20 * torch.randn(128)
    found = error(attention_8bit_reference(q, shifted, v), attention_reference(q, shifted, v))
    assert found < 0.02


def test_an_outlier_channel_costs_little() -> None:
    """One channel of k times 50 would take the bits of the 127 others (error 0.25 without)."""
    q, k, v = inputs()
    k[..., 5] *= 50
    found = error(attention_8bit_reference(q, k, v), attention_reference(q, k, v))
    assert found < 0.06


def test_launch_refuses_what_the_kernel_does_not_take() -> None:
    q = torch.randn(1, 130, 2, 96, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="other head sizes run on attention_triton"):
        launch_hopper(q, q, q)
    wide = torch.randn(1, 130, 2, 128)
    with pytest.raises(ValueError, match="use attention_triton for float32"):
        launch_hopper(wide, wide, wide)
    q8 = torch.zeros(1, 130, 2, 128, dtype=torch.int8)
    with pytest.raises(ValueError, match="need q_scale and k_scale"):
        launch_hopper(q8, q8, wide.bfloat16())
    scale = torch.ones(1, 2, 130)
    with pytest.raises(ValueError, match="one scale per 128 keys"):
        launch_hopper(q8, q8, wide.bfloat16(), scale, scale)


def test_buffers_fit_in_shared_memory() -> None:
    for dtype in (torch.bfloat16, torch.int8):
        config = HopperConfig()
        row = 128 * dtype.itemsize
        size = 128 * row + config.stages * config.block * (row + 256)
        assert size < 227 * 1024


def test_what_the_kernel_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both launches of a call, and operands that TMA can read, without a GPU."""
    launches: list[tuple[tuple[object, ...], dict[str, object]]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            assert grid == (2 * 3 * 2,)  # batch, heads, tiles of 128 queries
            return lambda *arguments, **options: launches.append((arguments, options))

    monkeypatch.setattr("gen3r_kernels.attention_hopper.attention_kernel", Kernel())
    one_off = torch.randn(2 * 200 * 3 * 128 + 1).bfloat16()[1:].view(2, 200, 3, 128)
    launch_hopper(one_off, one_off, one_off)
    assert [(o["ONLINE"], o["ONLY_FLAGGED"]) for _, o in launches] == [(False, False), (True, True)]
    for arguments, options in launches:
        assert all(x.base.data_ptr() % 16 == 0 for x in arguments[:3])  # type: ignore[attr-defined]
        assert arguments[-1] == pytest.approx(128**-0.5 / math.log(2)) and not options["BIT8"]


def test_quantised_operands_stand_for_themselves() -> None:
    """attention_quantized over what quantize_attention_reference gives, v a strided view."""
    q, k, v = inputs()
    v = torch.cat([v, v], dim=2)[:, :, :2]
    q8, q_scale, k8, k_scale = quantize_attention_reference(q, k)
    operands = (q8.to(torch.int8), q_scale, k8.to(torch.int8), k_scale)
    found = attention_quantized(*operands, v)
    torch.testing.assert_close(found, attention_8bit_reference(q, k, v))
    assert attention_quantized(*operands, v.bfloat16()).dtype == torch.bfloat16
    compiled = torch.compile(attention_quantized, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*operands, v), found)


def test_the_operator_of_quantised_operands() -> None:
    """Its fake and its result agree in shape, dtype and strides."""
    q8 = torch.zeros(1, 130, 2, 128, dtype=torch.int8)
    scale, v = torch.ones(1, 2, 130), torch.randn(1, 130, 4, 128).bfloat16()[:, :, :2]
    operands = (q8, scale, q8, scale[..., :2].contiguous(), v)
    torch.library.opcheck(_attention_quantized_op, operands)
    with pytest.raises(ValueError, match="no backward"):
        attention_quantized(*operands[:4], v.float().requires_grad_())
