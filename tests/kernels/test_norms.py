"""The norm operators where there is no GPU: choice of implementation, 8-bit references, fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import gen3r_kernels as ops
from gen3r_kernels import Backends
from gen3r_kernels.dispatch import INTERPRETED
from gen3r_kernels.layer_norm_modulate_backward import LayerNormBackwardConfig
from gen3r_kernels.layer_norm_rows import LayerNormConfig
from gen3r_kernels.rms_norm_rope import RmsNormRopeConfig
from gen3r_kernels.rms_norm_rope_int8 import rms_norm_rope_int8, rope_key_mean

FLOAT8 = torch.float8_e4m3fn
BATCH, ROWS, HEADS, HEAD_DIM = 2, 19, 3, 40
WIDTH = HEADS * HEAD_DIM


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def calls(backends: Backends) -> dict[str, Callable[[], Any]]:
    """Every operator on CPU tensors."""
    x, y = normal(2, BATCH, ROWS, WIDTH).unbind()
    weight, table = normal(WIDTH), normal(2, ROWS, HEAD_DIM // 2).unbind()
    rope: dict[str, Any] = {"num_heads": HEADS, "backends": backends}
    return {
        "layer_norm_modulate": lambda: ops.layer_norm_modulate(x, backends=backends),
        "gated_residual": lambda: ops.gated_residual(x, y, backends=backends),
        "rms_norm": lambda: ops.rms_norm(x, weight, backends=backends),
        "rms_norm_rope": lambda: ops.rms_norm_rope(x, y, weight, weight, *table, **rope),
        "rms_norm_rope_int8": lambda: rms_norm_rope_int8(x, y, weight, weight, *table, **rope),
        "rope_key_mean": lambda: rope_key_mean(x, weight, *table, **rope),
    }


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs kernels on the CPU")
@pytest.mark.parametrize("name", calls(Backends()))
def test_triton_on_the_cpu_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: operators='triton' needs CUDA tensors"):
        calls(Backends(operators="triton"))[name]()
    calls(Backends(operators="auto"))[name]()


def test_eight_bit_rows_are_the_quantised_reference() -> None:
    x, scale = normal(BATCH, ROWS, WIDTH), normal(BATCH, 1, WIDTH)
    rows = ops.layer_norm_modulate(x, scale, out_dtype=FLOAT8)
    exact = ops.layer_norm_modulate_reference(x, scale)
    for ours, theirs in zip(rows, ops.quantize_reference(exact), strict=True):
        assert torch.equal(ours.float(), theirs.float())
    updated, rows = ops.gated_residual(x, x, out_dtype=FLOAT8)
    assert torch.equal(updated, x + x) and rows.values.dtype == FLOAT8
    error = (ops.dequantize(rows) - ops.layer_norm_modulate_reference(x + x)).abs()
    assert (error <= 2**-4 * ops.dequantize(rows).abs() + rows.scale * 2**-9).all()
    with pytest.raises(ValueError, match="8-bit rounding has no backward"):
        ops.gated_residual(x, x.requires_grad_(), out_dtype=FLOAT8)


def test_int8_reference() -> None:
    q, k = normal(2, BATCH, ROWS, WIDTH).unbind()
    weight, table = normal(WIDTH), normal(2, ROWS, HEAD_DIM // 2).unbind()
    mean = rope_key_mean(k, weight, *table, num_heads=HEADS)
    out = rms_norm_rope_int8(q, k, weight, weight, *table, num_heads=HEADS, k_mean=mean, block=32)
    assert out.k_scale.shape == (BATCH, HEADS, 1) and out.q_scale.shape == (BATCH, HEADS, ROWS)
    exact = ops.rms_norm_rope_reference(k, weight, *table, HEADS) - mean[:, None]
    error = (out.k * out.k_scale.transpose(1, 2)[..., None] - exact).abs()
    assert (error <= 0.501 * out.k_scale.transpose(1, 2)[..., None]).all()
    assert (out.q.abs().amax(-1) == 127).all()


def test_fakes_say_the_shapes() -> None:
    """What torch.compile sees of the kernels' operators."""
    gen3r = torch.ops.gen3r
    with FakeTensorMode():
        x = torch.empty(BATCH, ROWS, WIDTH)
        y, weight = x.bfloat16(), torch.empty(WIDTH)
        table = torch.empty(ROWS, HEAD_DIM // 2)
        out = gen3r.layer_norm_modulate(x, None, None, weight, None, 1e-6, torch.bfloat16)
        assert out.shape == x.shape and out.dtype == torch.bfloat16
        stream, *rows = gen3r.gated_residual_float8(x, y, *[None] * 5, 1e-6)
        assert stream.dtype == torch.float32 and rows[0].dtype == FLOAT8
        assert rows[1].shape == rows[2].shape == (BATCH, ROWS, 1)
        q, _ = gen3r.rms_norm_rope(y, y, weight, weight, table, table, HEADS, 1e-6)
        assert q.shape == (BATCH, ROWS, HEADS, HEAD_DIM) and q.dtype == torch.bfloat16
        rest = (weight, weight, table, table, HEADS, 1e-6, None, 128)
        parts = gen3r.rms_norm_rope_int8(y, y, *rest)
        assert parts[3].shape == (BATCH, HEADS, 1) and parts[2].dtype == torch.int8


def test_launches_follow_the_shape() -> None:
    assert LayerNormConfig.for_shape(63_700, 1536, True, False) == LayerNormConfig(2048, 1, 4)
    assert LayerNormConfig.for_shape(63_700, 1536, False, True) == LayerNormConfig(2048, 8, 2)
    assert LayerNormConfig.for_shape(38, 24, False, True) == LayerNormConfig(128, 1, 1)
    assert LayerNormBackwardConfig.for_shape(63_700, 8192, True).stages == 1
    rotated = RmsNormRopeConfig.for_shape(63_700, 12, 128, True)
    assert (rotated.heads, rotated.dim, rotated.steps) == (16, 128, 4)
    assert RmsNormRopeConfig.for_shape(63_700, 1, 1536, False).steps == 1
