"""The arrows of a request: pure functions with named tensors in and out.

views -> `ViewLatents`, cameras -> Pluecker latents, latents + conditions -> joint latents ->
`Appearance` and `Geometry`. The reference pipeline calls them plainly; a faster runtime calls the
same functions.
Source: upstream's pipeline; behaviours 4, 7, 9, 10, 11, 14.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel

from gen3r import cameras as camera_maths
from gen3r.appearance_vae import AppearanceVAE
from gen3r.conditioning import camera_latents, control_latents, task_mask
from gen3r.encoders import encode_image, preprocess_clip, to_uint8
from gen3r.geometry_adapter import GeometryAdapter
from gen3r.scene import Cameras, SceneRequest
from gen3r.schedulers import Schedule
from gen3r.transformer import Conditions, RawConditions, WanTransformer
from gen3r.vggt import VGGT, bootstrap
from gen3r.vggt.tokens import token_views
from gen3r.video_autoencoder import WORKING_GIB
from gen3r_kernels import guidance_step, unproject

VAE_STRIDE = 8  # pixels per appearance latent
PATCH = 2  # latents per token, in rows and columns


def latent_grid(height: int, width: int) -> tuple[int, int]:
    """(h, w) of one half of the joint latents: an eighth of the pixels, up to whole patches.

    Odd multiples of 56 pixels have an odd latent size, which 2 x 2 patches do not divide: each half
    gets one row and column more, which is generated with the rest and cropped before decoding.
    """
    rows, columns = height // VAE_STRIDE, width // VAE_STRIDE
    return rows + rows % PATCH, columns + columns % PATCH


def latent_shape(
    num_frames: int, height: int, width: int, channels: int = 16
) -> tuple[int, int, int, int]:
    """(C, f, h, 2 w) of the joint latents [appearance | geometry] of one scene."""
    rows, columns = latent_grid(height, width)
    return channels, (num_frames - 1) // 4 + 1, rows, 2 * columns


def embed_views(
    model: CLIPVisionModel,
    first_views: Tensor,  # [B, 3, H, W] in [0, 1]
) -> Tensor:  # [B, 257, clip_dim]
    """CLIP features of the first given frame, through truncated uint8 (behaviour 12)."""
    pixels = preprocess_clip(to_uint8(first_views), model.config.image_size)
    return encode_image(model, pixels)


def encode_control(
    vae: AppearanceVAE,
    video: Tensor,  # [B, 3, F, H, W] in [0, 1], black where no view is given
    tasks: Sequence[str],
    noise: Tensor,  # [B, 16, f, h, w] of the posterior draw
    working_gib: float = WORKING_GIB,
) -> Tensor:  # [B, 20, f, h, 2 w] control latents and mask, dtype of the VAE's decoder
    """One draw from the posterior of the control video, the geometry half zero, and the task masks.

    h, w are those of `latent_grid`; a row or column that it adds repeats the last one.
    working_gib : memory for the encoder's activations.
    """
    dtype = vae.encoder_dtype
    # One clip at a time: the encoder's activations, not its weights, set the memory peak.
    with vae.encoder_products():
        samples = [
            vae.encode((clip[None] * 2 - 1).to(dtype), working_gib).sample(draw[None].to(dtype))
            for clip, draw in zip(video, noise, strict=True)
        ]
    appearance = torch.cat(samples).to(next(vae.model.decoder.parameters()).dtype)
    rows, columns = latent_grid(*video.shape[-2:])
    extra = (0, columns - appearance.shape[-1], 0, rows - appearance.shape[-2], 0, 0)
    appearance = F.pad(appearance, extra, mode="replicate")
    mask = task_mask(tasks, video.shape[2], rows, columns)
    return control_latents(appearance, mask.to(appearance.device))


def needs_vggt(request: SceneRequest) -> bool:
    """Whether the request's cameras take intrinsics and scene scale from VGGT on its views."""
    moves = isinstance(request.cameras, str) and request.cameras != "free"
    return moves and request.task != "allview"


