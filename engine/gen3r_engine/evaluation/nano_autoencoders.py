"""Parts of the nano suite without the diffusion transformer: the VAE, VGGT, and the adapter."""

from __future__ import annotations

import torch
from torch import Tensor

from gen3r import stages
from gen3r.cameras import decode_pose, to_homogeneous
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.run import full_float32, to_bytes
from gen3r.vggt import VGGT, token_map
from gen3r_engine.evaluation import measures
from gen3r_engine.evaluation.figures import Figure
from gen3r_engine.evaluation.held_out import chunks
from gen3r_engine.evaluation.nano_context import Context

VAE_BAR = 27.0  # dB
INCREASE_BAR = 0.03  # of depth AbsRel through the adapter
HEADS = frozenset({"depth", "cameras"})


@torch.no_grad()
def vae_part(context: Context) -> list[Figure]:
    """Reconstruction by the appearance VAE: encode, take the mean, decode."""
    pipeline, truth = context.engine.pipeline, context.clips.rgb
    gib = context.engine.choice.working_gib
    videos = []
    with (
        full_float32(pipeline.dtype == torch.float32),
        context.engine.model.residency.use("wan_vae") as vae,
        vae.encoder_products(),
    ):
        for rows in chunks(len(truth), context.sampler.batch):
            frames = truth[rows].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
            mean = vae.encode(frames.to(vae.encoder_dtype), gib).mean
            video = vae.decode(mean.to(pipeline.dtype), gib).float()
            videos.append(to_bytes((video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)))
            context.told("vae", rows.stop, len(truth))
    found = torch.cat(videos)
    context.keep("vae", found, None)
    first = measures.repeat_first(truth)
    lpips, note = measures.frame_lpips(found, truth)
    return [
        Figure(
            *("vae", "PSNR", "dB", measures.frame_psnr(found, truth), VAE_BAR),
            baselines={"first frame": measures.frame_psnr(first, truth)},
        ),
        Figure(
            *("vae", "SSIM", "", measures.frame_ssim(found, truth)),
            baselines={"first frame": measures.frame_ssim(first, truth)},
        ),
        Figure("vae", "LPIPS", "", lpips, at_least=False, note=note),
    ]


@torch.no_grad()
def geometry_parts(context: Context, wanted: frozenset[str]) -> list[Figure]:
    """VGGT on the true frames (``vggt``), and behind the adapter's round trip (``adapter``)."""
    own = [list[Tensor](), list[Tensor]()]
    through = [list[Tensor](), list[Tensor]()]
    truth, dtype = context.clips.rgb, context.engine.pipeline.dtype
    modules = context.engine.model.residency.use("geo_adapter", "vggt")
    with full_float32(dtype == torch.float32), modules as (adapter, vggt):
        special = vggt.aggregator.num_special_tokens
        patch = vggt.config.patch_size
        for rows in chunks(len(truth), context.sampler.batch):
            frames = (truth[rows].permute(0, 1, 4, 2, 3).float() / 255).to(dtype)
            height, width = frames.shape[-2:]
            tokens = vggt.aggregator(frames)
            depth, _ = vggt.depth_head(tokens, height, width, special)
            pose = vggt.camera_head(tokens[-1])[-1].float()
            own[0].append(depth.squeeze(-1).cpu())
            own[1].append(to_homogeneous(decode_pose(pose, height, width)[0]).cpu())
            if "adapter" in wanted:
                grid = token_map(tokens, height // patch, width // patch, special)
                found = _round_trip(context, adapter, vggt, grid, height, width)
                through[0].append(found[0])
                through[1].append(found[1])
            context.told("vggt, adapter", rows.stop, len(truth))
    depth, poses = (torch.cat(x) for x in own)
    depth_error = measures.depth_errors(depth, context.true_depth)
    auc = measures.pose_aucs(poses, context.true_w2c)
    figures = _geometry_figures(context, "vggt", depth_error, auc) if "vggt" in wanted else []
    if "adapter" in wanted:
        depth, poses = (torch.cat(x) for x in through)
        behind = measures.depth_errors(depth, context.true_depth)
        behind_auc = measures.pose_aucs(poses, context.true_w2c)
        increase = measures.differences(behind, depth_error)
        figures += [
            *_geometry_figures(context, "adapter", behind, behind_auc),
            Figure(
                *("adapter", "depth AbsRel, increase over VGGT's", "", increase),
                *(INCREASE_BAR, False),
            ),
        ]
        context.keep("adapter", None, depth)
    return figures


def _round_trip(
    context: Context,
    adapter: GeometryAdapter,
    vggt: VGGT,
    tokens: Tensor,  # [B, F, h, w, 10 C]
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # depth [B, F, H, W], w2c [B, F, 4, 4], on the host
    gib = context.engine.choice.working_gib
    latents = adapter.encode(tokens.permute(0, 4, 1, 2, 3), gib).mean
    decoded = adapter.decode(latents, gib).permute(0, 2, 3, 4, 1)
    g = stages.read_heads(vggt, decoded, height, width, HEADS)
    assert g.depth is not None and g.extrinsics is not None
    return g.depth.cpu(), to_homogeneous(g.extrinsics).cpu()


def _geometry_figures(
    context: Context, part: str, depth: tuple[float, ...], auc: tuple[float, ...]
) -> list[Figure]:
    return [
        Figure(
            *(part, "depth AbsRel", "", depth),
            at_least=False,
            baselines=context.depth_baselines,
        ),
        *context.pose_figures(part, "pose AUC@30", auc),
    ]
