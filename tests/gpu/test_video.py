"""The autoencoders' operators on a GPU: bf16 against float32, compiled, backward, whole models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r.appearance_vae import AppearanceVAE
from gen3r.config import AppearanceVAEConfig, GeometryAdapterConfig
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.video_autoencoder import VideoAutoencoder
from gen3r_kernels import (
    Backends,
    causal_conv3d,
    causal_conv3d_reference,
    rms_norm_silu,
    rms_norm_silu_reference,
    upsample_conv2d,
    upsample_conv2d_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

BF16, LAST = torch.bfloat16, torch.channels_last_3d
TRITON, REFERENCE = Backends(operators="triton"), Backends(operators="reference")
HALF_STEP = 2.0**-9  # a bf16 rounding of the reference, relative


@pytest.fixture(autouse=True)
def _poison() -> None:
    """Memory that the operators are given next holds NaN: what they do not write shows."""
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in (2**28, 2**24, 2**18)]
    del blocks


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The references are float32, not TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def stretch(x: Tensor, outliers: bool) -> Tensor:
    """A few channels 50 times as large, as real networks have."""
    if outliers:
        x[:, ::37] *= 50
    return x


def check(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Largest and root-mean-square error at most twice plain PyTorch's at the same dtype."""
    assert ours.shape == exact.shape and ours.dtype == plain.dtype
    mine, theirs = (x.float() - exact.float() for x in (ours, plain))
    slack = HALF_STEP * exact.abs().max()
    assert mine.abs().max() <= 2 * theirs.abs().max() + slack  # also fails on NaN
    slack = HALF_STEP * exact.float().square().mean().sqrt()
    assert mine.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + slack


def plain_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma)


NORM_SHAPES = [(1, 96, 4, 560, 560), (2, 192, 3, 37, 41), (1, 384, 1, 70, 70), (1, 13, 2, 5, 7)]


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("memory", ["last", "first"])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_rms_norm_silu(shape: tuple[int, ...], memory: str, outliers: bool) -> None:
    x, gamma = stretch(normal(*shape), outliers), normal(shape[1], 1, 1, 1)
    if memory == "last":
        x = x.contiguous(memory_format=LAST)
    out = rms_norm_silu(x, gamma)
    assert out.stride() == x.stride()
    check(out, plain_norm(x, gamma), rms_norm_silu_reference(x, gamma))


# Compiling takes seconds: one shape.
@pytest.mark.parametrize(
    ("shape", "compiled"), [(NORM_SHAPES[1], True), *((s, False) for s in NORM_SHAPES[1:])]
)
def test_rms_norm_silu_backward(shape: tuple[int, ...], compiled: bool) -> None:
    x, gamma = (
        stretch(normal(*shape), True).contiguous(memory_format=LAST),
        normal(shape[1], 1, 1, 1),
    )
    dy = normal(*shape)
    exact_inputs = [t.float().requires_grad_() for t in (x, gamma)]
    exact = torch.autograd.grad(rms_norm_silu_reference(*exact_inputs), exact_inputs, dy.float())
    inputs = [x.requires_grad_(), gamma.requires_grad_()]
    plain = torch.autograd.grad(plain_norm(*inputs), inputs, dy)
    run = torch.compile(rms_norm_silu, fullgraph=True) if compiled else rms_norm_silu
    for ours, theirs, e in zip(
        torch.autograd.grad(run(*inputs), inputs, dy), plain, exact, strict=True
    ):
        check(ours, theirs, e)


# Batch, channels in and out, frames, height and width, kernel, temporal stride, remembered frames.
CONVOLUTIONS = [
    (1, 96, 96, 4, (560, 560), (3, 3, 3), 1, 2),
    (1, 192, 192, 4, (140, 152), (3, 3, 3), 1, 2),
    (1, 384, 384, 2, (70, 70), (3, 3, 3), 1, 2),
    (2, 192, 384, 2, (35, 43), (3, 3, 3), 1, None),
    (1, 384, 768, 1, (70, 70), (3, 1, 1), 1, 2),
    (2, 384, 384, 4, (35, 35), (3, 1, 1), 2, 1),
    (1, 16, 384, 1, (70, 70), (3, 3, 3), 1, None),
    (1, 200, 40, 3, (19, 23), (3, 3, 3), 1, 2),
    (1, 192, 96, 2, (40, 37), (1, 3, 3), 1, None),
    (1, 3, 96, 2, (40, 37), (3, 3, 3), 1, 2),
    (1, 96, 3, 2, (40, 37), (3, 3, 3), 1, 2),
]


