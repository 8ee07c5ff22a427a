"""From what is asked to what the transformer is given: images, masks, control and camera latents.

Source: upstream's pipeline and the Wan2.1-Fun control-camera layout; behaviours 5, 9, 12 and 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gen3r.media import to_rgb
from gen3r.scene import ImageLike


def image_tensor(image: ImageLike) -> Tensor:  # [3, H, W] float32 in [0, 1]
    """One image as a tensor. Grey becomes RGB; transparency is laid on white.

    Raises
    ------
    ValueError : an array that is neither uint8 [H, W], [H, W, 1, 3 or 4] nor float [3, H, W].
    """
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"float image must be [3, H, W] in [0, 1], got {list(image.shape)}")
        return image.float()
    if not isinstance(image, Image.Image):
        image = _as_pil(np.asarray(image.cpu() if isinstance(image, Tensor) else image))
    return torch.from_numpy(to_rgb(image)).permute(2, 0, 1).float() / 255


def _as_pil(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"image must be uint8 [H, W], [H, W, 3] or [H, W, 4], got {pixels.dtype} {pixels.shape}"
        )
    if pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    return Image.fromarray(np.ascontiguousarray(pixels))


def center_crop(
    frames: Tensor,  # [..., H, W]
    height: int,
    width: int,
) -> Tensor:  # [..., min(H, height), min(W, width)]
    """Crop around the centre with floor offsets; an axis that is smaller stays as it is."""
    top = max(frames.shape[-2] - height, 0) // 2
    left = max(frames.shape[-1] - width, 0) // 2
    return frames[..., top : top + height, left : left + width]


def resize_to_cover(
    frames: Tensor,  # [N, 3, H, W] float
    height: int,
    width: int,
) -> Tensor:  # [N, 3, >= height, >= width]
    """Scale to just cover height x width (bilinear, antialiased, rounding half to even)."""
    source_height, source_width = frames.shape[-2:]
    scale = max(height / source_height, width / source_width)
    # max() guards against the last ulp of scale * extent.
    target = (
        max(round(source_height * scale), height),
        max(round(source_width * scale), width),
    )
    if target == (source_height, source_width):
        return frames
    return F.interpolate(frames, target, mode="bilinear", align_corners=False, antialias=True)


def resize_center_crop(
    frames: Tensor,  # [N, 3, H, W] float
    height: int,
    width: int,
) -> Tensor:  # [N, 3, height, width]
    """Resize to cover, then crop the centre (behaviour 16)."""
    return center_crop(resize_to_cover(frames, height, width), height, width)


def prepare_views(
    images: Sequence[ImageLike],
    height: int,
    width: int,
) -> Tensor:  # [N, 3, height, width] float32 in [0, 1]
    """Every image resized and cropped by itself, so views may differ in size."""
    return torch.cat(
        [resize_center_crop(image_tensor(image)[None], height, width) for image in images]
    )


def given_frames(task: str, num_frames: int) -> list[int]:
    """Indices of the output frames that the task's views occupy.

    Raises
    ------
    ValueError : an unknown task.
    """
    if task == "1view":
        return [0]
    if task == "2view":
        return [0, num_frames - 1]
    if task == "allview":
        return list(range(num_frames))
    raise ValueError(f"task '{task}' is unknown; known: 1view, 2view, allview")


def control_video(
    views: Tensor,  # [N, 3, H, W] in [0, 1]
    task: str,
    num_frames: int,
) -> Tensor:  # [3, F, H, W] in [0, 1], black where no view is given
    """The views at their frames; allview takes the first `num_frames` of them.

    Raises
    ------
    ValueError : a number of views that does not fit the task.
    """
    frames = given_frames(task, num_frames)
    if len(views) < len(frames) or (task != "allview" and len(views) != len(frames)):
        raise ValueError(f"task {task} takes {len(frames)} views, {len(views)} given")
    video = views.new_zeros(num_frames, *views.shape[1:])
    video[frames] = views[: len(frames)]
    return video.transpose(0, 1)


def repeat_first_frame(
    video: Tensor,  # [B, C, F, H, W]
) -> Tensor:  # [B, C, F + 3, H, W]
    """The first frame four times: the first latent frame stands for one frame, the rest for 4."""
    return torch.cat([video[:, :, :1].expand(-1, -1, 4, -1, -1), video[:, :, 1:]], dim=2)


def pack_time(
    video: Tensor,  # [B, C, F, H, W], F = 4k + 1
) -> Tensor:  # [B, 4 C, k + 1, H, W], channel c * 4 + t
    """Fold groups of four frames into channels, the first frame repeated four times."""
    grouped = repeat_first_frame(video).unflatten(2, (-1, 4))
    return grouped.transpose(2, 3).flatten(1, 2)


def task_mask(
    tasks: Sequence[str],
    num_frames: int,
    latent_height: int,
    latent_width: int,
) -> Tensor:  # [B, 4, f, h, 2 w] float32
    """1 on the left (appearance) half of the given frames, 0 elsewhere."""
    mask = torch.zeros(len(tasks), 1, num_frames, 1, 1)
    for row, task in zip(mask, tasks, strict=True):
        row[:, given_frames(task, num_frames)] = 1
    left = pack_time(mask).expand(-1, -1, -1, latent_height, latent_width)
    return torch.cat([left, torch.zeros_like(left)], dim=-1)


def control_latents(
    appearance: Tensor,  # [B, 16, f, h, w] latents of the control video
    mask: Tensor,  # [B, 4, f, h, 2 w]
    geometry: Tensor | None = None,  # [B, 16, f, h, w]; zeros at inference
) -> Tensor:  # [B, 20, f, h, 2 w]
    """[appearance | geometry] along the width, then the mask as 4 more channels (behaviour 9)."""
    right = torch.zeros_like(appearance) if geometry is None else geometry
    return torch.cat([torch.cat([appearance, right], dim=-1), mask.to(appearance)], dim=1)


def camera_latents(
    plucker: Tensor,  # [B, F, 6, H, W]
) -> Tensor:  # [B, 24, f, H, 2 W]
    """Pluecker maps packed over time, the same for both halves of the joint latents."""
    packed = pack_time(plucker.transpose(1, 2))
    return torch.cat([packed, packed], dim=-1)
