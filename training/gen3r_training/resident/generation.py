"""What the transformer generates for held-out clips, measured: a quick check while training.

All tasks and clips are one batch, without guidance and in few steps, so that the figures lie below
those of the evaluation proper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gen3r.pipeline import Gen3RPipeline
from gen3r.scene import TASKS
from gen3r.schedulers import make_schedule
from gen3r.stages import denoise, split_latents
from gen3r.transformer import Conditions
from gen3r_training.resident.adapter import read_geometry
from gen3r_training.resident.latents import WORKING_GIB
from gen3r_training.resident.vggt import relative_to_first, taken
from gen3r_training.resident.vggt_metrics import depth_errors, pose_auc, pose_errors

if TYPE_CHECKING:
    from gen3r_training.procedural import Clips

STEPS = 10  # of the Euler solver


@torch.no_grad()
def generation_figures(
    pipeline: Gen3RPipeline,
    clips: Clips,  # n
    conditions: Conditions,  # of 3 n rows: the clips for each of `TASKS`
    noise: Tensor,  # [3 n, 16, f, h, 2 w] float32
) -> dict[str, float]:
    """Figures of what is generated from `noise`.

    psnr_2view, psnr_2view_first : of the frames that are not given, in dB: as generated, and with
        the first frame in their place
    psnr_allview : of all frames
    abs_rel_allview : of depth, medians of each clip aligned
    auc_allview, auc_1view : of pairwise poses up to 30 degrees, against the true path, which 1view
        is asked for
    """
    images, c2w, intrinsics, depth = _truth(clips)
    views = relative_to_first(images, depth, c2w, intrinsics)
    schedule = make_schedule("euler", STEPS, euler=pipeline.scheduler)
    joint = denoise(pipeline.transformer, conditions, noise, schedule, 1.0)
    appearance, geometry = split_latents(joint, *images.shape[-2:])
    rgb = dict(zip(TASKS, _decoded(pipeline, appearance).chunk(len(TASKS)), strict=True))
    adapter = pipeline.geo_adapter
    latents = geometry.to(next(adapter.parameters()).dtype)
    seen, poses = read_geometry(pipeline, adapter.decode(latents, WORKING_GIB))
    pose = dict(zip(TASKS, poses.chunk(len(TASKS)), strict=True))
    middle = slice(1, -1)
    still = images[:, :1].expand_as(images)
    result = {
        "psnr_2view": _psnr(rgb["2view"][:, middle], images[:, middle]),
        "psnr_2view_first": _psnr(still[:, middle], images[:, middle]),
        "psnr_allview": _psnr(rgb["allview"], images),
    }
    every = seen.chunk(len(TASKS))[TASKS.index("allview")]
    result["abs_rel_allview"] = float(depth_errors(every, views.depth)[1].mean())
    for task in ("allview", "1view"):
        turned, angle = pose_errors(pose[task], views.pose)
        result[f"auc_{task}"] = pose_auc(turned.flatten(), angle.flatten())
    return result


def _truth(clips: Clips) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device, frames = clips.rgb.device, clips.rgb.shape[1]
    numbers = torch.arange(len(clips), device=device)
    every = torch.arange(frames, device=device).expand(len(clips), -1)
    images, depth, c2w, intrinsics = taken(clips, numbers, every)
    return images, c2w, intrinsics, depth


def _decoded(
    pipeline: Gen3RPipeline,
    latents: Tensor,  # [B, 16, f, h, w]
) -> Tensor:  # [B, F, 3, H, W] float32 in [0, 1]
    """`gen3r.stages.decode_appearance` of all rows at once."""
    vae = pipeline.wan_vae
    dtype = next(vae.model.decoder.parameters()).dtype
    video = vae.decode(latents.to(dtype), WORKING_GIB).float()
    return (video / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def _psnr(
    prediction: Tensor,  # [B, ...] in [0, 1]
    truth: Tensor,  # same
) -> float:
    """Mean over the clips of -10 log10 of the mean squared error."""
    error = (prediction - truth).square().flatten(1).mean(1).clamp(min=1e-10)
    return float((-10 * error.log10()).mean())