def convolution(case: tuple, outliers: bool = False) -> tuple[list[Tensor | None], dict]:
    batch, channels_in, channels_out, frames, sides, kernel, stride, past = case
    x = stretch(normal(batch, channels_in, frames, *sides), outliers)
    before = None if past is None else normal(batch, channels_in, past, *sides)
    weight = normal(channels_out, channels_in, *kernel) * 0.05
    tensors = [None if t is None else t.contiguous(memory_format=LAST) for t in (x, weight, before)]
    options = {"stride": (stride, 1, 1), "padding": (0, kernel[1] // 2, kernel[2] // 2)}
    return [*tensors[:2], normal(channels_out), tensors[2]], options


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_causal_conv3d(case: tuple, outliers: bool) -> None:
    tensors, options = convolution(case, outliers)
    exact = causal_conv3d_reference(*tensors, **options)
    plain = causal_conv3d(*tensors, **options, backends=REFERENCE)
    for backends in (TRITON, Backends()):
        out = causal_conv3d(*tensors, **options, backends=backends)
        assert out.is_contiguous(memory_format=LAST) or case[2] == 3
        check(out, plain, exact)


@pytest.mark.parametrize("case", [CONVOLUTIONS[i] for i in (1, 2, 7)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_residual(case: tuple, dtype: torch.dtype) -> None:
    """Added before the sum is rounded, in the residual's dtype."""
    tensors, options = convolution(case)
    shape = (case[0], case[2], case[3], *case[4])
    residual = normal(*shape).to(dtype).contiguous(memory_format=LAST)
    exact = causal_conv3d_reference(*tensors, **options, residual=residual)
    plain = causal_conv3d(*tensors, **options, residual=residual, backends=REFERENCE)
    out = causal_conv3d(*tensors, **options, residual=residual, backends=TRITON)
    assert out.dtype == dtype
    check(out, plain, exact)


def test_pairs_of_frames_and_input_that_begins_with_its_past() -> None:
    (x, weight, bias, past), options = convolution(CONVOLUTIONS[4])
    exact = causal_conv3d_reference(x, weight, bias, past, **options, pairs=True)
    plain = causal_conv3d(x, weight, bias, past, **options, pairs=True, backends=REFERENCE)
    check(causal_conv3d(x, weight, bias, past, **options, pairs=True), plain, exact)
    whole = torch.cat([past, x], dim=2).contiguous(memory_format=LAST)
    more = {**options, "pairs": True, "joined": True}
    check(causal_conv3d(whole, weight, bias, **more, backends=TRITON), plain, exact)


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("sizes", [(3, 384, 192, 35, 43), (2, 192, 96, 40, 37)], ids=str)
def test_upsample_conv2d(sizes: tuple[int, ...], outliers: bool) -> None:
    count, channels_in, channels_out, *sides = sizes
    x = stretch(normal(count, channels_in, *sides), outliers)
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = normal(channels_out, channels_in, 3, 3) * 0.05, normal(channels_out)
    exact = upsample_conv2d_reference(x, weight, bias)
    plain = upsample_conv2d(x, weight, bias, backends=REFERENCE)
    check(upsample_conv2d(x, weight, bias, backends=TRITON), plain, exact)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    dy = normal(*exact.shape)
    gradients = [
        torch.autograd.grad(upsample_conv2d(*inputs, backends=b), inputs, dy)
        for b in (TRITON, REFERENCE)
    ]
    wide = [t.detach().float().requires_grad_() for t in inputs]
    truth = torch.autograd.grad(upsample_conv2d_reference(*wide), wide, dy.float())
    for ours, theirs, e in zip(*gradients, truth, strict=True):
        check(ours, theirs, e)


@pytest.mark.parametrize(
    ("case", "compiled"),
    [(CONVOLUTIONS[1], True), *((CONVOLUTIONS[i], False) for i in (1, 5, 8))],
)
def test_causal_conv3d_backward(case: tuple, compiled: bool) -> None:
    tensors, options = convolution(case)
    inputs = [t.requires_grad_() for t in tensors if t is not None]

    def run(*inputs: Tensor, backends: Backends) -> Tensor:
        return causal_conv3d(*inputs, **options, backends=backends)

    plain_out = run(*inputs, backends=REFERENCE)
    dy = torch.randn_like(plain_out)
    plain = torch.autograd.grad(plain_out, inputs, dy)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(causal_conv3d_reference(*wide, **options), wide, dy.float())
    out = (torch.compile(run, fullgraph=True) if compiled else run)(*inputs, backends=TRITON)
    check(out, plain_out, causal_conv3d_reference(*wide, **options))
    for ours, theirs, e in zip(torch.autograd.grad(out, inputs, dy), plain, exact, strict=True):
        check(ours, theirs, e)


def test_opcheck() -> None:
    tensors, _ = convolution((1, 16, 24, 2, (5, 9), (3, 3, 3), 1, 2))
    weight = tensors[1].requires_grad_()
    arguments = (tensors[0], weight, *tensors[2:], None, 1, False)
    torch.library.opcheck(torch.ops.gen3r.causal_conv3d.default, arguments)
    gamma = normal(16, 1, 1, 1).requires_grad_()
    arguments = (tensors[0], gamma, True, BF16, tensors[0][:, :, :1])
    torch.library.opcheck(torch.ops.gen3r.rms_norm_silu.default, arguments)


def autoencoder(kind: str, backends: Backends) -> VideoAutoencoder:
    torch.manual_seed(1)
    if kind == "appearance":
        return AppearanceVAE(AppearanceVAEConfig(dim=32), backends).eval()
    config = GeometryAdapterConfig(hidden_dim=32, input_dim=320, output_dim=320)
    return GeometryAdapter(config, backends).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["appearance", "geometry"])
def test_autoencoders(kind: str) -> None:
    """Kernels in bf16 are as near to float32 as the libraries are."""
    x = torch.randn(1, *{"appearance": (3, 9, 112, 56), "geometry": (320, 9, 16, 8)}[kind])
    exact = autoencoder(kind, REFERENCE).cuda()
    x = x.cuda()
    latents = exact.encode(x).mean
    frames = exact.decode(latents)
    results = []
    for backends in (TRITON, Backends(), REFERENCE):
        model = autoencoder(kind, backends).cuda().to(BF16)
        encoded = model.encode(x.to(BF16)).mean
        results.append((encoded, model.decode(latents.to(BF16))))
    *fast, plain = results
    for mine in fast:
        for ours, theirs, e in zip(mine, plain, (latents, frames), strict=True):
            check(ours, theirs, e)
