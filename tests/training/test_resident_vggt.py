"""Training VGGT on resident clips: targets, draws, losses, metrics, and that a tiny one learns."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from gen3r.cameras import decode_pose, encode_pose, to_homogeneous, trajectory
from gen3r.config import VGGTConfig
from gen3r.pipeline import Gen3RPipeline
from gen3r.vggt import VGGT
from gen3r_engine.evaluation import geometry
from gen3r_kernels import Backends
from gen3r_training.procedural.clips import Clips
from gen3r_training.resident.config import ResidentConfig
from gen3r_training.resident.steps import Stepper
from gen3r_training.resident.vggt import (
    VGGTObjective,
    Views,
    draw_frames,
    draw_views,
    frame_count,
    held_out_views,
    mirrored,
    relative_to_first,
    taken,
)
from gen3r_training.resident.vggt_metrics import depth_errors, pose_auc, pose_errors
from gen3r_training.vggt_losses import (
    CORNER,
    DIRECTION_CORNER,
    VGGTLossConfig,
    VGGTPrediction,
    confidence_loss,
    gradient_error,
    pair_loss,
    pose_loss,
    relative_poses,
    vggt_loss,
)
from tests.training.plane_clips import plane_clips

SIZE, FRAMES = 28, 5
TINY = VGGTConfig(
    img_size=SIZE,
    embed_dim=32,
    depth=4,
    num_heads=2,
    vit_depth=1,
    vit_num_heads=2,
    trunk_depth=1,
    camera_num_heads=2,
    features=16,
    out_channels=(8, 8, 16, 16),
    intermediate_layer_idx=(0, 1, 2, 3),
)


def clips(count: int = 6, seed: int = 1, frames: int = FRAMES) -> Clips:
    return cast(Clips, plane_clips(count, frames, SIZE, seed))


def objective(
    count: int = 6, frames: int = FRAMES, device: str = "cpu", dtype: Any = torch.float32
) -> VGGTObjective:
    torch.manual_seed(0)
    vggt = VGGT(TINY, Backends()).to(device, dtype)
    with torch.no_grad():
        vggt.camera_head.pose_branch.fc2.weight.mul_(0.05)
        vggt.camera_head.pose_branch.fc2.bias.copy_(torch.tensor([0.0] * 6 + [1] * 3) / 4)
    pipeline = cast(Gen3RPipeline, SimpleNamespace(vggt=vggt))
    options = cast(ResidentConfig, SimpleNamespace(seed=3))
    stored = plane_clips(count, frames, SIZE, 1)
    fields = {f.name: getattr(stored, f.name).to(device) for f in dataclasses.fields(stored)}
    moved = cast(Clips, dataclasses.replace(stored, **fields))
    return VGGTObjective(pipeline, moved, moved, options)


def exact(views: Views, confidence: float = 2.0) -> VGGTPrediction:
    sure = torch.full_like(views.depth, confidence)
    return VGGTPrediction([views.pose] * 4, views.depth[..., None], sure, views.points, sure)


def reprojected(views: Views) -> Tensor:
    """Largest pixel distance between the points seen through the poses and the pixels' centres."""
    height, width = views.depth.shape[-2:]
    extrinsics, k = decode_pose(views.pose[:, views.mapped], height, width)
    local = torch.einsum("bsij,bshwj->bshwi", extrinsics[..., :3], views.points)
    local = local + extrinsics[..., 3][:, :, None, None]
    seen = torch.einsum("bsij,bshwj->bshwi", k, local)
    assert torch.allclose(seen[..., 2], views.depth, atol=1e-4)
    rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    v, u = torch.meshgrid(rows, columns, indexing="ij")
    return (seen[..., :2] / seen[..., 2:] - torch.stack([u, v], -1)).abs().max()


def test_targets_are_one_scene_in_the_first_frames_unit() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):  # several frame counts, mirrored and reversed clips among them
        views = draw_views(clips(), generator, 2)
        assert reprojected(views) < 2e-2
        for first in (views.mapped == 0).nonzero().flatten().tolist():
            distance = views.points[:, first].norm(dim=-1).mean((-2, -1))
            assert torch.allclose(distance, torch.ones(len(distance)), atol=1e-4)
        start = torch.tensor([0.0, 0, 0, 0, 0, 0, 1]).expand(len(views.pose), -1)
        assert torch.allclose(views.pose[:, 0, :7], start, atol=1e-5)
        assert views.images.min() >= 0 and views.images.max() <= 1


