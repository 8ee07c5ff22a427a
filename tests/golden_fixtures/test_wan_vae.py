"""The appearance VAE against upstream's values, and that unscaled latents would not pass."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from gen3r.appearance_vae import AppearanceVAE
from gen3r.config import AppearanceVAEConfig
from gen3r_kernels import Backends
from tests.golden_fixtures.golden import COMPONENT_TOLERANCE, Golden, relative_error

KIND = "wan_vae"


def build(golden: Golden) -> AppearanceVAE:
    meta = golden.meta
    inner = dict(meta["config"])
    inner["temporal_downsample"] = inner.pop("temperal_downsample")  # upstream's spelling
    for name in ("latents_mean", "latents_std"):
        inner[name] = meta[name]
    model = AppearanceVAE(AppearanceVAEConfig.from_dict(inner), Backends()).eval()
    model.load_state_dict(golden.weights(), strict=True)
    return model


def batch_of_two(golden: Golden, model: AppearanceVAE) -> Tensor:
    """The recipe in the fixture's note; its clip length follows from the stored latents."""
    video = golden["in/video"]
    frames = 1 + model.temporal_factor * (golden["enc_batch2/mean"].shape[2] - 1)
    return torch.cat([video[:, :, :frames], video[:, :, -frames:].flip(-1)])


@torch.no_grad()
def test_encode(golden: Golden) -> None:
    model = build(golden)
    video = golden["in/video"]
    cases = golden.cases(r"(enc\d+)/")
    for case in cases:
        clip = video[:, :, : int(case.removeprefix("enc"))]
        posterior = model.encode(clip)
        results = {
            "raw_mu": model.moments(clip).chunk(2, dim=1)[0],
            "mean": posterior.mean,
            "logvar": posterior.logvar,
        }
        for name, actual in results.items():
            if golden.stored(f"{case}/{name}") is not None:
                golden.check(f"{case}/{name}", actual)
    if "enc_batch2/mean" in golden:
        posterior = model.encode(batch_of_two(golden, model))
        golden.check("enc_batch2/mean", posterior.mean)
        if golden.stored("enc_batch2/logvar") is not None:
            golden.check("enc_batch2/logvar", posterior.logvar)
    elif not cases:
        pytest.skip("no encoder case in this folder")


@torch.no_grad()
def test_decode(golden: Golden) -> None:
    model = build(golden)
    cases = golden.cases(r"(dec\w+)/out")
    for case in cases:
        golden.check(f"{case}/out", model.decode(latents_of(golden, model, case)))
    if not cases:
        pytest.skip("no decoder case in this folder")


def latents_of(golden: Golden, model: AppearanceVAE, case: str) -> Tensor:
    """Stored latents, the stored means of the encoder case, or computed means."""
    encoded = case.replace("dec", "enc")
    for name in (f"{case}/z", f"{encoded}/mean"):
        if name in golden:
            return golden[name]
    return model.encode(golden["in/video"][:, :, : int(case.removeprefix("dec"))]).mean


def test_every_tensor_is_compared(golden: Golden) -> None:
    known = re.compile(r"in/.*|dec\w+/(z|out(_s\d+)?)|enc\w+/(raw_mu|mean|logvar)(_s\d+)?")
    assert [n for n in golden.names if not known.fullmatch(n)] == []


@torch.no_grad()
def test_unscaled_latents_fail(golden: Golden) -> None:
    """Latents that are plain mu, in encoding or in decoding, are far outside the tolerance."""
    model = build(golden)
    for case in golden.cases(r"(enc\d+)/mean$")[:1]:
        clip = golden["in/video"][:, :, : int(case.removeprefix("enc"))]
        wrong = model.moments(clip).chunk(2, dim=1)[0]
        assert relative_error(wrong, golden[f"{case}/mean"]) > 100 * COMPONENT_TOLERANCE
    for case in golden.cases(r"(dec\w+)/out$")[:1]:
        latents = latents_of(golden, model, case)
        wrong = model.decode(model.scale(latents))  # cancels the unscaling inside
        assert relative_error(wrong, golden[f"{case}/out"]) > 100 * COMPONENT_TOLERANCE
