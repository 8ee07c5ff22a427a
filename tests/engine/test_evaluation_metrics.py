"""Metrics of points, cameras, depth and images, against cases worked out by hand and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from gen3r.cameras import trajectory
from gen3r_engine.evaluation import geometry, images

RNG = np.random.default_rng(0)
CLOUD = RNG.normal(size=(200, 3))


def poses(translations: NDArray[np.float64], degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """World to camera [F, 4, 4]: camera centres, and turns about y in degrees."""
    c2w = np.tile(np.eye(4), (len(translations), 1, 1))
    c2w[:, :3, :3] = Rotation.from_euler("y", degrees[:, None], degrees=True).as_matrix()
    c2w[:, :3, 3] = translations
    return geometry.float64(np.linalg.inv(c2w))


# ------------------------------------------------------------------------------------- alignment


def test_umeyama_finds_a_similarity_exactly() -> None:
    rotation = Rotation.from_rotvec([0.3, -1.1, 0.7]).as_matrix()
    target = 2.5 * CLOUD @ rotation.T + [1.0, -2.0, 3.0]
    scale, found, translation = geometry.umeyama(CLOUD, torch.from_numpy(target))
    assert scale == pytest.approx(2.5, rel=1e-12)
    np.testing.assert_allclose(found, rotation, atol=1e-12)
    np.testing.assert_allclose(translation, [1, -2, 3], atol=1e-12)
    np.testing.assert_allclose(geometry.transform(CLOUD, scale, found, translation), target)


def test_umeyama_without_scale_is_scipys_rotation() -> None:
    target = 3.0 * CLOUD @ Rotation.from_rotvec([0.2, 0.1, -0.4]).as_matrix().T
    target += RNG.normal(scale=0.3, size=target.shape)
    scale, rotation, translation = geometry.umeyama(CLOUD, target, with_scale=False)
    expected, _ = Rotation.align_vectors(target - target.mean(0), CLOUD - CLOUD.mean(0))
    assert scale == 1.0
    np.testing.assert_allclose(rotation, expected.as_matrix(), atol=1e-9)
    np.testing.assert_allclose(translation, target.mean(0) - rotation @ CLOUD.mean(0))


def test_umeyama_scale_is_the_least_squares_one() -> None:
    target = 0.7 * CLOUD + RNG.normal(scale=0.2, size=CLOUD.shape)
    best = geometry.umeyama(CLOUD, target)

    def error(scale: float) -> float:
        moved = geometry.transform(CLOUD, scale, best[1], best[2])
        # The best translation for another scale.
        return float(((moved - moved.mean(0) + target.mean(0) - target) ** 2).sum())

    assert error(best[0]) < min(error(best[0] * 1.001), error(best[0] * 0.999))


def test_umeyama_never_mirrors() -> None:
    """Umeyama's own example: 2-D points whose best orthogonal map is a reflection (PAMI 1991)."""
    source = np.array([[0.0, 0, 0], [1, 0, 0], [0, 2, 0]])
    target = np.array([[0.0, 0, 0], [-1, 0, 0], [0, 2, 0]])
    _, rotation, _ = geometry.umeyama(source, target)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    mirrored = CLOUD * [1, 1, -1]
    assert np.linalg.det(geometry.umeyama(CLOUD, mirrored)[1]) == pytest.approx(1.0)


def test_umeyama_refuses() -> None:
    for source, target, words in (
        (CLOUD, CLOUD[:5], "200 source and 5 target"),
        (CLOUD[:, :2], CLOUD, r"\[N, 3\]"),
        (np.ones((4, 3)), CLOUD[:4], "coincide"),
        (CLOUD * np.nan, CLOUD, "NaN"),
    ):
        with pytest.raises(ValueError, match=words):
            geometry.umeyama(source, target)


# ---------------------------------------------------------------------------------------- clouds


def test_farthest_points_by_hand() -> None:
    line = np.array([[0.0, 0, 0], [1, 0, 0], [2.1, 0, 0], [10, 0, 0]])
    taken = geometry.farthest_points(line, 3, seed=1)
    start = int(taken[0])
    assert taken.tolist() == {0: [0, 3, 2], 1: [1, 3, 2], 2: [2, 3, 0], 3: [3, 0, 2]}[start]
    assert geometry.farthest_points(line, 4).tolist() == [0, 1, 2, 3]
    assert geometry.farthest_points(line, 9).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [2500, 3000])
