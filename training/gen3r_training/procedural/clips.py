"""Clips as tensors: pictures, exact depth, object ids, cameras, captions and parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gen3r_training.procedural.captions import Part

NO_OBJECT = 255


@dataclass(frozen=True)
class Clips:
    """N clips of F frames. The world is the first camera; its points' mean distance is 1.

    rgb : uint8 [N, F, H, W, 3], sRGB
    depth : float16 [N, F, H, W], along the optical axis through the pixel's centre; 0: none (sky)
    objects : uint8 [N, F, H, W], index into the clip's parts; 255: none
    c2w : float32 [N, F, 4, 4], camera to world, OpenCV axes, the first one the identity
    intrinsics : float32 [N, 3, 3], pixels, principal point at W / 2, H / 2
    moves : a name of gen3r.scene.TRAJECTORIES, or "random"
    """

    rgb: Tensor
    depth: Tensor
    objects: Tensor
    c2w: Tensor
    intrinsics: Tensor
    captions: tuple[str, ...]
    parts: tuple[tuple[Part, ...], ...]
    moves: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rgb)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        return {name: getattr(self, name) for name in TENSORS}

    def to(self, device: torch.device | str) -> Clips:
        """The same clips on a device."""
        moved = {name: value.to(device) for name, value in self.tensors().items()}
        return Clips(**moved, captions=self.captions, parts=self.parts, moves=self.moves)

    def take(self, indices: Sequence[int] | Tensor) -> Clips:
        """Some clips, in the order of `indices`."""
        chosen = [int(i) for i in indices]
        index = torch.tensor(chosen, dtype=torch.long, device=self.rgb.device)
        return Clips(
            **{name: value[index] for name, value in self.tensors().items()},
            captions=tuple(self.captions[i] for i in chosen),
            parts=tuple(self.parts[i] for i in chosen),
            moves=tuple(self.moves[i] for i in chosen),
        )

    @staticmethod
    def cat(clips: Sequence[Clips]) -> Clips:
        """All clips of a list, which must agree in frames, size and device.

        Raises
        ------
        ValueError : an empty list, or clips of different frames or sizes.
        """
        if not clips:
            raise ValueError("there are no clips to join; give at least one")
        shapes = {tuple(one.rgb.shape[1:]) for one in clips}
        if len(shapes) > 1:
            raise ValueError(f"clips of {sorted(shapes)} (frames, height, width, 3) do not join")
        return Clips(
            **{name: torch.cat([getattr(one, name) for one in clips]) for name in TENSORS},
            captions=tuple(text for one in clips for text in one.captions),
            parts=tuple(part for one in clips for part in one.parts),
            moves=tuple(move for one in clips for move in one.moves),
        )


TENSORS = ("rgb", "depth", "objects", "c2w", "intrinsics")
