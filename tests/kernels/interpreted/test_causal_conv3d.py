"""causal_conv3d's kernel in Triton's interpreter, against the library's convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gen3r.appearance_vae import AppearanceVAE
from gen3r.config import AppearanceVAEConfig
from gen3r_kernels import Backends, causal_conv3d, causal_conv3d_reference

TRITON = Backends(operators="triton")


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


# Batch, channels in and out, frames, height and width, kernel, temporal stride, remembered frames.
CASES = [
    (1, 16, 96, 3, (9, 5), (3, 3, 3), 1, 2),
    (2, 16, 48, 2, (8, 16), (3, 3, 3), 1, None),
    (1, 24, 40, 1, (5, 7), (3, 3, 3), 1, 2),
    (2, 32, 64, 4, (5, 7), (3, 1, 1), 2, 1),
    (1, 8, 16, 2, (6, 17), (3, 1, 1), 1, 2),
    (1, 64, 24, 2, (10, 7), (1, 3, 3), 1, None),
    (1, 16, 192, 1, (3, 5), (3, 3, 3), 1, 2),
    (1, 3, 32, 2, (5, 9), (3, 3, 3), 1, 2),  # channels that are filled up to 8
    (1, 16, 3, 2, (5, 9), (3, 3, 3), 1, 2),
]


def make(case: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor | None, dict]:
    batch, channels_in, channels_out, frames, sides, kernel, stride, past = case
    x = last(torch.randn(batch, channels_in, frames, *sides))
    weight = last(torch.randn(channels_out, channels_in, *kernel)) / channels_in**0.5
    before = None if past is None else last(torch.randn(batch, channels_in, past, *sides))
    options = {"stride": (stride, 1, 1), "padding": (0, kernel[1] // 2, kernel[2] // 2)}
    return x, weight, torch.randn(channels_out), before, options


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: tuple) -> None:
    x, weight, bias, past, options = make(case)
    expected = causal_conv3d_reference(x, weight, bias, past, **options)
    out = causal_conv3d(x, weight, bias, past, **options, backends=TRITON)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    if case[2] % 8 == 0:
        assert out.is_contiguous(memory_format=torch.channels_last_3d)
    out = causal_conv3d(x, weight, None, past, **options, backends=TRITON)
    expected = causal_conv3d_reference(x, weight, None, past, **options)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [CASES[0], CASES[8]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_residual(case: tuple, dtype: torch.dtype) -> None:
    """Added to the sums, in the residual's own dtype."""
    x, weight, bias, past, options = make(case)
    narrow = [t.to(dtype) for t in (x, weight, bias, past)]
    residual = last(torch.randn(1, case[2], *x.shape[2:]))
    out = causal_conv3d(*narrow, **options, residual=residual, backends=TRITON)
    assert out.dtype == torch.float32
    expected = causal_conv3d_reference(*narrow, **options, residual=residual)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_pairs() -> None:
    x, weight, bias, past, options = make((1, 16, 256, 3, (4, 5), (3, 1, 1), 1, 2))
    out = causal_conv3d(x, weight, bias, past, **options, pairs=True, backends=TRITON)
    expected = causal_conv3d_reference(x, weight, bias, past, **options, pairs=True)
    assert out.shape == (1, 128, 6, 4, 5)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    halves = causal_conv3d_reference(x, weight, bias, past, **options)
    torch.testing.assert_close(out[:, :, 1::2], halves[:, 128:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot be added to pairs"):
        causal_conv3d(x, weight, bias, past, **options, pairs=True, residual=out, backends=TRITON)


def test_input_that_begins_with_its_past() -> None:
    for case in (CASES[0], CASES[3]):
        x, weight, bias, past, options = make(case)
        whole = last(torch.cat([past, x], dim=2)).requires_grad_()
        out = causal_conv3d(whole, weight, bias, **options, joined=True, backends=TRITON)
        expected = causal_conv3d(x, weight, bias, past, **options, backends=TRITON)
        assert torch.equal(out, expected)
        plain = causal_conv3d(whole, weight, bias, **options, joined=True)
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-4)
        dy = torch.randn_like(out)
        actual, wanted = (torch.autograd.grad(y, whole, dy)[0] for y in (out, plain))
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-3)


