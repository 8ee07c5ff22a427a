"""What goes into a batch of scenes and comes out of it, as stacked tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gen3r import cameras as camera_maths
from gen3r.scene import Cameras, SceneRequest


@dataclass(frozen=True)
class Generated:
    """N generated scenes; None: not asked for.

    rgb : [N, F, H, W, 3] uint8, on the device
    depth : [N, F, H, W] float32; w2c : [N, F, 4, 4] float32; intrinsics : [N, F, 3, 3] float32,
    pixels; all three on the host
    """

    rgb: Tensor | None
    depth: Tensor | None
    w2c: Tensor | None
    intrinsics: Tensor | None

    @property
    def video(self) -> Tensor:
        """`rgb`, which was asked for."""
        return _there(self.rgb, "rgb")

    @property
    def depths(self) -> Tensor:
        """`depth`, which was asked for."""
        return _there(self.depth, "depth")

    @property
    def poses(self) -> Tensor:
        """`w2c`, which was asked for."""
        return _there(self.w2c, "cameras")


def _there(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name} was not decoded; name it in `need`")
    return value


def stack_views(
    members: Sequence[SceneRequest], device: torch.device
) -> Tensor:  # [B, V, 3, H, W] float32 in [0, 1]
    """The given views of all requests.

    Raises
    ------
    ValueError : a view that is no uint8 tensor of the request's size.
    """
    first = members[0]
    used = first.num_frames if first.task == "allview" else len(first.images)
    rows = []
    for request in members:
        for image in request.images[:used]:
            wanted = (request.height, request.width, 3)
            if not isinstance(image, Tensor) or image.shape != wanted or image.is_floating_point():
                raise ValueError(
                    f"views must be uint8 tensors {list(wanted)}, the size of the request; "
                    "use Engine.generate for others"
                )
            rows.append(image.to(device))
    views = torch.stack(rows).unflatten(0, (len(members), used))
    return views.permute(0, 1, 4, 2, 3).float() / 255


def given_paths(
    members: Sequence[SceneRequest],
) -> tuple[Tensor, Tensor]:  # c2w [B, F, 4, 4] relative to the first, intrinsics [B, F, 3, 3]
    """The given camera paths of all requests."""
    paths = [r.cameras.head(r.num_frames) for r in members if isinstance(r.cameras, Cameras)]
    c2w = [camera_maths.relative_poses(camera_maths.invert_pose(p.extrinsics)) for p in paths]
    return torch.stack(c2w), torch.stack([p.intrinsics for p in paths])
