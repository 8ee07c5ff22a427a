"""Parts of both training steps that need no model: losses' limits, tasks, flow samples."""

from __future__ import annotations

import pytest
import torch

from gen3r.schedulers import make_euler_scheduler
from gen3r_training.adapter import AdapterLossConfig
from gen3r_training.diffusion import choose_task, flow_sample, keep_given_frames
from gen3r_training.losses import (
    adaptive_weight,
    camera_loss,
    dense_loss,
    filter_by_quantile,
    linear_decay,
    truncated_square,
)


def test_one_target_serves_all_iterations() -> None:
    predictions, target = torch.randn(4, 2, 9).unbind(0), torch.randn(2, 9)
    assert torch.equal(camera_loss(predictions, [target]), camera_loss(predictions, [target] * 4))


def test_bad_pixels_send_no_gradient() -> None:
    prediction = torch.zeros(1, 4, 1, requires_grad=True)
    target = torch.tensor([1.0, 1e9, float("inf"), float("nan")]).view(1, 4, 1)
    loss = dense_loss(prediction, target)
    loss.backward()
    assert loss.item() == pytest.approx((1 + 100) / 4)
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == [-0.25, 0, 0, 0]


@pytest.mark.parametrize("kind", ["l1", "l2", "l1_smooth", "huber"])
def test_nan_poses_send_no_gradient(kind: str) -> None:
    prediction = torch.zeros(2, 9, requires_grad=True)
    target = torch.ones(2, 9)
    target[0, 0], target[1, 8] = float("nan"), float("inf")
    loss = camera_loss([prediction], [target], kind)
    loss.backward()
    assert loss.isfinite()
    assert prediction.grad is not None and prediction.grad.isfinite().all()


def test_quantile_filter_keeps_small_tensors() -> None:
    errors = torch.full((10,), 1e6)
    assert filter_by_quantile(errors, 0.5) is errors
    few = filter_by_quantile(torch.arange(1200.0), 0.5)
    assert len(few) == 1200 and few.max() == 100


def test_truncated_square_ignores_what_is_too_far_but_counts_it() -> None:
    assert truncated_square(torch.tensor([2.0, 51.0]), torch.zeros(2)).mean().item() == 2.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: camera_loss([], []),
        lambda: camera_loss([torch.zeros(9)], [torch.zeros(9)], kind="l3"),
        lambda: camera_loss([torch.zeros(8)], [torch.zeros(8)]),
        lambda: dense_loss(torch.zeros(3, 1), torch.zeros(3, 3)),
        lambda: filter_by_quantile(torch.zeros(3), 1.5),
        lambda: adaptive_weight(0.0, 1.0),
        lambda: linear_decay(1, 0),
        lambda: AdapterLossConfig(recon=-1.0),
        lambda: AdapterLossConfig(image_beta=0.0),
        lambda: keep_given_frames(torch.zeros(2, 5, 3, 1, 1), ["1view"]),
        lambda: keep_given_frames(torch.zeros(1, 5, 3, 1, 1), ["3view"]),
    ],
)
def test_limits_are_value_errors(call) -> None:
    with pytest.raises(ValueError):
        call()


def test_tasks_share_the_unit_interval_in_thirds() -> None:
    tasks = [choose_task(i / 300) for i in range(300)]
    assert [tasks.count(name) for name in ("1view", "2view", "allview")] == [100, 99, 101]


def test_control_video_keeps_the_given_frames_of_each_sample() -> None:
    frames = torch.rand(3, 5, 3, 2, 2)
    control = keep_given_frames(frames, ["1view", "2view", "allview"])
    lit = control.flatten(2).any(-1)
    assert lit.tolist() == [[True] + [False] * 4, [True, *[False] * 3, True], [True] * 5]
    assert torch.equal(control[lit], frames[lit])


def test_flow_sample_of_a_batch_equals_its_samples() -> None:
    scheduler = make_euler_scheduler()
    clean, noise = torch.randn(2, 3, 16, 1, 2, 4).unbind(0)
    indices = torch.tensor([0, 500, 999])
    batch = flow_sample(scheduler, clean, noise, indices)
    for i in range(3):
        row = slice(i, i + 1)
        one = flow_sample(scheduler, clean[row], noise[row], indices[row])
        assert torch.equal(one.noisy, batch.noisy[row])
    assert torch.allclose(batch.noisy[0], noise[0])  # index 0 is pure noise
    with pytest.raises(ValueError, match=r"0\.\.999"):
        flow_sample(scheduler, clean, noise, indices + 1)