def test_farthest_points_equals_the_plain_search(count: int) -> None:
    cloud = RNG.normal(size=(count, 3)) * [1, 5, 0.2]  # more than one box
    taken = geometry.farthest_points(torch.from_numpy(cloud), 300, seed=3)
    nearest = np.full(len(cloud), np.inf)
    expected = [int(taken[0])]
    while len(expected) < 300:
        nearest = np.minimum(nearest, ((cloud - cloud[expected[-1]]) ** 2).sum(-1))
        expected.append(int(nearest.argmax()))
    assert taken.tolist() == expected


def test_farthest_points_of_a_large_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "CANDIDATES", 1000)
    cloud = RNG.normal(size=(5000, 3))
    taken = geometry.farthest_points(cloud, 200, seed=5)
    assert len(set(taken.tolist())) == 200
    assert np.array_equal(taken, geometry.farthest_points(cloud, 200, seed=5))
    assert not np.array_equal(taken, geometry.farthest_points(cloud, 200, seed=6))
    # Points that lie on each other are still that many points.
    assert len(geometry.farthest_points(np.ones((50, 3)), 7)) == 7


def test_accuracy_and_completeness_by_hand() -> None:
    truth = np.array([[0.0, 0, 0], [4, 0, 0]])
    predicted = np.array([[0.0, 3, 0], [0, 1, 0], [0, 0, 2]])
    accuracy, completeness, chamfer = geometry.accuracy_completeness(predicted, truth)
    assert accuracy == pytest.approx((3 + 1 + 2) / 3)
    assert completeness == pytest.approx((1 + math.sqrt(17)) / 2)
    assert chamfer == pytest.approx((accuracy + completeness) / 2)
    with pytest.raises(ValueError, match="0 predicted and 2 true"):
        geometry.accuracy_completeness(np.zeros((0, 3)), truth)


# --------------------------------------------------------------------------------------- cameras


def test_relative_pose_errors_by_hand() -> None:
    true = poses(np.array([[0.0, 0, 0], [1, 0, 0], [1, 0, 1]]), np.zeros(3))
    predicted = poses(np.array([[0.0, 0, 0], [0, 0, 2], [2, 0, 2]]), np.array([0.0, 10, 30]))
    rre, rte = geometry.relative_pose_errors(predicted, true)
    np.testing.assert_allclose(rre, [10, 30, 20], atol=1e-9)
    # 0-1: x against z. 0-2: equal. 1-2: z, against x seen by a camera turned by 10 degrees.
    np.testing.assert_allclose(rte, [90, 0, 80], atol=1e-5)


def test_relative_pose_errors_need_no_common_world_or_scale() -> None:
    true = poses(RNG.normal(size=(6, 3)), RNG.uniform(-60, 60, 6))
    world = np.eye(4)
    world[:3, :3] = Rotation.from_rotvec([1.0, 2.0, -0.5]).as_matrix()
    world[:3, 3] = [3, 1, -7]
    other = true.copy()
    other[:, :3, 3] *= 4.2
    rre, rte = geometry.relative_pose_errors(torch.from_numpy(other @ world)[:, :3], true)
    assert rre.shape == (15,)
    assert rre.max() < 1e-6
    assert rte.max() < 1e-5
    assert geometry.pose_auc(rre, rte) == 1.0


def test_directions_and_their_opposites() -> None:
    ahead = np.linalg.inv(trajectory("zoom_in", 5, 1.0).double().numpy())
    back = np.linalg.inv(trajectory("zoom_out", 5, 1.0).double().numpy())
    strict = geometry.relative_pose_errors(back, ahead)
    folded = geometry.relative_pose_errors(back, ahead, folded=True)
    np.testing.assert_allclose(strict[1], 180, atol=1e-5)
    np.testing.assert_allclose(folded[1], 0, atol=1e-5)
    assert (geometry.pose_auc(*strict), geometry.pose_auc(*folded)) == (0.0, 1.0)


def test_pairs_without_a_baseline_count_with_their_rotation() -> None:
    turn = np.linalg.inv(trajectory("arc_left", 5).double().numpy())
    still = np.tile(np.eye(4), (5, 1, 1))
    rre, rte = geometry.relative_pose_errors(still, turn)
    assert np.isnan(rte).all()
    degrees = [15 * (j - i) / 4 for i in range(5) for j in range(i + 1, 5)]
    np.testing.assert_allclose(rre, degrees, atol=1e-5)  # the path is float32
    mean_rre, mean_rte = geometry.mean_pose_errors(rre, rte)
    assert mean_rre == pytest.approx(7.5)
    assert math.isnan(mean_rte)
    assert 0.7 < geometry.pose_auc(rre, rte) < 0.8
    # A camera that should move and does not: 90 degrees off, whatever the fold.
    moves = np.linalg.inv(trajectory("zoom_in", 5).double().numpy())
    np.testing.assert_allclose(geometry.relative_pose_errors(still, moves)[1], 90)