def test_the_world_and_the_unit_of_stored_clips_do_not_matter() -> None:
    stored = plane_clips(2, FRAMES, SIZE, 1)
    numbers, frames = torch.arange(2), torch.arange(FRAMES).expand(2, -1)
    images, depth, c2w, intrinsics = taken(cast(Clips, stored), numbers, frames)
    views = relative_to_first(images, depth, c2w, intrinsics)
    other = c2w[:1, 1:2] @ c2w
    other[..., :3, 3] *= 3
    again = relative_to_first(images, 3 * depth, other, intrinsics)
    for name in ("depth", "points", "pose"):
        assert torch.allclose(getattr(again, name), getattr(views, name), atol=1e-4)


def test_pixels_without_depth_stay_without() -> None:
    stored = plane_clips(1, 2, SIZE, 1)
    stored.depth[:, 0, :9] = 0
    views = next(held_out_views(cast(Clips, stored)))
    assert (views.depth[0, 0, :9] == 0).all() and (views.points[0, 0, :9] == 0).all()
    distance = views.points[0, 0, 9:].norm(dim=-1).mean()
    assert distance.item() == pytest.approx(1, abs=1e-4)


def test_a_mirrored_clip_mirrors_back() -> None:
    stored = plane_clips(2, 2, SIZE, 1)
    numbers, frames = torch.arange(2), torch.arange(2).expand(2, -1)
    given = taken(cast(Clips, stored), numbers, frames)
    flags = torch.tensor([True, False])
    once = mirrored(flags, *given)
    twice = mirrored(flags, *once)
    for before, between, after in zip(given, once, twice, strict=True):
        assert torch.equal(before, after) and torch.equal(before[1], between[1])
    assert not torch.equal(given[0][0], once[0][0])


def test_draws_follow_the_generator_and_keep_the_images_of_a_batch() -> None:
    one, two = (draw_views(clips(), torch.Generator().manual_seed(5), 4) for _ in range(2))
    assert all(
        torch.equal(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(Views)
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        views = draw_views(clips(), generator, 4)
        batch, frames = views.images.shape[:2]
        assert batch == round(4 * FRAMES / frames)
        mapped = {1: 1, 2: 2, 5: 2}[frames]
        assert views.depth.shape[:2] == (batch, mapped)
        assert len(views.mapped.unique()) == mapped and views.mapped.max() < frames


def test_frame_counts_have_their_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    found: dict[int, int] = {}
    for _ in range(1000):
        torch.rand(1, generator=generator)
        count = frame_count(generator, 17)
        found[count] = found.get(count, 0) + 1
    assert sorted(found) == [1, 2, 5, 9, 17]
    assert 400 < found[17] < 500 and 150 < found[2] < 250
    assert {frame_count(generator, 2) for _ in range(9)} <= {1, 2}


def test_frames_are_distinct_and_ordered() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 5, 17):
        frames = draw_frames(generator, 200, count, 17)
        steps = frames.diff(dim=1)
        assert ((steps > 0).all(1) | (steps < 0).all(1)).all()
        assert frames.min() >= 0 and frames.max() <= 16
        if count == 2:  # a random pair is the widest with 1 / 136
            assert 0.4 < ((frames.sum(1) == 16) & (steps[:, 0].abs() == 16)).float().mean() < 0.6


def test_an_exact_prediction_has_no_error() -> None:
    views = next(held_out_views(clips()))
    _, logs = vggt_loss(exact(views), views.depth, views.points, views.pose, VGGTLossConfig())
    for name in ("camera", "pairs", "depth_gradient", "depth_error", "point_error"):
        assert logs[name].item() == pytest.approx(0, abs=1e-5), name
    assert logs["depth"].item() == pytest.approx(-0.2 * math.log(2), abs=1e-6)


def test_confidence_weighs_errors_of_known_pixels() -> None:
    target = torch.zeros(1, 4, 4, 1)
    prediction = torch.full((1, 4, 4, 1), 0.5)
    confidence = torch.full((1, 4, 4), 3.0)
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[:, 0] = False
    prediction[:, 0] = float("nan")
    weighted, steps, plain = confidence_loss(prediction, confidence, target, mask, 0.2)
    assert weighted.item() == pytest.approx(1.5 - 0.2 * math.log(3))
    assert steps.item() == 0 and plain.item() == pytest.approx(0.5)
    nothing = confidence_loss(prediction, confidence, target, torch.zeros_like(mask), 0.2)
    assert [value.item() for value in nothing] == [0, 0, 0]


def test_gradient_error_of_a_ramp_and_its_mask() -> None:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[1, 1] = False
    error, known = gradient_error((2 * rows + 3 * columns)[..., None], mask)
    assert torch.equal(error, torch.full((3, 4), 5.0))
    assert (~known).nonzero().tolist() == [[0, 1], [1, 0], [1, 1]]


def test_relative_poses_are_those_of_matrices() -> None:
    views = next(held_out_views(clips()))
    extrinsics = to_homogeneous(decode_pose(views.pose, SIZE, SIZE)[0]).double()
    first, second = torch.triu_indices(FRAMES, FRAMES, 1)
    expected = extrinsics[:, second] @ torch.linalg.inv(extrinsics[:, first])
    rotation, translation = relative_poses(views.pose)
    assert torch.allclose(rotation.double(), expected[..., :3, :3], atol=1e-5)
    assert torch.allclose(translation.double(), expected[..., :3, 3], atol=1e-5)


def test_pair_loss_divides_by_the_distance() -> None:
    target = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1, 1]).repeat(1, 3, 1)
    target[:, 1, 0], target[:, 2, 0] = 0.1, 0.2  # distances 0.1, 0.2, 0.1
    wrong = target.clone()
    wrong[..., 1] = torch.tensor([0.0, 0.1, 0.2])  # as far to the side as ahead
    for scale in (1, 10):
        unit = torch.tensor([scale] * 3 + [1] * 6)
        loss = pair_loss([wrong * unit], target * unit, floor=1e-6)
        assert loss.item() == pytest.approx(1 - DIRECTION_CORNER / 2, rel=1e-3)
    assert pair_loss([wrong[:, :1]], target[:, :1]).item() == 0


