"""Batches of generated clips against the true ones: one value a scene, as suites report them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gen3r_engine.evaluation import geometry, images

PSNR_CAP = 60.0  # dB of frames that are equal, or nearly: a mean over frames must stay finite


def frame_psnr(
    found: Tensor,  # [N, F, H, W, 3] uint8
    truth: Tensor,  # the same
    frames: slice = slice(None),
) -> tuple[float, ...]:  # dB, a scene
    """Mean PSNR of the frames of every scene, each at most `PSNR_CAP`."""
    return _by_scene(lambda a, b: np.minimum(images.psnr(a, b), PSNR_CAP), found, truth, frames)


def frame_ssim(
    found: Tensor,  # [N, F, H, W, 3] uint8
    truth: Tensor,  # the same
    frames: slice = slice(None),
) -> tuple[float, ...]:
    """Mean SSIM of the frames of every scene."""
    return _by_scene(images.ssim, found, truth, frames)


def frame_lpips(
    found: Tensor,  # [N, F, H, W, 3] uint8
    truth: Tensor,  # the same
    frames: slice = slice(None),
) -> tuple[tuple[float, ...], str]:
    """Mean LPIPS of the frames of every scene; or no values and why they cannot be had here."""
    problem = images.lpips_problem()
    if problem is not None:
        return (), f"not measured: {problem}"
    return _by_scene(images.lpips, found, truth, frames), ""


def _by_scene(
    measure: Callable[[Tensor, Tensor], np.ndarray], found: Tensor, truth: Tensor, frames: slice
) -> tuple[float, ...]:
    a, b = found[:, frames], truth[:, frames].to(found.device)
    values = measure(a.flatten(0, 1), b.flatten(0, 1))
    return tuple(values.reshape(a.shape[:2]).mean(1).tolist())


def repeat_first(
    video: Tensor,  # [N, F, ...]
) -> Tensor:  # the same shape
    """The first frame in place of every frame."""
    return video[:, :1].expand_as(video)


def depth_errors(
    found: Tensor,  # [N, F, H, W]
    truth: Tensor,  # [N, F, H, W], 0 where there is none
) -> tuple[float, ...]:
    """AbsRel of every scene after one factor a scene (the median of truth / found).

    Infinite where the depth is not finite or nowhere above 0.
    """
    return tuple(_depth_error(a, b) for a, b in zip(found, truth, strict=True))


def _depth_error(found: Tensor, truth: Tensor) -> float:
    kept = found[truth > 0]
    if not bool(kept.isfinite().all()) or not bool((kept > 0).any()):
        return math.inf
    return geometry.depth_abs_rel(found, truth)


def pose_aucs(
    found: Tensor,  # [N, F, 4, 4] world to camera
    truth: Tensor,  # [N, F, 4, 4], in scene units
) -> tuple[float, ...]:  # in [0, 1]
    """AUC at 30 degrees over all pairs of frames of every scene; 0 for cameras that are NaN.

    Pairs whose true baseline is below 1 % of the scene unit count with their rotation alone.
    """
    return tuple(_pose_auc(a, b) for a, b in zip(found, truth, strict=True))


def _pose_auc(found: Tensor, truth: Tensor) -> float:
    if not bool(found.isfinite().all()):
        return 0.0
    return geometry.pose_auc(*geometry.relative_pose_errors(found, truth))


def differences(first: Sequence[float], second: Sequence[float]) -> tuple[float, ...]:
    """first - second, scene by scene."""
    return tuple(a - b for a, b in zip(first, second, strict=True))


CLOUD_POINTS = 4096  # of a scene, drawn from the pixels with a true depth


def cloud_errors(
    depth: Tensor,  # [N, F, H, W]
    w2c: Tensor,  # [N, F, 4, 4]
    intrinsics: Tensor,  # [N, F, 3, 3] pixels
    true_depth: Tensor,  # [N, F, H, W], 0 where there is none
    true_w2c: Tensor,  # [N, F, 4, 4]
    true_intrinsics: Tensor,  # [N, F, 3, 3]
    seed: int = 0,
) -> tuple[tuple[float, ...], tuple[float, ...]]:  # accuracy, completeness, in scene units
    """Accuracy and completeness of every scene's points after Umeyama's alignment.

    The same `CLOUD_POINTS` pixels of both clouds; infinite where the points are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    accuracy, completeness = [], []
    for n in range(len(depth)):
        known = (true_depth[n] > 0).flatten().nonzero().flatten()
        chosen = known[torch.randperm(len(known), generator=generator)[:CLOUD_POINTS]]
        found = unproject(depth[n], w2c[n], intrinsics[n], chosen)
        truth = unproject(true_depth[n], true_w2c[n], true_intrinsics[n], chosen)
        a, c = math.inf, math.inf
        if bool(found.isfinite().all()) and bool((found != found[0]).any()):
            aligned = geometry.transform(found, *geometry.umeyama(found, truth))
            a, c, _ = geometry.accuracy_completeness(aligned, truth)
        accuracy.append(a)
        completeness.append(c)
    return tuple(accuracy), tuple(completeness)


def unproject(
    depth: Tensor,  # [F, H, W] along the optical axis
    w2c: Tensor,  # [F, 4, 4]
    intrinsics: Tensor,  # [F, 3, 3] pixels
    index: Tensor,  # [N] pixels, numbered through all frames
) -> Tensor:  # [N, 3] float64
    """World points of some pixels, taken at the pixels' centres (+0.5)."""
    _, height, width = depth.shape
    frame, rest = index // (height * width), index % (height * width)
    v, u = rest // width + 0.5, rest % width + 0.5
    pixels = torch.stack([u, v, torch.ones_like(u)], -1).double()
    rays = torch.einsum("nij,nj->ni", torch.linalg.inv(intrinsics.double())[frame], pixels)
    camera = rays * depth.flatten()[index, None].double()
    c2w = torch.linalg.inv(w2c.double())[frame]
    return torch.einsum("nij,nj->ni", c2w[:, :3, :3], camera) + c2w[:, :3, 3]