def test_any_memory_format() -> None:
    x, weight, bias, past, _ = make(CASES[2])
    out = causal_conv3d(
        x.contiguous(), weight.contiguous(), bias, past.contiguous(), backends=TRITON
    )
    torch.testing.assert_close(out, causal_conv3d(x, weight, bias, past, backends=TRITON))


def test_gradients_of_residual_and_pairs() -> None:
    for case, pairs in ((CASES[0], False), ((1, 16, 64, 2, (4, 5), (3, 1, 1), 1, 2), True)):
        x, weight, bias, past, options = make(case)
        leaves = [[t.clone().requires_grad_() for t in (x, weight, bias, past)] for _ in range(2)]
        residual = None if pairs else last(torch.randn(1, case[2], *x.shape[2:])).requires_grad_()
        more = {**options, "residual": residual, "pairs": pairs}
        out = causal_conv3d(*leaves[0], **more, backends=TRITON)
        expected = causal_conv3d_reference(*leaves[1], **more)
        extra = [] if residual is None else [residual]
        dy = torch.randn_like(expected)
        actual = torch.autograd.grad(out, leaves[0] + extra, dy)
        wanted = torch.autograd.grad(expected, leaves[1] + extra, dy)
        for a, e in zip(actual, wanted, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_gradients(case: tuple) -> None:
    x, weight, bias, past, options = make(case)
    inputs = [t for t in (x, weight, bias, past) if t is not None]
    leaves = [[t.clone().requires_grad_() for t in inputs] for _ in range(2)]
    out = causal_conv3d(*leaves[0], **options, backends=TRITON)
    expected = causal_conv3d_reference(*leaves[1], **options)
    dy = torch.randn_like(expected)
    actual = torch.autograd.grad(out, leaves[0], dy)
    for a, e in zip(actual, torch.autograd.grad(expected, leaves[1], dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


def test_half_precision() -> None:
    x, weight, bias, past, _ = (t.half() if isinstance(t, Tensor) else t for t in make(CASES[2]))
    out = causal_conv3d(x, weight, bias, past, backends=TRITON)
    assert out.dtype == torch.float16
    expected = causal_conv3d_reference(x, weight, bias, past)
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-3)


def test_refusals() -> None:
    x, weight, bias, past, _ = make(CASES[0])
    with pytest.raises(ValueError, match="do not fit; expected"):
        causal_conv3d(x[:, :8], weight, bias, None, backends=TRITON)
    with pytest.raises(ValueError, match=r"past of shape .* does not fit x"):
        causal_conv3d(x, weight, bias, past[..., :4], backends=TRITON)
    with pytest.raises(ValueError, match="tensors of one dtype"):
        causal_conv3d(x, weight.half(), bias, past, backends=TRITON)
    with pytest.raises(ValueError, match=r"3 frames of the past for 3 taps.* at most 2"):
        causal_conv3d(x, weight, bias, x, backends=TRITON)


def test_opcheck() -> None:
    x, weight, bias, past, _ = make((1, 8, 16, 1, (3, 4), (3, 1, 1), 1, 2))
    for before in (None, past):
        arguments = (x, weight.requires_grad_(), bias, before, None, 1, False)
        torch.library.opcheck(torch.ops.gen3r.causal_conv3d.default, arguments)


@torch.no_grad()
def test_a_whole_autoencoder() -> None:
    """Channels-last from end to end, against the libraries' channels-first path."""
    config = AppearanceVAEConfig(dim=8, z_dim=16, num_res_blocks=1)
    models = [AppearanceVAE(config, b).eval() for b in (TRITON, Backends(operators="reference"))]
    models[0].load_state_dict(models[1].state_dict())
    weights = [p for p in models[0].parameters() if p.dim() == 5]
    assert all(w.is_contiguous(memory_format=torch.channels_last_3d) for w in weights)
    latents = torch.randn(1, 16, 2, 1, 1)
    out, expected = (model.decode(latents) for model in models)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    out, expected = (model.encode(expected).mean for model in models)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
