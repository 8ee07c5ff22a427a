"""A made-up scene for tests: a textured slope in front of a camera that moves sideways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gen3r.config import GEN3R
from gen3r.scene import Scene, SceneRequest


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
class MadePipeline:
    """Answers as a pipeline does, with made-up scenes, and keeps what it was asked."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    requests: list[SceneRequest] = field(default_factory=list)
    built_with: dict[str, Any] = field(default_factory=dict)
    raises: BaseException | None = None
    untrained: bool = True
    config: Any = GEN3R

    def __call__(
        self,
        *,
        requests: Sequence[SceneRequest],
        progress: Callable[[str, int, int], None],
        **settings: Any,
    ) -> list[Scene]:
        self.calls.append({"batch": len(requests), **settings})
        self.requests += requests
        progress("denoise", 0, 2)
        if self.raises is not None:
            raise self.raises
        progress("denoise", 2, 2)
        return [made_scene(r.num_frames, r.height, r.width, r.seed) for r in requests]