def test_pairs_at_one_place_count_their_rotation_alone() -> None:
    target = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 1, 1]).repeat(1, 2, 1)
    moved, turned = target.clone(), target.clone()
    moved[:, 1, :3] = 1.0
    turned[:, 1, 3] = 1.0
    assert pair_loss([moved], target).item() == 0
    assert pair_loss([turned], target).item() > 1


def test_pose_loss_is_huber_with_decaying_weights() -> None:
    target = torch.zeros(1, 2, 9)
    far, near = target + 1, target + CORNER / 2
    exact, weights = [target] * 3, 1 + 1 + 0.5
    assert pose_loss([*exact, far], target).item() == pytest.approx(weights * (1 - CORNER / 2) / 4)
    assert pose_loss([far, *exact], target).item() == pytest.approx(
        0.6**3 * weights * (1 - CORNER / 2) / 4
    )
    assert pose_loss([near], target).item() == pytest.approx(weights * CORNER / 8)


@pytest.mark.parametrize("field", ["camera", "alpha"])
def test_loss_weights_are_checked(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        VGGTLossConfig(**{field: -1.0})


def test_metrics_of_known_errors() -> None:
    truth = torch.rand(2, 3, 4, 4) + 0.5
    truth[0, 0, 0] = 0
    plain, aligned = depth_errors(1.25 * truth.clamp(min=0.1), truth)
    assert torch.allclose(plain, torch.full((2,), 0.25)) and aligned.max() < 1e-6

    k = torch.tensor([[20.0, 0, 14], [0, 20, 14], [0, 0, 1]]).repeat(1, 3, 1, 1)
    w2c = torch.eye(4).repeat(1, 3, 1, 1)
    w2c[0, 1, 2, 3], w2c[0, 2, 0, 3] = 0.5, 0.005
    pose = encode_pose(w2c, k, SIZE, SIZE)
    turned, angle = pose_errors(pose, pose)
    # The third camera is too near to the first to have a direction.
    assert turned.max() < 1e-3 and angle.isnan().tolist() == [[False, True, False]]
    c, s = math.cos(math.radians(10)), math.sin(math.radians(10))
    other = w2c.clone()
    other[0, 1, :3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    turned, _ = pose_errors(encode_pose(other, k, SIZE, SIZE), pose)
    assert turned[0].tolist() == pytest.approx([10, 0, 10], abs=1e-2)
    # 10.5 degrees are below the 20 limits 11..30.
    assert pose_auc(torch.tensor([10.5]), torch.tensor([math.nan])) == pytest.approx(20 / 30)


@pytest.mark.parametrize("predicted", ["zoom_out", "arc_left", "free", "translate_up"])
def test_pose_figures_are_those_of_the_evaluation(predicted: str) -> None:
    """`free` stands still: it has no direction, which counts as 90 degrees."""
    k = torch.tensor([[20.0, 0, 14], [0, 20, 14], [0, 0, 1]]).repeat(1, 5, 1, 1)
    paths = [torch.linalg.inv(trajectory(name, 5).double()) for name in (predicted, "zoom_in")]
    turned, angle = pose_errors(*(encode_pose(w[None], k.double(), SIZE, SIZE) for w in paths))
    rre, rte = geometry.relative_pose_errors(*(w.numpy() for w in paths))
    assert turned[0].tolist() == pytest.approx(rre, abs=1e-4)
    assert angle[0].tolist() == pytest.approx(rte, abs=1e-4, nan_ok=True)
    assert pose_auc(turned[0], angle[0]) == pytest.approx(geometry.pose_auc(rre, rte))


def test_every_trained_parameter_gets_a_gradient() -> None:
    trainee = objective()
    views = draw_views(clips(), torch.Generator().manual_seed(2), 2)
    loss, logs = trainee.loss(views)
    assert loss.dtype == torch.float32 and not any(v.requires_grad for v in logs.values())
    loss.backward()  # type: ignore[no-untyped-call]
    missing = [
        name
        for name, p in trainee.module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)
    ]
    assert missing == []


def test_starting_values_are_for_untrained_models_alone() -> None:
    trainee = objective()
    before = {name: p.clone() for name, p in trainee.vggt.named_parameters()}
    assert before["aggregator.frame_blocks.0.ls1.gamma"].min() == 1
    again = VGGTObjective(
        cast(Gen3RPipeline, SimpleNamespace(vggt=trainee.vggt)),
        clips(),
        clips(),
        cast(ResidentConfig, SimpleNamespace(seed=4)),
    )
    assert all(torch.equal(p, before[name]) for name, p in again.vggt.named_parameters())


def test_a_tiny_model_learns_two_clips() -> None:
    trainee = objective(count=2, frames=3)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(
        [p for p in trainee.module.parameters() if p.requires_grad], lr=3e-3
    )
    before = trainee.evaluate()
    for _ in range(20):
        loss, _ = trainee.loss(trainee.draw(generator, 1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trainee.module.parameters(), 1.0)
        optimizer.step()
    after = trainee.evaluate()
    assert after["point_error"] < 0.5 * before["point_error"]
    assert after["depth_abs_rel"] < before["depth_abs_rel"]
    assert all(math.isfinite(value) for value in after.values())


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_no_clips_are_refused(split: str) -> None:
    train, held_out = (clips(0 if split == name else 1) for name in ("train", "held-out"))
    with pytest.raises(ValueError, match=f"no {split} clips"):
        VGGTObjective(
            cast(Gen3RPipeline, SimpleNamespace(vggt=VGGT(TINY, Backends()))),
            train,
            held_out,
            cast(ResidentConfig, SimpleNamespace(seed=1)),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True])
def test_a_step_in_bfloat16_has_the_gradients_of_float32(captured: bool) -> None:
    """Both replayed and plain; the forward pass runs the fused kernels."""
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        trainee = objective(device="cuda", dtype=dtype)
        views = draw_views(trainee.train, torch.Generator("cuda").manual_seed(2), 2)
        Stepper(trainee, captured=captured and dtype == torch.bfloat16).run(views)
        found = {n: p.grad for n, p in trainee.module.named_parameters() if p.requires_grad}
        gradients.append({n: g.float().clone() for n, g in found.items() if g is not None})
    assert gradients[0].keys() == gradients[1].keys()
    whole, rounded = (torch.cat([g[n].flatten() for n in gradients[0]]) for g in gradients)
    assert torch.nn.functional.cosine_similarity(whole, rounded, dim=0) > 0.9
