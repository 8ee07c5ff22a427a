"""Stage 1 on resident clips: its loss is the stage's, an adapter learns, latents are measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from gen3r.causal_video import Posterior
from gen3r.geometry_adapter import TokenEncoder
from gen3r_training.adapter import adapter_loss, vggt_token_maps
from gen3r_training.losses import adaptive_weight, adaptive_weight_of
from gen3r_training.resident.adapter import WEIGHTS, AdapterObjective
from gen3r_training.resident.config import ResidentConfig
from gen3r_training.resident.latents import (
    clear_statistics,
    image_batches,
    measure_statistics,
    set_statistics,
)
from tests.training.resident_tiny import TINY, overfit, tiny_clips, tiny_pipeline

OPTIONS = ResidentConfig(stage="adapter", data=Path("data"), output=Path("out"), seed=1)


@pytest.fixture(scope="module")
def objective() -> AdapterObjective:
    return AdapterObjective(tiny_pipeline(), tiny_clips(4), tiny_clips(2, seed=1), OPTIONS)


def test_the_loss_is_that_of_the_stage() -> None:
    pipeline = tiny_pipeline()
    objective = AdapterObjective(pipeline, tiny_clips(2), tiny_clips(1), OPTIONS)
    objective.disturbance = 0.0
    objective.scale = torch.ones_like(objective.scale)
    batch = objective.draw(torch.Generator().manual_seed(3), 2)
    loss, logs = objective.loss(batch)
    reference = Posterior(batch.mean, batch.logvar)
    step = adapter_loss(
        pipeline.geo_adapter, pipeline.vggt, batch.target, reference, batch.noise, WEIGHTS
    )
    assert loss.item() == pytest.approx(step.loss.item(), rel=1e-5)
    for name in logs.keys() & step.logs.keys() - {"std"}:
        assert logs[name].item() == pytest.approx(step.logs[name], rel=1e-4), name
    assert {"image_token_loss", "camera_loss", "depth_loss", "point_loss", "kl"} <= logs.keys()
    loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in objective.module.parameters()
    )


def test_the_appearance_posterior_is_the_pipelines(objective: AdapterObjective) -> None:
    batch = objective.draw(torch.Generator().manual_seed(3), 3)
    again = objective.draw(torch.Generator().manual_seed(3), 3)
    other = objective.draw(torch.Generator().manual_seed(4), 3)
    assert torch.equal(batch.target, again.target) and torch.equal(batch.noise, again.noise)
    assert not torch.equal(batch.target, other.target)
    pipeline = objective.pipeline
    frames = next(image_batches(objective.train, 1))
    plain = pipeline.wan_vae.encode((2 * frames - 1).transpose(1, 2))
    tokens = vggt_token_maps(pipeline.vggt, frames)
    seeds = (objective.draw(torch.Generator().manual_seed(s), 8) for s in range(20))
    for drawn in seeds:  # until clip 0 comes as it is
        same = (drawn.target - tokens).abs().flatten(1).amax(1) < 1e-4
        if same.any():
            assert torch.allclose(drawn.mean[same][:1], plain.mean, atol=1e-4)
            assert torch.allclose(drawn.logvar[same][:1], plain.logvar, atol=1e-4)
            return
    pytest.fail("clip 0 was never drawn as it is")


def test_an_adapter_learns_and_goes_on_from_there() -> None:
    pipeline, clips = tiny_pipeline(), tiny_clips(2)
    objective = AdapterObjective(pipeline, clips, clips, OPTIONS)
    before = objective.evaluate()
    assert before["token_error"] < 2  # the tokens' scale is there from the start
    losses = overfit(objective, 8, batch=2, rate=5e-3)
    assert losses[-1] < 0.9 * losses[0]
    after = objective.evaluate()
    assert after["abs_rel_increase"] == pytest.approx(after["abs_rel"] - after["abs_rel_vggt"])
    assert after["abs_rel_vggt"] == pytest.approx(before["abs_rel_vggt"])
    assert after.keys() == {
        *("token_error", "abs_rel", "abs_rel_vggt", "abs_rel_increase", "auc", "auc_vggt")
    }


def test_only_an_untrained_adapter_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, clips = tiny_pipeline(), tiny_clips(1)
    encoder = cast(TokenEncoder, pipeline.geo_adapter.model.encoder)
    first = cast(nn.Conv2d, encoder.init_block.resample["1"])
    before = first.weight.clone()
    monkeypatch.setattr(AdapterObjective, "_explained", lambda *_: 0.1)
    AdapterObjective(pipeline, clips, clips, OPTIONS)
    assert torch.equal(first.weight, before)
    monkeypatch.undo()
    AdapterObjective(pipeline, clips, clips, OPTIONS)
    assert not torch.equal(first.weight, before)


def test_latents_are_measured_and_decode_as_before() -> None:
    pipeline = tiny_pipeline()
    objective = AdapterObjective(pipeline, tiny_clips(4), tiny_clips(1), OPTIONS)
    adapter = pipeline.geo_adapter.requires_grad_(False)
    assert pipeline.config.geo_adapter.latents_std == (1.0,) * 16
    tokens = torch.cat([vggt_token_maps(pipeline.vggt, x) for x in image_batches(objective.train)])
    noise = torch.randn(4, 16, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    raw = adapter.encode(tokens).sample(noise)
    decoded = adapter.decode(raw)
    objective.finish()
    config = pipeline.config.geo_adapter
    assert adapter.config is config and adapter.latents_mean == config.latents_mean
    assert pipeline.config.wan_vae == TINY.wan_vae
    drawn = adapter.encode(tokens).sample(noise)
    mean, std = (
        torch.tensor(v).view(-1, 1, 1, 1) for v in (adapter.latents_mean, config.latents_std)
    )
    assert torch.allclose(drawn, (raw - mean) / std, atol=1e-3)  # the draw's noise too
    assert torch.allclose(adapter.decode(drawn), decoded, atol=1e-3)
    rows = drawn.transpose(0, 1).flatten(1)
    assert rows.mean(1).abs().max() < 0.2 and (rows.std(1) - 1).abs().max() < 0.2
    clear_statistics(pipeline, "geo_adapter")
    assert torch.allclose(adapter.encode(tokens).sample(noise), raw, atol=1e-4)


def test_statistics_refuse_what_cannot_be() -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="must all be > 0"):
        set_statistics(pipeline, "wan_vae", (0.0,) * 16, (0.0,) * 16)
    with pytest.raises(ValueError, match="16 channels"):
        set_statistics(pipeline, "wan_vae", (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match="nothing to measure"):
        measure_statistics(pipeline.wan_vae, [])
    clips = tiny_clips(1)
    with pytest.raises(ValueError, match="no held-out clips"):
        AdapterObjective(pipeline, clips, clips.take([]), OPTIONS)


@pytest.mark.parametrize("pair", [(0.4, 1e4), (1e4, 0.4), (1.0, 10.0), (3.0, 3.0), (0.02, 7.7e6)])
def test_the_adaptive_weight_on_the_device(pair: tuple[float, float]) -> None:
    target, current = (torch.tensor(value) for value in pair)
    assert adaptive_weight_of(target, current).item() == pytest.approx(adaptive_weight(*pair))
    assert adaptive_weight_of(target, torch.tensor(float("nan"))) == 1


def test_the_disturbance_reaches_the_decoder_alone(objective: AdapterObjective) -> None:
    batch = objective.draw(torch.Generator().manual_seed(3), 2)
    _, plain = objective.loss(replace(batch, disturbance=torch.zeros_like(batch.disturbance)))
    _, shaken = objective.loss(replace(batch, disturbance=2 * torch.ones_like(batch.disturbance)))
    assert shaken["image_token_loss"] != plain["image_token_loss"]
    assert shaken["kl"] == plain["kl"]
