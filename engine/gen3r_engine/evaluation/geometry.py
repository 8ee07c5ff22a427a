"""Errors of points, cameras and depth against the truth: float64 numpy, no model in it.

    scale, rotation, shift = umeyama(predicted, truth)          # corresponding points, row by row
    thin = predicted[farthest_points(predicted, 20_000, seed=0)]
    accuracy, completeness, chamfer = accuracy_completeness(thin, true_thin)

Arrays may be numpy or torch, of any float dtype, on any device; results are numpy or float.
Sources: Umeyama, "Least-squares estimation of transformation parameters between two point
patterns", PAMI 1991; Eldar et al., "The farthest point strategy", 1997; pose AUC: the protocol of
PoseDiffusion (arXiv 2306.15667) and VGGT (arXiv 2503.11651).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

Floats = NDArray[np.float64]
Array = np.ndarray | Tensor

CANDIDATES = 200_000  # points among which the farthest ones are sought
BOX = 512  # points in a box of the search, at most
LEAST_BASELINE = 0.01  # of the scene unit: one per cent of the mean distance of what is seen
THRESHOLD = 30  # degrees of the pose AUC


def float64(values: Array) -> Floats:
    """The values as a float64 numpy array on the host."""
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)


def _points(values: Array, name: str) -> Floats:  # [N, 3]
    points = float64(values)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"{name} must be [N, 3], got {list(points.shape)}")
    if not np.isfinite(points).all():
        raise ValueError(f"{name} hold NaN or infinity; leave those points out")
    return points


def umeyama(
    source: Array,  # [N, 3]
    target: Array,  # [N, 3], row i belongs to row i of the source
    with_scale: bool = True,
) -> tuple[float, Floats, Floats]:  # scale, rotation [3, 3], translation [3]
    """The similarity (or rigid) motion with the least sum of squares |target - (s R source + t)|^2.

    Umeyama 1991, equations 34 to 42: R is a proper rotation even where a mirrored fit were closer.
    Points on one line leave the rotation about it open; any one of the least ones is returned.

    Raises
    ------
    ValueError : not [N, 3], different lengths, no points, NaN, or (with a scale) a source whose
        points all coincide.
    """
    source, target = _points(source, "source"), _points(target, "target")
    if len(source) != len(target) or len(source) == 0:
        raise ValueError(f"{len(source)} source and {len(target)} target points; give pairs")
    source_mean, target_mean = source.mean(0), target.mean(0)
    source, target = source - source_mean, target - target_mean
    u, singular, vt = np.linalg.svd(target.T @ source / len(source))
    signs = np.ones(3)
    if np.linalg.det(u) * np.linalg.det(vt) < 0:
        signs[-1] = -1.0
    rotation = (u * signs) @ vt
    scale = 1.0
    if with_scale:
        variance = float((source**2).sum() / len(source))
        if variance == 0.0:
            raise ValueError("all source points coincide: their scale cannot be found")
        scale = float((singular * signs).sum() / variance)
    return scale, rotation, target_mean - scale * rotation @ source_mean


def transform(
    points: Array,  # [N, 3]
    scale: float,
    rotation: Floats,  # [3, 3]
    translation: Floats,  # [3]
) -> Floats:  # [N, 3]
    """s R p + t of every point."""
    return scale * _points(points, "points") @ rotation.T + translation


def farthest_points(
    points: Array,  # [N, 3]
    count: int,
    seed: int = 0,
) -> NDArray[np.int64]:  # [min(count, N)], in the order in which they were taken
    """Farthest point sampling: each next point is the one farthest from all taken so far.

    Exact on at most `CANDIDATES` points, which are drawn without replacement from a cloud that has
    more; the first point is drawn too. With `count` points or fewer, all are returned in their
    order. 20,000 of 200,000 take 4 s of one core: the points lie in boxes, and a new point
    updates only the boxes that it can reach (Han et al., "QuickFPS", TCAD 2023).

    Raises
    ------
    ValueError : not [N, 3], no points, NaN, or a count below 1.
    """
    if count < 1:
        raise ValueError(f"count {count} is below 1")
    cloud = _points(points, "points")
    if len(cloud) == 0:
        raise ValueError("no points to sample from")
    if len(cloud) <= count:
        return np.arange(len(cloud))
    generator = np.random.default_rng(seed)
    candidates = np.arange(len(cloud))
    if len(cloud) > max(CANDIDATES, count):
        drawn = generator.choice(len(cloud), max(CANDIDATES, count), replace=False)
        candidates = np.sort(drawn)
    first = int(generator.integers(len(candidates)))
    return candidates[_farthest(cloud[candidates], count, first)]


def _boxes(cloud: Floats) -> tuple[Floats, NDArray[np.int64]]:  # [B, m, 3], [B, m]
    """The points in 2^n boxes of equal count: halved n times at the median of the longest side.

    The index is -1 where a box was filled up (with a copy of the cloud's last point).
    """
    levels = max(0, math.ceil(math.log2(len(cloud) / BOX)))
    filled = -len(cloud) % 2**levels
    index = np.concatenate([np.arange(len(cloud)), np.full(filled, -1)])[None]
    for _ in range(levels):
        points = cloud[index]
        widest = np.ptp(points, axis=1).argmax(-1)[:, None, None]
        keys = np.take_along_axis(points, widest, axis=2)[..., 0]
        half = index.shape[1] // 2
        order = np.argpartition(keys, half, axis=1)
        index = np.take_along_axis(index, order, axis=1).reshape(-1, half)
    return cloud[index], index


def _farthest(cloud: Floats, count: int, first: int) -> NDArray[np.int64]:
    """Indices of the sample; `nearest` holds squared distances to what is taken, -1 for filling."""
    points, index = _boxes(cloud)
    low, high = points.min(1), points.max(1)
    nearest = np.where(index < 0, -1.0, np.inf)
    far = nearest.max(1)  # of each box
    taken = np.empty(count, dtype=np.int64)
    taken[0] = first
    for i in range(1, count):
        point = cloud[taken[i - 1]]
        gap = np.maximum(np.maximum(low - point, point - high), 0.0)
        reached = np.flatnonzero(np.einsum("ij,ij->i", gap, gap) < far)
        difference = points[reached] - point
        square = np.einsum("ijk,ijk->ij", difference, difference)
        updated = np.minimum(nearest[reached], square)
        nearest[reached], far[reached] = updated, updated.max(1)
        box = far.argmax()
        taken[i] = index[box, nearest[box].argmax()]
    return taken


def accuracy_completeness(
    predicted: Array,  # [N, 3]
    truth: Array,  # [M, 3], in the same frame
) -> tuple[float, float, float]:  # accuracy, completeness, Chamfer distance
    """Mean distances between two clouds, in their unit; less is better.

    Accuracy: from every predicted point to the nearest true one. Completeness: from every true
    point to the nearest predicted one. Chamfer: the mean of the two, not squared, as in VGGT.

    Raises
    ------
    ValueError : not [N, 3], an empty cloud, or NaN.
    """
    predicted, truth = _points(predicted, "predicted"), _points(truth, "truth")
    if len(predicted) == 0 or len(truth) == 0:
        raise ValueError(f"{len(predicted)} predicted and {len(truth)} true points; both need some")
    accuracy = float(cKDTree(truth).query(predicted)[0].mean())
    completeness = float(cKDTree(predicted).query(truth)[0].mean())
    return accuracy, completeness, (accuracy + completeness) / 2


def relative_pose_errors(
    pred_w2c: Array,  # [F, 4, 4] or [F, 3, 4] world to camera
    true_w2c: Array,  # [F, 4, 4] or [F, 3, 4]
    least: float = LEAST_BASELINE,
    folded: bool = False,
) -> tuple[Floats, Floats]:  # RRE [P], RTE [P] degrees, all pairs i < j in the order of triu
    """Errors of the relative poses of all pairs: angle of rotation, angle between directions.

    The world frames need not agree and lengths play no part. A pair whose true baseline is at most
    `least` has no direction: its RTE is NaN. A predicted baseline of zero is 90 degrees off.

    Parameters
    ----------
    least : shortest baseline with a direction, in units of the true translations.
    folded : a direction and its opposite count as equal, as PoseDiffusion and VGGT measure it
        (there RTE is at most 90 degrees).

    Raises
    ------
    ValueError : shapes that do not agree, fewer than 2 poses, or NaN.
    """
    predicted, truth = _poses(pred_w2c, "pred_w2c"), _poses(true_w2c, "true_w2c")
    if len(predicted) != len(truth) or len(truth) < 2:
        raise ValueError(f"{len(predicted)} predicted and {len(truth)} true poses; give 2 or more")
    i, j = np.triu_indices(len(truth), k=1)
    (turn, shift), (true_turn, true_shift) = _relative(predicted, i, j), _relative(truth, i, j)
    rre = _rotation_angle(turn.transpose(0, 2, 1) @ true_turn)
    true_length = np.linalg.norm(true_shift, axis=-1)
    cosine = (shift * true_shift).sum(-1)
    sine = np.linalg.norm(np.cross(shift, true_shift), axis=-1)
    rte = np.degrees(np.arctan2(sine, np.abs(cosine) if folded else cosine))
    rte = np.where(np.linalg.norm(shift, axis=-1) > 0, rte, 90.0)
    return rre, np.where(true_length > least, rte, np.nan)


def _poses(values: Array, name: str) -> Floats:  # [F, 4, 4]
    poses = float64(values)
    if poses.ndim != 3 or poses.shape[1:] not in ((3, 4), (4, 4)):
        raise ValueError(f"{name} must be [F, 4, 4], got {list(poses.shape)}")
    if not np.isfinite(poses).all():
        raise ValueError(f"{name} hold NaN or infinity")
    square = np.tile(np.eye(4), (len(poses), 1, 1))
    square[:, :3] = poses[:, :3]
    return square


def _relative(
    w2c: Floats, i: NDArray[np.int64], j: NDArray[np.int64]
) -> tuple[Floats, Floats]:  # [P, 3, 3], [P, 3]
    """Camera j in the frame of camera i."""
    pose = w2c[i] @ np.linalg.inv(w2c)[j]
    return pose[:, :3, :3], pose[:, :3, 3]


def _rotation_angle(rotation: Floats) -> Floats:  # [P, 3, 3] -> [P] degrees
    """The angle by its sine and cosine: exact near 0 and 180 degrees, where the arc cosine of the
    trace alone loses half the digits; products of not quite orthogonal matrices do no harm."""
    sine = np.stack(
        [
            rotation[:, 2, 1] - rotation[:, 1, 2],
            rotation[:, 0, 2] - rotation[:, 2, 0],
            rotation[:, 1, 0] - rotation[:, 0, 1],
        ],
        axis=-1,
    )
    trace = np.trace(rotation, axis1=1, axis2=2)
    return np.degrees(np.arctan2(np.linalg.norm(sine, axis=-1), trace - 1.0))


def mean_pose_errors(rre: Floats, rte: Floats) -> tuple[float, float]:
    """Means over pairs in degrees; NaN directions are left out, and all NaN gives NaN."""
    known = rte[np.isfinite(rte)]
    return float(np.mean(rre)), float(known.mean()) if len(known) else float("nan")


def pose_auc(
    rre: Floats,  # [P] degrees
    rte: Floats,  # [P] degrees, NaN where there is no direction
    threshold: int = THRESHOLD,
) -> float:  # in [0, 1]
    """Area under the curve "share of pairs whose error is below x degrees", x = 1 ... threshold.

    A pair's error is the larger of the two angles (the rotation's alone where RTE is NaN). As VGGT
    and PoseDiffusion: a histogram in whole degrees, summed up, averaged over the bins.

    Raises
    ------
    ValueError : no pairs, different lengths, or a threshold below 1.
    """
    rre, rte = float64(rre), float64(rte)
    if rre.shape != rte.shape or rre.size == 0:
        raise ValueError(f"{rre.size} RRE and {rte.size} RTE; give one of each per pair")
    if threshold < 1:
        raise ValueError(f"threshold {threshold} is below 1 degree")
    histogram, _ = np.histogram(np.fmax(rre, rte), bins=np.arange(threshold + 1))
    return float(np.cumsum(histogram / rre.size).mean())


def depth_abs_rel(
    predicted: Array,  # [...]
    truth: Array,  # [...], same shape
) -> float:
    """Mean |predicted - truth| / truth over the pixels whose truth is above 0.

    The prediction is multiplied by the median of truth / prediction over those pixels (where it is
    above 0 itself): one factor a call.

    Raises
    ------
    ValueError : shapes that do not agree, no pixel that counts, values that are not finite there,
        or a median that cannot be taken.
    """
    predicted, truth = float64(predicted), float64(truth)
    if predicted.shape != truth.shape:
        raise ValueError(f"depth of {list(predicted.shape)} against {list(truth.shape)}")
    counts = truth > 0
    predicted, truth = predicted[counts], truth[counts]
    if truth.size == 0:
        raise ValueError("no pixel has a true depth above 0")
    if not (np.isfinite(predicted).all() and np.isfinite(truth).all()):
        raise ValueError("depth holds NaN or infinity")
    positive = predicted > 0
    if not positive.any():
        raise ValueError("no predicted depth above 0: there is no median to align by")
    predicted = predicted * np.median(truth[positive] / predicted[positive])
    return float(np.mean(np.abs(predicted - truth) / truth))
