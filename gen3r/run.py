"""What one call needs beside the model: progress, timing, noise, inputs, the finished scene.

`Gen3RPipeline` and the engine's runtime call the same functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gen3r import stages
from gen3r.cameras import to_homogeneous
from gen3r.conditioning import control_video, prepare_views
from gen3r.scene import Scene, SceneRequest
from gen3r.stages import Geometry, latent_shape
from gen3r.transformer import Conditions, RawConditions, WanTransformer
from gen3r.vggt import VGGT

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass
class Run:
    """Book-keeping of one call: seconds per stage and progress events."""

    device: torch.device
    progress: Progress | None
    seconds: dict[str, float] = field(default_factory=dict)

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell the caller's `progress`, if there is one."""
        if self.progress is not None:
            self.progress(stage, done, total)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Time a stage, the GPU's queue included; yields a function that reports progress."""
        self.report(name, 0, total)
        start = time.perf_counter()
        yield lambda done: self.report(name, done, total)
        if self.device.type == "cuda":  # this stage's stream; others may go on
            torch.cuda.current_stream(self.device).synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.report(name, total, total)


@contextmanager
def full_float32(active: bool) -> Iterator[None]:
    """Inside, float32 on a GPU means float32 and not TF32 (torch lets convolutions use it)."""
    if not active:
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def draw_noise(
    requests: Sequence[SceneRequest],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Tensor | None,  # [B, C, f, h, 2 w], or None to draw
    posterior_noise: Tensor | None,  # [B, C, f, H / 8, W / 8], or None to draw
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [B, C, f, h, 2 w] float32, [B, C, f, H / 8, W / 8]
    """Initial noise and posterior draws, per request in upstream's order and dtype.

    Raises
    ------
    ValueError : another number of generators than of requests, or tensors of another shape.
    """
    if generator is None:
        generators = [torch.Generator(device).manual_seed(r.seed) for r in requests]
    elif isinstance(generator, torch.Generator):
        generators = [generator] * len(requests)
    else:
        generators = list(generator)
    if len(generators) != len(requests):
        raise ValueError(f"{len(generators)} generators for {len(requests)} requests")
    first = requests[0]
    shape = latent_shape(first.num_frames, first.height, first.width, channels)
    half = (*shape[:2], first.height // 8, first.width // 8)
    noise, draws = [], []
    for g in generators:
        if latents is None:
            noise.append(_normal(shape, g, device, dtype))
        if posterior_noise is None:
            draws.append(_normal(half, g, device, dtype))
    start = torch.stack(noise) if latents is None else latents
    posterior = torch.stack(draws) if posterior_noise is None else posterior_noise
    for name, value, expected in (
        ("latents", start, shape),
        ("posterior_noise", posterior, half),
    ):
        if value.shape != (len(requests), *expected):
            raise ValueError(
                f"{name} has shape {list(value.shape)}, expected {[len(requests), *expected]}"
            )
    return start.to(device, torch.float32), posterior.to(device)


def _normal(
    shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Noise drawn on the generator's own device, then moved."""
    drawn = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    return drawn.to(device)


def text_rows(requests: Sequence[SceneRequest], guided: bool) -> list[str]:
    """The text of every row of a batch: with guidance the negative prompts first."""
    negative = [r.negative_prompt for r in requests] if guided else []
    return negative + [r.prompt for r in requests]


def prepare_request(
    request: SceneRequest,
    vggt: VGGT,  # run only where `stages.needs_vggt`
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # [3, F, H, W] in [0, 1], [1, 24, f, H, 2 W]
    """A request's control video, black where no view is given, and its packed camera maps."""
    frames, height, width = request.num_frames, request.height, request.width
    # An all-view request may hold more frames than it uses.
    used = request.images[:frames] if request.task == "allview" else request.images
    views = prepare_views(used, height, width).to(device)
    path = stages.camera_path(request, views, vggt)
    video = control_video(views, request.task or "", frames)
    return video, stages.encode_cameras(path, frames, height, width, device, dtype)


def join_conditions(
    transformer: WanTransformer,
    texts: Sequence[Tensor],  # per row of `text_rows`, [n_i, text_dim]
    image: Tensor,  # [B, 257, clip_dim]
    control: Tensor,  # [B, 20, f, h, 2 w]
    cameras: Tensor,  # [B, 24, f, H, 2 W]
) -> Conditions:
    """Project a batch's inputs; with guidance both rows of a scene get the same views."""
    given = join_inputs(texts, image, control, cameras)
    return transformer.condition(given.text, given.image, given.control, given.cameras)


def join_inputs(
    texts: Sequence[Tensor],  # per row of `text_rows`, [n_i, text_dim]
    image: Tensor,  # [B, 257, clip_dim]
    control: Tensor,  # [B, 20, f, h, 2 w]
    cameras: Tensor,  # [B, 24, f, H, 2 W]
) -> RawConditions:
    """A batch's inputs by rows; with guidance both rows of a scene get the same views."""
    repeats = len(texts) // len(image)
    image, control, cameras = (torch.cat([x] * repeats) for x in (image, control, cameras))
    return RawConditions(texts, image, control, cameras)


def to_bytes(
    rgb: Tensor,  # [..., 3] in [0, 1]
) -> Tensor:  # same shape, uint8
    """Truncated, not rounded, as upstream's rgb.mp4."""
    return (rgb * 255).to(torch.uint8)


def scene_facts(
    request: SceneRequest, dtype: torch.dtype, device: torch.device, run: Run
) -> dict[str, Any]:
    """`Scene.info` of one request: what was asked, where it ran, seconds per stage, memory."""
    return {
        "task": request.task,
        "seed": request.seed,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_frames": request.num_frames,
        "height": request.height,
        "width": request.width,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device_name(device),
        "seconds": run.seconds,
        "peak_memory_gib": peak_memory(device),
    }


def scene_tensors(
    rgb: Tensor,  # [F, H, W, 3] uint8
    g: Geometry,  # of a batch of one
) -> dict[str, Tensor | None]:
    """The arrays of a `Scene` by name, wherever they were computed; None: not decoded."""

    def first(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[0]

    return {
        "rgb": rgb,
        "depth": first(g.depth),
        "depth_confidence": first(g.confidence),
        "extrinsics": None if g.extrinsics is None else to_homogeneous(g.extrinsics[0]),
        "intrinsics": first(g.intrinsics),
        "points": first(g.points),
        "mask": first(g.mask),
        "point_map": first(g.point_map),
        "point_confidence": first(g.point_confidence),
    }


def to_scene(
    rgb: Tensor,  # [F, H, W, 3] uint8
    g: Geometry,  # of a batch of one
) -> Scene:
    """Gather one request's results on the host."""
    arrays: dict[str, Any] = {
        name: None if value is None else value.cpu()
        for name, value in scene_tensors(rgb, g).items()
    }
    return Scene(**arrays)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on the GPU during this call, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    import resource  # POSIX only

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
