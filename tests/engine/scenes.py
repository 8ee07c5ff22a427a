"""A made-up scene for tests: a textured slope in front of a camera that moves sideways."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gen3r.config import GEN3R
from gen3r.scene import Scene, SceneRequest
from gen3r_engine.config import EngineConfig
from gen3r_engine.events import Event
from gen3r_engine.presets import PresetChoice, resolve


def made_scene(frames: int = 5, height: int = 56, width: int = 56, seed: int = 0) -> Scene:
    """A scene with exact geometry: depth, points and cameras agree."""
    focal = float(width)
    v, u = np.mgrid[0:height, 0:width].astype(np.float64)
    depth = np.stack([2.0 + 0.02 * v + 0.01 * i for i in range(frames)])
    k = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    extrinsics = np.repeat(np.eye(4)[None], frames, axis=0)
    extrinsics[:, 0, 3] = -0.05 * np.arange(frames)
    local = np.stack([(u - width / 2) / focal, (v - height / 2) / focal, np.ones_like(u)], -1)
    points = depth[..., None] * local - extrinsics[:, None, None, :3, 3]
    shade = (40 * np.sin(u / 5) + 3 * v + 20 * seed) % 256
    rgb = np.stack([np.stack([shade, 255 - shade, v * 4 % 256], -1)] * frames).astype(np.uint8)
    mask = np.ones(depth.shape, dtype=bool)
    mask[:, :4] = False
    return Scene(
        rgb=torch.from_numpy(rgb),
        depth=torch.from_numpy(depth).float(),
        depth_confidence=torch.ones(depth.shape),
        extrinsics=torch.from_numpy(extrinsics).float(),
        intrinsics=torch.from_numpy(np.repeat(k[None], frames, axis=0)).float(),
        points=torch.from_numpy(points),
        mask=torch.from_numpy(mask),
        info={"seconds": {"encode text": 0.25, "denoise": 1.5}, "solver": "euler"},
    )


@dataclass
class MadeModel:
    """What the command line asks a pipeline about itself."""

    untrained: bool = True
    config: Any = GEN3R


@dataclass
class MadeEngine:
    """Answers as an engine does, with made-up scenes, and keeps what it was asked."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    requests: list[SceneRequest] = field(default_factory=list)
    raises: BaseException | None = None
    fails_at: int = 0
    pipeline: MadeModel = field(default_factory=MadeModel)
    config: EngineConfig = field(default_factory=EngineConfig)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    notes: list[str] = field(default_factory=lambda: ["a note of the engine"])
    plans: None = None

    @property
    def choice(self) -> PresetChoice:
        return resolve(self.config)

    def stream(
        self,
        requests: Sequence[SceneRequest],
        *,
        on_event: Callable[[Event], None],
        **settings: Any,
    ) -> Generator[Scene, None, None]:
        self.calls.append(settings)
        self.requests += requests
        for index, request in enumerate(requests):
            on_event(Event("progress", index, "denoise", 0, 2))
            if self.raises is not None and index == self.fails_at:
                raise self.raises
            on_event(Event("progress", index, "denoise", 2, 2))
            scene = made_scene(request.num_frames, request.height, request.width, request.seed)
            guidance = settings["guidance"]
            used = self.pipeline.config.guidance_scale if guidance is None else guidance
            scene.info.update(index=index, batch=1, guidance_scale=used)
            yield scene
