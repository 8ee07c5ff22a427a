"""The same small model on the CPU and the GPU: float32 agrees closely, bf16 in direction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from gen3r.nano import build_nano
from gen3r.pipeline import Gen3RPipeline
from gen3r.scene import SceneRequest
from gen3r_kernels import ATTENTION_BACKENDS, Backends, attention, attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def _tf32_allowed() -> Iterator[None]:
    """As a program may have it: the pipeline's float32 must be float32 all the same."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.backends.cuda.matmul.allow_tf32 = products


def requests() -> list[SceneRequest]:
    images = np.random.default_rng(0).integers(0, 256, (9, 112, 112, 3), dtype=np.uint8)
    common = {"num_frames": 9, "height": 112, "width": 112}
    return [
        SceneRequest(list(images[:1]), "a room", cameras="zoom_in", **common),
        SceneRequest(list(images[:2]), "a hall", cameras="free", **common),
        SceneRequest(list(images), "", **common),
    ]


def run(pipeline: Gen3RPipeline, **options: object) -> object:
    rng = torch.Generator().manual_seed(1)
    return pipeline(
        requests=requests(),
        num_inference_steps=3,
        latents=torch.randn(3, 16, 3, 14, 28, generator=rng),
        posterior_noise=torch.randn(3, 16, 3, 14, 14, generator=rng),
        **options,
    )


def error(actual: Tensor, reference: Tensor) -> float:
    a, r = actual.double().cpu(), reference.double().cpu()
    return ((a - r).abs().max() / r.abs().max()).item()


def test_float32_matches_the_cpu() -> None:
    cpu, gpu = build_nano(torch.float32, "cpu"), build_nano(torch.float32, "cuda")
    assert error(run(gpu, output_type="latent"), run(cpu, output_type="latent")) < 1e-3
    for ours, theirs in zip(run(gpu), run(cpu), strict=True):
        assert error(ours.depth, theirs.depth) < 1e-3
        assert error(ours.extrinsics, theirs.extrinsics) < 1e-3
        assert (ours.rgb.int() - theirs.rgb.int()).abs().max() <= 1


def test_bfloat16_points_the_same_way() -> None:
    exact = run(build_nano(torch.float32, "cuda"), output_type="latent")
    rough = run(build_nano(torch.bfloat16, "cuda"), output_type="latent")
    cosine = torch.nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0)
    assert cosine > 0.9987  # 5 % apart, what `gen3r-engine verify` accepts of bfloat16


@pytest.mark.parametrize(
    "name", [n for n, b in ATTENTION_BACKENDS.items() if b.cuda_only and b.exact]
)
def test_attention_backends(name: str) -> None:
    backend = ATTENTION_BACKENDS[name]
    if (reason := backend.why_not()) is not None:
        pytest.skip(reason)
    q, k, v = (torch.randn(2, 333, 3, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    reference = attention_reference(q, k, v)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    bound = 2 * (plain.float() - reference).abs().max() + 1e-5
    assert (attention(q, k, v, Backends(attention=name)).float() - reference).abs().max() <= bound
