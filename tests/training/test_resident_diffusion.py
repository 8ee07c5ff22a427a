"""Stage 2 on resident clips: encoded, drawn and computed as by the stage's own parts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from gen3r.encoders import tokenize_and_encode
from gen3r.scene import TASKS
from gen3r.transformer import RawConditions
from gen3r_training.data.encoding import ClipEncoders, encode_clip
from gen3r_training.diffusion import (
    FlowSample,
    diffusion_step,
    encode_camera_batch,
    flow_at,
    flow_sample,
)
from gen3r_training.resident.config import ResidentConfig
from gen3r_training.resident.diffusion import (
    DiffusionBatch,
    DiffusionObjective,
    by_task,
    timestep_indices,
)
from gen3r_training.resident.latents import encode_clips
from tests.training.resident_tiny import FRAMES, LATENTS, overfit, tiny_clips, tiny_pipeline

OPTIONS = ResidentConfig(stage="diffusion", data=Path("data"), output=Path("out"), seed=1)
TRAIN, HELD_OUT = tiny_clips(4), tiny_clips(2, seed=1)


@pytest.fixture(scope="module")
def objective() -> DiffusionObjective:
    return DiffusionObjective(tiny_pipeline(), TRAIN, HELD_OUT, OPTIONS)


@pytest.fixture(scope="module")
def batch(objective: DiffusionObjective) -> DiffusionBatch:
    return objective.draw(torch.Generator().manual_seed(5), 24)


def test_clips_are_encoded_as_the_stage_encodes_them(objective: DiffusionObjective) -> None:
    pipeline, found = objective.pipeline, objective.train.clips
    names = ("wan_vae", "geo_adapter", "vggt", "clip_image_encoder")
    encoders = ClipEncoders(**{name: getattr(pipeline, name) for name in names})
    frames = TRAIN.rgb[2:3].permute(0, 1, 4, 2, 3).float() / 255
    clip = encode_clip(encoders, frames)
    assert len(found) == 2 * len(TRAIN)
    close: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-3}  # float16
    for place, task in enumerate(TASKS):
        posterior, _ = clip.control(task)
        mean, logvar = found.appearance_mean[place, 2:3], found.appearance_logvar[place, 2:3]
        torch.testing.assert_close(mean.float(), posterior.mean, **close)
        torch.testing.assert_close(logvar.float(), posterior.logvar, **close)
    torch.testing.assert_close(found.geometry_mean[2:3].float(), clip.geometry.mean, **close)
    torch.testing.assert_close(found.image[2:3], clip.image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.c2w[2], TRAIN.c2w[2])


def test_texts_are_the_pipelines_and_end_in_zeros(objective: DiffusionObjective) -> None:
    pipeline, texts = objective.pipeline, objective.texts
    prompts = ["", "bad detailed", *dict.fromkeys((*TRAIN.captions, *HELD_OUT.captions))]
    assert texts.features.shape == (len(prompts), 12, 16)
    wanted = tokenize_and_encode(pipeline.tokenizer, pipeline.text_encoder, prompts, 12)
    for features, length, want in zip(texts.features, texts.lengths, wanted, strict=True):
        assert length == len(want)
        torch.testing.assert_close(features[: len(want)], want, rtol=1e-4, atol=1e-5)
        assert not features[len(want) :].any()


def test_a_mirror_image_is_a_clip_of_its_own(objective: DiffusionObjective) -> None:
    found, count = objective.train.clips, len(TRAIN)
    assert len(found) == 2 * count
    plain, mirror = found.c2w[:count], found.c2w[count:]
    torch.testing.assert_close(mirror[..., 0, 3], -plain[..., 0, 3])
    torch.testing.assert_close(mirror[..., 1:3, 3], plain[..., 1:3, 3])
    assert torch.equal(objective.train.captions[:count], objective.train.captions[count:])
    with pytest.raises(ValueError, match="no clips"):
        encode_clips(objective.pipeline, TRAIN.take([]))


def test_the_loss_is_that_of_the_stage(
    objective: DiffusionObjective, batch: DiffusionBatch
) -> None:
    loss, logs = objective.loss(batch)
    kept, places = batch.cameras_kept, batch.inverse.inverse()[:, None].expand(-1, FRAMES, 3, 3)
    maps = encode_camera_batch(batch.c2w, places, 64, 64)  # 7 latents of 8 pixels, up to 8
    texts = [t[:n] for t, n in zip(batch.text, batch.text_lengths.tolist(), strict=True)]
    raw = RawConditions(texts, batch.image, batch.control, maps * kept[:, None, None, None, None])
    flow = flow_at(batch.timesteps, batch.sigmas, batch.clean, batch.noise)
    step = diffusion_step(objective.transformer, flow, raw)
    torch.testing.assert_close(loss, step.loss, rtol=1e-4, atol=1e-5)
    for place, task in enumerate(TASKS):
        mean = step.per_sample[batch.tasks == place].mean()
        torch.testing.assert_close(logs[f"loss_{task}"], mean, rtol=1e-4, atol=1e-5)
    both = (logs["appearance"] + logs["geometry"]) / 2
    torch.testing.assert_close(both, loss.detach(), rtol=1e-4, atol=1e-5)


def test_levels_come_from_the_schedulers_table(
    objective: DiffusionObjective, batch: DiffusionBatch
) -> None:
    indices = (batch.timesteps[:, None] == objective.timesteps).int().argmax(1)
    wanted = flow_sample(objective.pipeline.scheduler, batch.clean, batch.noise, indices)
    found = flow_at(batch.timesteps, batch.sigmas, batch.clean, batch.noise)
    for name in FlowSample.__dataclass_fields__:
        assert torch.equal(getattr(found, name), getattr(wanted, name))


def test_a_batch_has_the_shares_that_are_told(objective: DiffusionObjective) -> None:
    drawn = objective.draw(torch.Generator().manual_seed(0), 1000)
    shares = drawn.tasks.bincount(minlength=3) / 1000
    assert torch.allclose(shares, torch.tensor([0.4, 0.3, 0.3]), atol=0.05)
    every = drawn.tasks == TASKS.index("allview")
    assert not drawn.cameras_kept[every].any()
    assert drawn.cameras_kept[~every].float().mean().item() == pytest.approx(0.85, abs=0.05)
    lengths = drawn.text_lengths
    share = (lengths == 1).float().mean().item(), (lengths == 3).float().mean().item()
    assert share == pytest.approx((0.075, 0.075), abs=0.03)  # "", "bad detailed"
    given = drawn.control[:, 16:].amax((1, 3, 4))  # [B, f] whether a latent frame is given
    assert given[every].all() and given[:, 0].all()
    assert torch.equal(given[:, 1] > 0, drawn.tasks > 0)
    assert not drawn.control[..., drawn.control.shape[-1] // 2 :].any()
    again = objective.draw(torch.Generator().manual_seed(0), 1000)
    assert torch.equal(drawn.clean, again.clean) and torch.equal(drawn.sigmas, again.sigmas)
    assert drawn.clean.shape[1:] == (*LATENTS[:2], 8, 16)


def test_timesteps_cover_the_table() -> None:
    indices = timestep_indices(torch.Generator().manual_seed(0), 2000)
    assert indices.min() >= 0 and indices.max() <= 999
    counts = indices.div(100, rounding_mode="floor").bincount(minlength=10) / 2000
    assert counts.min() > 0.045 and 0.1 < counts[4:6].min() < counts[4:6].max() < 0.15


def test_a_task_that_is_missing_has_no_mean() -> None:
    found = by_task(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 2, 2]))
    means = {name: mean.item() for name, mean in found.items()}
    assert means == {"loss_1view": 1.0, "loss_2view": 0.0, "loss_allview": 4.0}


def test_a_transformer_learns_and_is_evaluated() -> None:
    objective = DiffusionObjective(tiny_pipeline(), TRAIN, HELD_OUT, OPTIONS)
    losses = overfit(objective, 15, batch=6, rate=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    found = objective.evaluate()
    assert found == objective.evaluate()
    assert found.keys() == {
        *(f"loss_{task}" for task in TASKS),
        *("psnr_2view", "psnr_2view_first", "psnr_allview"),
        *("abs_rel_allview", "auc_allview", "auc_1view"),
    }
    assert all(math.isfinite(value) for value in found.values())
    still = HELD_OUT.rgb[:, :1].float() - HELD_OUT.rgb[:, 1:-1].float()
    error = (still / 255).square().flatten(1).mean(1)
    assert found["psnr_2view_first"] == pytest.approx((-10 * error.log10()).mean().item(), rel=1e-4)