def camera_path(
    request: SceneRequest,
    views: Tensor,  # [N, 3, H, W] in [0, 1]
    vggt: VGGT,
) -> Cameras | None:
    """The request's cameras relative to the first frame; None where the model gets none.

    Built-in moves take intrinsics and scene scale from VGGT on the views. ``free`` and ``allview``
    use no cameras, so VGGT is not run for them.
    """
    if request.task == "allview" or request.cameras == "free":
        return None
    if isinstance(request.cameras, Cameras):
        given = request.cameras.head(request.num_frames)
        c2w = camera_maths.relative_poses(camera_maths.invert_pose(given.extrinsics))
        return Cameras(camera_maths.invert_pose(c2w), given.intrinsics)
    intrinsics, scale = bootstrap(vggt, views[None].to(next(vggt.parameters()).dtype))
    c2w = camera_maths.trajectory(request.cameras, request.num_frames, float(scale[0]))
    return Cameras(
        camera_maths.invert_pose(c2w.double()),
        intrinsics[0].double().cpu().expand(request.num_frames, 3, 3),
    )


def encode_cameras(
    path: Cameras | None,
    num_frames: int,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:  # [1, 24, f, H, 2 W]
    """Packed Pluecker maps of a camera path, over the pixels of `latent_grid`; None gives zeros."""
    height, width = (VAE_STRIDE * n for n in latent_grid(height, width))
    if path is None:
        plucker = torch.zeros(num_frames, 6, height, width, device=device, dtype=dtype)
    else:
        c2w = camera_maths.invert_pose(path.extrinsics).to(device)
        k = path.intrinsics.to(device)
        # float64 until the model's cast (behaviour 17); frame by frame, 6 x H x W doubles each.
        plucker = torch.cat(
            [
                camera_maths.plucker_map(c2w[i : i + 1], k[i : i + 1], height, width).to(dtype)
                for i in range(num_frames)
            ]
        )
    return camera_latents(plucker[None])


StepCallback = Callable[[int, float, Tensor], Tensor | None]


def denoise(
    transformer: WanTransformer,
    conditions: Conditions | RawConditions,
    latents: Tensor,  # [B, 16, f, h, 2 w] float32 noise
    schedule: Schedule,
    guidance_scale: float,
    on_step: StepCallback | None = None,
) -> Tensor:  # [B, 16, f, h, 2 w] float32 joint latents
    """The denoising loop. With guidance the conditions hold 2 B rows, the negative ones first.

    `on_step(step, timestep, latents)` runs after each step and may return other latents.
    """
    guided = len(conditions.text) == 2 * len(latents)
    history: tuple[Tensor, ...] = ()
    for index, (timestep, step) in enumerate(zip(schedule.timesteps, schedule.steps, strict=True)):
        rows = torch.cat([latents, latents]) if guided else latents
        times = torch.full((len(rows),), timestep, device=latents.device)
        velocity = transformer(rows, times, conditions, side_by_side=True)
        uncond, cond = velocity.chunk(2) if guided else (None, velocity)
        latents, history = guidance_step(
            latents,
            uncond,
            cond,
            guidance_scale,
            step,
            history,
            backends=transformer.backends,
        )
        if on_step is not None:
            changed = on_step(index, timestep, latents)
            latents = latents if changed is None else changed
    return latents


def split_latents(
    latents: Tensor,  # [B, 16, f, h, 2 w] on `latent_grid`
    height: int,
    width: int,
) -> tuple[Tensor, Tensor]:  # appearance, geometry: [B, 16, f, height / 8, width / 8] each
    """Left half appearance, right half geometry, cropped to the pixels' own latent size."""
    rows, columns = height // VAE_STRIDE, width // VAE_STRIDE
    appearance, geometry = latents[..., :rows, :].chunk(2, dim=-1)
    return appearance[..., :columns], geometry[..., :columns]


def decode_appearance(
    vae: AppearanceVAE,
    latents: Tensor,  # [B, 16, f, h, w]
    working_gib: float = WORKING_GIB,
) -> Tensor:  # [B, F, H, W, 3] float32 in [0, 1]
    """RGB video of the appearance latents, one scene at a time.

    working_gib : memory for the decoder's activations.
    """
    dtype = next(vae.model.decoder.parameters()).dtype
    videos = [vae.decode(row[None].to(dtype), working_gib).float() for row in latents]
    return (torch.cat(videos) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)


GEOMETRY = ("depth", "cameras", "points", "point_maps", "tokens")  # what can be decoded
SCENE_GEOMETRY = frozenset({"depth", "cameras", "points"})  # what a scene is made of


def scene_geometry(point_maps: bool = False) -> frozenset[str]:
    """What to decode for a scene, with the point head's maps where they are asked."""
    return SCENE_GEOMETRY | {"point_maps"} if point_maps else SCENE_GEOMETRY


@dataclass(frozen=True)
class Geometry:
    """What the heads read off the geometry latents; None where it was not asked.

    pose_encoding : [B, F, 9]; extrinsics : [B, F, 3, 4] world to camera; intrinsics : [B, F, 3, 3]
    depth, confidence : [B, F, H, W] float32
    points : [B, F, H, W, 3] float64 world; mask : [B, F, H, W] bool
    point_map, point_confidence : [B, F, H, W, 3] and [B, F, H, W] of the point head
    tokens : [B, F, h, w, 10 C] the decoded token map
    """

    pose_encoding: Tensor | None = None
    extrinsics: Tensor | None = None
    intrinsics: Tensor | None = None
    depth: Tensor | None = None
    confidence: Tensor | None = None
    points: Tensor | None = None
    mask: Tensor | None = None
    point_map: Tensor | None = None
    point_confidence: Tensor | None = None
    tokens: Tensor | None = None


def decode_geometry(
    adapter: GeometryAdapter,
    vggt: VGGT,
    latents: Tensor,  # [B, 16, f, h, w]
    height: int,
    width: int,
    *,
    need: Collection[str] = SCENE_GEOMETRY,
    working_gib: float = WORKING_GIB,
) -> Geometry:
    """What is asked of the geometry latents, one scene at a time; a head not needed does not run.

    Parameters
    ----------
    need : of ``depth`` (with its confidence), ``cameras``, ``points`` (with their mask; they take
        depth and cameras along), ``point_maps`` (the point head's), ``tokens``.
    working_gib : memory for the adapter's activations.

    Raises
    ------
    ValueError : a name that is none of these.
    """
    unknown = sorted(set(need) - set(GEOMETRY))
    if unknown:
        raise ValueError(
            f"decode_geometry: {', '.join(unknown)} cannot be decoded; known: {', '.join(GEOMETRY)}"
        )
    wanted = frozenset(need)
    if "points" in wanted:
        wanted |= {"depth", "cameras"}
    dtype = next(adapter.parameters()).dtype
    rows = []
    for row in latents:
        tokens = adapter.decode(row[None].to(dtype), working_gib).permute(0, 2, 3, 4, 1)
        rows.append(read_heads(vggt, tokens, height, width, wanted))
    if len(rows) == 1:
        return rows[0]
    stacked: dict[str, Any] = {}
    for name in Geometry.__dataclass_fields__:
        values = [getattr(row, name) for row in rows]
        stacked[name] = None if values[0] is None else torch.cat(values)
    return Geometry(**stacked)


def read_heads(
    vggt: VGGT,
    tokens: Tensor,  # [1, F, h, w, 10 C], any strides
    height: int,
    width: int,
    need: frozenset[str] = SCENE_GEOMETRY,  # with ``points`` also ``depth`` and ``cameras``
) -> Geometry:
    """Depth, cameras, world points and masks of a decoded token map; see `decode_geometry`."""
    found: dict[str, Tensor] = {}
    layers, camera = token_views(tokens)
    # The dense heads first: while they keep a GPU busy, the many small kernels of the camera head
    # are launched behind them.
    if "depth" in need:
        depth, confidence = vggt.depth_head(layers, height, width, patch_start_idx=0)
        found.update(depth=depth.squeeze(-1), confidence=confidence)
    if "point_maps" in need:
        maps = vggt.point_head(layers, height, width, patch_start_idx=0)
        found.update(point_map=maps[0], point_confidence=maps[1])
    if "cameras" in need:
        encoding = vggt.camera_head(camera)[-1].float()
        extrinsics, intrinsics = camera_maths.decode_pose(encoding, height, width)
        found.update(pose_encoding=encoding, extrinsics=extrinsics, intrinsics=intrinsics)
    if "points" in need:
        near, far = camera_maths.depth_bounds(found["depth"])
        points, mask = unproject(
            found["depth"], extrinsics, intrinsics, near, far, backends=vggt.backends
        )
        # A field of view of 0 means an infinite focal length, whose points mean nothing.
        finite = intrinsics.isfinite().all(-1).all(-1)
        mask = mask & finite[..., None, None] & points.isfinite().all(-1)
        found.update(points=points, mask=mask)
    if "tokens" in need:
        found["tokens"] = tokens
    return Geometry(**found)