def test_pose_auc_by_hand() -> None:
    rre = np.array([0.5, 2.5, 10.0, 40.0])
    rte = np.array([0.1, 1.0, np.nan, 1.0])
    # Bins of a degree: shares 1/4 from bin 0, 2/4 from bin 2, 3/4 from bin 10 of 30.
    expected = (0.25 * 30 + 0.25 * 28 + 0.25 * 20) / 30
    assert geometry.pose_auc(rre, rte) == pytest.approx(expected)
    assert geometry.pose_auc(np.array([30.5]), np.array([0.0])) == 0.0
    with pytest.raises(ValueError, match="0 RRE"):
        geometry.pose_auc(np.zeros(0), np.zeros(0))


def test_poses_that_do_not_fit() -> None:
    eyes = np.tile(np.eye(4), (3, 1, 1))
    with pytest.raises(ValueError, match="3 predicted and 2 true"):
        geometry.relative_pose_errors(eyes, eyes[:2])
    with pytest.raises(ValueError, match=r"\[F, 4, 4\]"):
        geometry.relative_pose_errors(eyes[:, :3, :3], eyes)


# ----------------------------------------------------------------------------------------- depth


def test_depth_abs_rel_by_hand() -> None:
    truth = torch.tensor([[2.0, 4.0], [0.0, 10.0]])
    predicted = torch.tensor([[1.0, 2.0], [7.0, 4.0]])
    # Ratios 2, 2, 2.5: the median doubles the prediction; the last is then 8 for 10.
    assert geometry.depth_abs_rel(predicted, truth) == pytest.approx(0.2 / 3)


def test_depth_abs_rel_refuses() -> None:
    ones = np.ones((2, 2))
    for arguments, words in (
        ((ones, ones[:1]), "against"),
        ((ones, ones * 0), "no pixel"),
        ((ones * np.nan, ones), "NaN"),
        ((-ones, ones), "no predicted depth above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            geometry.depth_abs_rel(*arguments)


# ---------------------------------------------------------------------------------------- images


def test_psnr_by_hand() -> None:
    truth = np.full((2, 8, 8, 3), 100, np.uint8)
    predicted = truth.copy()
    predicted[0] += 51  # a fifth of the range
    predicted[1, :4] += 51
    expected = [20 * math.log10(5), 20 * math.log10(5) + 10 * math.log10(2)]
    np.testing.assert_allclose(images.psnr(predicted, truth), expected, rtol=1e-6)
    assert np.isinf(images.psnr(truth, truth)).all()
    planes = torch.from_numpy(predicted).permute(0, 3, 1, 2) / 255
    np.testing.assert_allclose(images.psnr(planes, truth), expected, rtol=1e-6)


def test_ssim_of_flat_frames_by_hand() -> None:
    """Without structure only the means count: (2 a b + c1) / (a^2 + b^2 + c1).

    Bounds: in float32 the variance of flat frames is not quite 0 beside c2 = 9e-4 (off by 1.2e-4).
    """
    a, b, c1 = 0.2, 0.6, 0.01**2
    flat = torch.ones(3, 3, 24, 24)
    found = images.ssim(a * flat, b * flat)
    np.testing.assert_allclose(found, (2 * a * b + c1) / (a * a + b * b + c1), rtol=5e-4)
    pixels = RNG.integers(0, 255, (2, 24, 24, 3)).astype(np.uint8)
    np.testing.assert_allclose(images.ssim(pixels, pixels), 1.0, atol=5e-4)
    assert (images.ssim(pixels, 255 - pixels) < 0).all()


def test_frames_that_do_not_fit() -> None:
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="against true ones"):
        images.psnr(pixels, pixels[:1])
    with pytest.raises(ValueError, match="give uint8"):
        images.psnr(pixels[0], pixels[0])
    with pytest.raises(ValueError, match="no predicted frames"):
        images.psnr(pixels[:0], pixels[:0])


def test_lpips_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="known: alex, vgg, squeeze"):
        images.lpips(pixels, pixels, "resnet")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nonexistent")
    with pytest.raises(ValueError, match=r"pip install|download https") as error:
        images.lpips(pixels, pixels)
    assert images.lpips_problem() == str(error.value)
