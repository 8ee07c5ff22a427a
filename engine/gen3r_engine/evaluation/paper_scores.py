"""The paper's figures of one generated scene against the truth (arXiv 2601.04090, section 4).

Appearance: PSNR, SSIM and LPIPS of every frame, averaged. Geometry: the points of the generated
depth under the generated cameras, and those of the true depth, at the pixels that have a true
depth; the generated ones aligned with Umeyama's algorithm over corresponding pixels (with scale),
20,000 of each taken by farthest point sampling, then accuracy, completeness and their mean, the
Chamfer distance (which the paper's own rows confirm: 0.8284 and 1.3811 give 1.1047). Poses: errors
of all pairs, a direction and its opposite counting as equal, as in VGGT's protocol.

Not said in the paper and chosen here: the net of LPIPS; which pixels give points; that poses are
the generated cameras themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gen3r.scene import Scene
from gen3r_engine.evaluation import geometry, images, measures
from gen3r_engine.evaluation.geometry import Floats
from gen3r_engine.evaluation.paper_data import Truth

POINTS = 20_000  # of each cloud
PIXELS = 1_000_000  # that are aligned, at most: drawn at random where there are more


@dataclass(frozen=True)
class Figure:
    """A figure's title, whether more is better, and its digits after the point."""

    title: str
    more: bool
    digits: int


FIGURES = {
    "psnr": Figure("PSNR, dB", True, 2),
    "ssim": Figure("SSIM", True, 4),
    "lpips": Figure("LPIPS", False, 4),
    "accuracy": Figure("accuracy", False, 4),
    "completeness": Figure("completeness", False, 4),
    "chamfer": Figure("Chamfer", False, 4),
    "auc30": Figure("pose AUC@30", True, 4),
    "rre": Figure("RRE, degrees", False, 2),
    "rte": Figure("RTE, degrees", False, 2),
}
APPEARANCE = ("psnr", "ssim", "lpips")
GEOMETRY = ("accuracy", "completeness", "chamfer")
POSES = ("auc30", "rre", "rte")


def figures_of(task: str, geometry: bool) -> tuple[str, ...]:
    """The figures of a task on a data set with or without true geometry.

    Reconstruction (``allview``) is judged by geometry and poses, generation by appearance too.
    """
    appearance = () if task == "allview" else APPEARANCE
    return (*appearance, *(GEOMETRY if geometry else ()), *POSES)


def score(
    scene: Scene,
    truth: Truth,
    figures: tuple[str, ...],
    *,
    lpips_net: str | None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Those of the figures that can be measured.

    Generated cameras that are not finite have an AUC of 0 and no RRE and RTE; points that are not,
    or all coincide, have no accuracy and completeness.

    Parameters
    ----------
    lpips_net : None where LPIPS is not measured. seed : of the points that are drawn.
    device : where images are compared.

    Raises
    ------
    ValueError : a scene of another size than the truth.
    """
    found: dict[str, float] = {}
    if "psnr" in figures:
        rgb, frames = scene.rgb.to(device), truth.frames.to(device)
        found["psnr"] = float(images.psnr(rgb, frames).mean())
        found["ssim"] = float(images.ssim(rgb, frames).mean())
        if lpips_net is not None:
            found["lpips"] = float(images.lpips(rgb, frames, lpips_net).mean())
    if "chamfer" in figures and truth.depth is not None:
        values = cloud_errors(scene.points, truth, seed)
        if values is not None:
            found |= dict(zip(GEOMETRY, values, strict=True))
    if "auc30" in figures and not bool(scene.extrinsics.isfinite().all()):
        found["auc30"] = 0.0
    elif "auc30" in figures:
        rre, rte = geometry.relative_pose_errors(
            scene.extrinsics, truth.w2c, least=0.0, folded=True
        )
        found["auc30"] = geometry.pose_auc(rre, rte)
        found["rre"], found["rte"] = geometry.mean_pose_errors(rre, rte)
    return found


def cloud_errors(
    points: Tensor,  # [F, S, S, 3] generated, any world frame and scale
    truth: Truth,
    seed: int,
) -> tuple[float, float, float] | None:  # accuracy, completeness, Chamfer; in the truth's unit
    """Align, thin out, compare; None where the generated points cannot be aligned.

    Raises
    ------
    ValueError : shapes that do not agree.
    """
    predicted, true = corresponding(points, truth, seed)
    if len(predicted) < 3 or not (predicted != predicted[0]).any():
        return None
    predicted = geometry.transform(predicted, *geometry.umeyama(predicted, true))
    # One seed: clouds that are equal stay equal when they are thinned out.
    clouds = [cloud[geometry.farthest_points(cloud, POINTS, seed)] for cloud in (predicted, true)]
    return geometry.accuracy_completeness(*clouds)


def corresponding(
    points: Tensor,  # [F, S, S, 3]
    truth: Truth,
    seed: int,
) -> tuple[Floats, Floats]:  # [N, 3] each, N <= PIXELS
    """Generated and true points of the same pixels: those that have both.

    Raises
    ------
    ValueError : as `cloud_errors`.
    """
    depth = truth.depth
    if depth is None or points.shape[:-1] != depth.shape:
        shape = None if depth is None else list(depth.shape)
        raise ValueError(f"points of {list(points.shape)} for true depth of {shape}")
    valid = (depth > 0) & torch.isfinite(depth) & torch.isfinite(points).all(-1)
    index = valid.flatten().nonzero().flatten().numpy()
    if len(index) > PIXELS:
        index = np.sort(np.random.default_rng(seed).choice(index, PIXELS, replace=False))
    predicted = points.reshape(-1, 3)[index].double().numpy()
    pixels = torch.from_numpy(index)
    true = measures.unproject(depth, truth.w2c, truth.intrinsics, pixels)
    return predicted, true.numpy()
