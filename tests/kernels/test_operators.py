"""Operators: references against independent formulas, dtypes of public functions, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import gen3r_kernels as ops
from gen3r_kernels import ATTENTION_BACKENDS, Backends, EulerStep, MultistepStep

CLOSE = {"rtol": 0.0, "atol": 2e-6}
BATCH, LENGTH, HEADS, HEAD_DIM = 2, 199, 3, 40  # awkward on purpose
WIDTH = HEADS * HEAD_DIM


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def test_attention_equals_sdpa() -> None:
    q, k, v = normal(2, 33, 3, 16), normal(2, 57, 3, 16), normal(2, 57, 3, 16)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(ops.attention_reference(q, k, v), expected.transpose(1, 2), **CLOSE)
    for name in ("auto", "sdpa", "reference"):
        out = ops.attention(q, k, v, Backends(attention=name))
        torch.testing.assert_close(out, expected.transpose(1, 2), **CLOSE)


def test_attention_refuses_what_does_not_fit() -> None:
    q = normal(1, 4, 2, 8)
    with pytest.raises(ValueError, match="do not fit"):
        ops.attention(q, q[:, :, :1], q[:, :, :1], Backends())
    with pytest.raises(ValueError, match="attention backend 'fast' is unknown; known: auto"):
        Backends(attention="fast")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cudnn': needs a CUDA GPU; use 'sdpa'"):
            ops.attention(q, q, q, Backends(attention="cudnn"))
    with pytest.raises(ValueError, match="head size 2048 is above 1024"):
        wide = normal(1, 1, 1, 2048)
        ops.attention(wide, wide, wide, Backends())


def test_a_backend_without_backward_is_refused_in_training() -> None:
    backend = dataclasses.replace(ATTENTION_BACKENDS["sdpa"], has_backward=False)
    q = normal(1, 2, 1, 8).requires_grad_()
    with pytest.raises(ValueError, match="'sdpa': it has no backward"):
        backend.check(q)
    with torch.no_grad():
        backend.check(q)


def test_missing_packages_say_how_to_install() -> None:
    for name, package in (("fa2", "flash"), ("fa3", "fa3"), ("xformers", "xformers")):
        reason = ATTENTION_BACKENDS[name].why_not()
        if reason is not None and "not installed" in reason:
            assert f"gen3r-engine[{package}]" in reason


def test_cross_attention_is_the_sum_of_both() -> None:
    q = normal(2, 19, 2, 16)
    keys = [normal(2, n, 2, 16) for n in (7, 7, 11, 11)]
    expected = ops.attention_reference(q, *keys[:2]) + ops.attention_reference(q, *keys[2:])
    torch.testing.assert_close(ops.cross_attention_reference(q, *keys), expected, **CLOSE)
    torch.testing.assert_close(ops.cross_attention(q, *keys, Backends()), expected, **CLOSE)


def test_layer_norm_modulate() -> None:
    x, scale, shift = normal(BATCH, LENGTH, WIDTH), *normal(2, BATCH, 1, WIDTH).unbind()
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    normed = (x - mean) / (variance + 1e-6).sqrt()
    out = ops.layer_norm_modulate(x, scale, shift, out_dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    expected = normed * (1 + scale) + shift
    torch.testing.assert_close(
        ops.layer_norm_modulate(x, scale, shift), expected, rtol=0, atol=1e-5
    )
    weight, bias = normal(WIDTH), normal(WIDTH)
    affine = ops.layer_norm_modulate(x, weight=weight, bias=bias)
    torch.testing.assert_close(affine, normed * weight + bias, rtol=0, atol=1e-5)


def test_gated_residual_is_update_then_norm() -> None:
    stream, y = normal(BATCH, LENGTH, WIDTH), normal(BATCH, LENGTH, WIDTH, dtype=torch.bfloat16)
    gate, scale, shift = normal(3, BATCH, 1, WIDTH).unbind()
    updated, normed = ops.gated_residual(stream, y, gate, scale, shift, out_dtype=torch.bfloat16)
    assert updated.dtype == torch.float32 and normed.dtype == torch.bfloat16
    torch.testing.assert_close(updated, stream + y.float() * gate, **CLOSE)
    expected = ops.layer_norm_modulate(updated, scale, shift, out_dtype=torch.bfloat16)
    assert torch.equal(normed, expected)
    plain, _ = ops.gated_residual(stream, y)
    torch.testing.assert_close(plain, stream + y.float(), **CLOSE)


def test_rms_norm_rope_rotates_pairs() -> None:
    q, k = normal(BATCH, LENGTH, WIDTH), normal(BATCH, LENGTH, WIDTH)
    weights = normal(2, WIDTH)
    angles = normal(LENGTH, HEAD_DIM // 2)
    out_q, out_k = ops.rms_norm_rope(q, k, *weights, angles.cos(), angles.sin(), num_heads=HEADS)
    for x, weight, out in ((q, weights[0], out_q), (k, weights[1], out_k)):
        normed = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight).double()
        pairs = torch.view_as_complex(normed.view(BATCH, LENGTH, HEADS, -1, 2))
        turned = pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)[:, None]
        expected = torch.view_as_real(turned).flatten(-2).float()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="do not fit"):
        ops.rms_norm_rope(q, k, *weights, angles[1:], angles[1:], num_heads=HEADS)


@pytest.mark.parametrize("shape", [(2, 12, 3, 5, 7), (2, 12, 5, 7)])
def test_rms_norm_silu(shape: tuple[int, ...]) -> None:
    x, gamma = normal(*shape), normal(shape[1], *([1] * (len(shape) - 2)))
    normed = x / x.square().mean(1, keepdim=True).sqrt() * gamma
    torch.testing.assert_close(ops.rms_norm_silu(x, gamma, silu=False), normed, rtol=0, atol=1e-5)
    expected = normed * torch.sigmoid(normed)
    torch.testing.assert_close(ops.rms_norm_silu(x, gamma), expected, rtol=0, atol=1e-5)
    assert ops.rms_norm_silu(x.bfloat16(), gamma).dtype == torch.bfloat16
    assert not ops.rms_norm_silu(torch.zeros_like(x), gamma).any()


def test_guidance_step_euler() -> None:
    x, uncond, cond = normal(3, 1, 4, 2, 3, 4).unbind()
    out, history = ops.guidance_step(x, uncond, cond, 5.0, EulerStep(-0.1))
    torch.testing.assert_close(out, x - 0.1 * (uncond + 5 * (cond - uncond)), **CLOSE)
    assert history == ()
    alone, _ = ops.guidance_step(x.bfloat16(), None, cond, 5.0, EulerStep(-0.1))
    assert alone.dtype == torch.bfloat16


def test_guidance_step_keeps_two_predictions() -> None:
    x, velocity = normal(2, 1, 4, 2, 3, 4).unbind()
    step = MultistepStep(0.5, (0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    last, m_1, m_2 = normal(3, 1, 4, 2, 3, 4).unbind()
    out, history = ops.guidance_step(x, None, velocity, 1.0, step, (last, m_1, m_2))
    m = x - 0.5 * velocity
    corrected = 0.1 * last + 0.2 * m_1 + 0.3 * m_2 + 0.4 * m
    torch.testing.assert_close(out, 0.5 * corrected + 0.6 * m + 0.7 * m_1, **CLOSE)
    for actual, expected in zip(history, (corrected, m, m_1), strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)


def test_unproject_inverts_projection() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64))
    extrinsics = torch.cat([rotation, torch.randn(2, 3, 1, dtype=torch.float64)], dim=-1)
    k = torch.tensor([[50.0, 0, 4], [0, 60, 3], [0, 0, 1]], dtype=torch.float64).expand(2, 3, 3)
    depth = torch.rand(2, 6, 8) + 0.5
    near, far = torch.full((2,), 0.6), torch.full((2,), 1.4)
    points, mask = ops.unproject(depth, extrinsics, k, near, far)
    assert points.dtype == torch.float64 and torch.equal(mask, (depth > 0.6) & (depth < 1.4))
    camera = points @ rotation[:, None].mT + extrinsics[:, None, None, :, 3]
    pixels = camera @ k[:, None].mT
    torch.testing.assert_close(pixels[..., 2], depth.double())
    grid = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), indexing="ij")
    for axis, expected in ((1, grid[0]), (0, grid[1])):
        actual = pixels[..., axis] / pixels[..., 2]
        torch.testing.assert_close(actual, expected.double().expand(2, 6, 8))


@pytest.mark.parametrize("op", ["attention", "norm", "rope"])
def test_references_have_gradients(op: str) -> None:
    x = normal(1, 6, 2 * 8).double().requires_grad_()
    if op == "attention":
        out = ops.attention_reference(*(x.unflatten(-1, (2, 8)) for _ in range(3)))
    elif op == "norm":
        out = ops.gated_residual_reference(x, x)[1]
    else:
        table = torch.ones(6, 4)
        out = ops.rms_norm_rope_reference(x, torch.ones(16), table, table, 2)
    out.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
