"""The geometry adapter against upstream's values, and that wrong variants would not pass."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gen3r.config import GeometryAdapterConfig
from gen3r.geometry_adapter import ENLARGEMENT, GeometryAdapter
from gen3r_kernels import Backends
from tests.golden_fixtures.golden import COMPONENT_TOLERANCE, Golden, relative_error

KIND = "geo_adapter"


def build(golden: Golden, grid: tuple[int, int] | None = None) -> GeometryAdapter:
    meta = golden.meta
    values = {**meta["config"], **meta["inner"]}
    values["temporal_downsample"] = values.pop("temperal_downsample")  # upstream's spelling
    for name in ("latents_mean", "latents_std"):
        values[name] = meta[name]
    config = replace(GeometryAdapterConfig.from_dict(values), fixed_token_grid=grid)
    model = GeometryAdapter(config, Backends()).eval()
    model.load_state_dict(golden.weights(), strict=True)
    return model


@torch.no_grad()
def test_encode(golden: Golden) -> None:
    model = build(golden)
    tokens = golden["in/tokens"]
    cases = golden.cases(r"(enc\d+)/")
    for case in cases:
        clip = tokens[:, :, : int(case.removeprefix("enc"))]
        moments = model.moments(clip)
        posterior = model.posterior(moments)
        mu = moments.chunk(2, dim=1)[0]
        results = {
            "raw_mu": mu,
            "raw_mu_first": mu[:, :, :1],
            "mean": posterior.mean,
            "logvar": posterior.logvar,
        }
        for name, actual in results.items():
            if golden.stored(f"{case}/{name}") is not None:
                golden.check(f"{case}/{name}", actual)
    if golden.stored("mid/init_block_first") is not None:
        golden.check("mid/init_block_first", model.model.encoder.init_block(tokens[:, :, :1]))
    elif not cases:
        pytest.skip("no encoder case in this folder")


def latents_of(golden: Golden, model: GeometryAdapter, case: str) -> Tensor:
    """Stored latents, the stored means of the encoder case, or computed means."""
    encoded = case.replace("dec", "enc")
    for name in (f"{case}/z", f"{encoded}/mean"):
        if name in golden:
            return golden[name]
    return model.encode(golden["in/tokens"][:, :, : int(case.removeprefix("dec"))]).mean


def decoded_grid(golden: Golden) -> tuple[int, int]:
    """The token grid that every decoder case returns.

    Taken from the numbered cases (whole, or sampled as their names say), else from the input.
    """
    sides = []
    for case in golden.cases(r"(dec\d+)/out"):
        name, stride = golden.stored(f"{case}/out") or (f"{case}/out", 1)
        rows, columns = golden[name].shape[-2:]
        sides.append((rows * stride, columns * stride))
    rows, columns = max(sides, default=golden["in/tokens"].shape[-2:])
    return rows, columns


def check_sampled(golden: Golden, name: str, actual: Tensor) -> None:
    """`golden.check`, also for a result sampled with a stride that its name does not tell."""
    found = golden.stored(name)
    if found is not None and found[1] == 1:
        stride = -(-actual.shape[-1] // golden[found[0]].shape[-1])
        actual = actual[..., ::stride, ::stride]
    golden.check(name, actual)


@torch.no_grad()
def test_decode(golden: Golden) -> None:
    cases = golden.cases(r"(dec\w+)/out")
    grid = decoded_grid(golden)
    fixed, following = build(golden, grid), build(golden)
    for case in cases:
        latents = latents_of(golden, following, case)
        # Where the grid follows from the latents (40 from 70), the model needs no fixed one.
        follows = [s * 4 / 7 for s in latents.shape[-2:]] == list(grid)
        model = following if follows else fixed
        check_sampled(golden, f"{case}/out", model.decode(latents))
    if not cases:
        pytest.skip("no decoder case in this folder")


def test_every_tensor_is_compared(golden: Golden) -> None:
    known = re.compile(
        r"in/.*|mid/init_block_first|dec\w+/(z|out(_s\d+)?)"
        r"|enc\w+/(raw_mu|raw_mu_first|mean|logvar)(_s\d+)?"
    )
    assert [n for n in golden.names if not known.fullmatch(n)] == []


@torch.no_grad()
def test_wrong_variants_fail(golden: Golden) -> None:
    """Unscaled latents, and plain nearest instead of nearest-exact enlargement, are far off."""
    model = build(golden)
    for case in golden.cases(r"(enc\d+)/mean$")[:1]:
        mean = golden[f"{case}/mean"]
        assert relative_error(model.unscale(mean), mean) > 100 * COMPONENT_TOLERANCE
    if "mid/init_block_first" in golden:
        reference = golden["mid/init_block_first"]
        frame = golden["in/tokens"][:, :, 0]
        larger = F.interpolate(frame, scale_factor=ENLARGEMENT, mode="nearest")
        wrong = model.model.encoder.init_block.resample["1"](larger).unsqueeze(2)
        assert relative_error(wrong, reference) > 100 * COMPONENT_TOLERANCE
