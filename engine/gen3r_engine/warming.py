"""What makes the first scene of a process quick: code compiled beforehand, and whether it is."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen3r import stages
from gen3r.pipeline import Gen3RPipeline
from gen3r.run import join_inputs
from gen3r.scene import SceneRequest
from gen3r.schedulers import make_schedule
from gen3r.transformer import RawConditions
from gen3r_engine.caches import CacheFolder, WarmKey
from gen3r_engine.denoiser import Denoiser
from gen3r_engine.fusion import FusionConfig
from gen3r_engine.planned import PlannedSteps
from gen3r_engine.scene_batches import Batch, Sampling
from gen3r_engine.scene_stages import SceneStages

Shape = tuple[int, int, int, int]  # frames, height, width, batch
TEXT_TOKENS = 16  # any number: the step does not depend on it


@dataclass
class Warmth:
    """Which shapes of an engine's denoising step the compile cache knew before they first ran.

    gpu : the device's name. enabled : whether anything is compiled at all.
    """

    folder: CacheFolder
    pipeline: Gen3RPipeline
    gpu: str
    preset: str
    attention: str
    enabled: bool
    _before: dict[Shape, str] = field(default_factory=dict)

    def key(self, shape: Shape) -> WarmKey:
        """What the compiled code of a shape depends on."""
        frames, height, width, batch = shape
        model = hashlib.sha256(repr(self.pipeline.config.transformer).encode()).hexdigest()[:16]
        dtype = str(self.pipeline.dtype).removeprefix("torch.")
        return WarmKey(
            gpu=self.gpu,
            preset=self.preset,
            dtype=dtype,
            attention=self.attention,
            frames=frames,
            height=height,
            width=width,
            batch=batch,
            model=model,
        )

    def before(self, shape: Shape) -> str:
        """``warm``, ``cold``, or ``none`` where nothing is compiled, as it was when first asked."""
        if shape not in self._before:
            known = self.enabled and self.folder.warm(self.key(shape)) is not None
            self._before[shape] = ("warm" if known else "cold") if self.enabled else "none"
        return self._before[shape]

    def done(self, shape: Shape, facts: dict[str, Any]) -> None:
        """Note that the shape's code is in the cache. A disk that takes no note costs a warning."""
        if self.before(shape) != "cold" or self.folder.warm(self.key(shape)) is not None:
            return
        try:
            self.folder.mark_warm(self.key(shape), facts)
        except OSError as error:
            warnings.warn(f"the compile cache's note can not be written ({error})", stacklevel=2)


@torch.no_grad()
def run_once(
    pipeline: Gen3RPipeline,
    denoiser: Denoiser,
    shape: Shape,
    *,
    guidance: float = 5.0,
    steps: PlannedSteps | None = None,
) -> dict[str, float]:
    """One denoising step of a shape on made-up conditions: compiles, captures, fills caches.

    steps : the plans that the shape's steps run from, None for the transformer.

    Returns seconds: ``first`` with all of that, ``step`` of a second run.
    """
    frames, height, width, batch = shape
    given = made_up_conditions(pipeline, shape, guided=guidance > 1)
    run: Callable[..., Tensor]
    if steps is None:
        views = (given.image, given.control, given.cameras)
        run = partial(denoiser.run, pipeline.transformer.condition(given.text, *views))
        del views
    else:
        run = partial(denoiser.run_planned, steps, given)
    del given
    size = stages.latent_shape(frames, height, width, pipeline.config.transformer.out_dim)
    noise = torch.zeros(batch, *size, device=pipeline.device)
    schedule = make_schedule("euler", 1, euler=pipeline.scheduler)
    seconds = {}
    for name in ("first", "step"):
        start = time.perf_counter()
        run(noise, schedule, guidance)
        if pipeline.device.type == "cuda":
            torch.cuda.current_stream(pipeline.device).synchronize()
        seconds[name] = time.perf_counter() - start
    return seconds


def rehearse(scenes: SceneStages, frames: int, height: int, width: int) -> float:
    """Encode, decode and fuse a made-up scene, without text, so that their kernels are compiled.

    Returns seconds.
    """
    start = time.perf_counter()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    # A built-in camera path, so that VGGT runs too.
    request = SceneRequest(
        [noise], cameras="zoom_in", num_frames=frames, height=height, width=width
    )
    pipeline, device = scenes.pipeline, scenes.device
    batch = Batch((0,), (request,), device)
    schedule = make_schedule("euler", 1, euler=pipeline.scheduler)
    sampling = Sampling(schedule, guidance=1.0, fusion=FusionConfig())
    width_of_text = pipeline.config.transformer.text_dim
    text = torch.zeros(TEXT_TOKENS, width_of_text, device=device, dtype=pipeline.dtype)
    encoded = scenes.views(batch, sampling, [text])
    scenes.decode(batch, 0, encoded.noise, sampling).copy.wait()
    return time.perf_counter() - start


def made_up_conditions(pipeline: Gen3RPipeline, shape: Shape, guided: bool) -> RawConditions:
    """Conditions of the right form without content, for which no encoder has to be there."""
    frames, height, width, batch = shape
    config, device, dtype = pipeline.config, pipeline.device, pipeline.dtype
    vision = config.clip_image_encoder
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    channels, *grid = stages.latent_shape(frames, height, width, config.transformer.out_dim)
    control = torch.zeros(
        batch, config.transformer.in_dim - channels, *grid, device=device, dtype=dtype
    )
    image = torch.zeros(batch, tokens, config.transformer.clip_dim, device=device, dtype=dtype)
    camera = stages.encode_cameras(None, frames, height, width, device, dtype)
    text = torch.zeros(TEXT_TOKENS, config.transformer.text_dim, device=device, dtype=dtype)
    rows = [text] * (2 * batch if guided else batch)
    return join_inputs(rows, image, control, torch.cat([camera] * batch))
