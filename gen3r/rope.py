"""3D rotary position tables, plain or for two latents side by side on the width axis.

A head's channel pairs are shared out over time, height and width. Angles are computed in float64
and stored as float32 cosines and sines.
Sources: rotary embedding (arXiv 2104.09864), Wan2.1 (arXiv 2503.20314), Gen3R; behaviour 2.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Channel pairs for time, height, width: c - 2 (c // 3), c // 3, c // 3; c = head_dim / 2."""
    third = head_dim // 2 // 3
    return head_dim // 2 - 2 * third, third, third


@lru_cache(maxsize=8)
def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    side_by_side: bool | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:  # cos, sin, each [f * h * w, head_dim / 2] float32
    """Rotation angles of every token of a grid of f x h x w tokens, row-major.

    Pair i of an axis with n pairs turns by position * 10000^(-i / n). With `side_by_side` the
    column index restarts in the right half, so that both halves share their positions; None takes
    upstream's rule (h != w).

    Raises
    ------
    ValueError : an odd width asked for two halves.
    """
    frames, height, width = grid
    if side_by_side is None:
        side_by_side = height != width
    if side_by_side and width % 2:
        raise ValueError(
            f"token grid {grid} has an odd width and cannot hold two halves; "
            "pass side_by_side=False"
        )
    columns = torch.arange(width, device=device)
    if side_by_side:
        columns = columns % (width // 2)
    positions = (torch.arange(frames, device=device), torch.arange(height, device=device), columns)
    angles = []
    for axis, (position, pairs) in enumerate(zip(positions, axis_pairs(head_dim), strict=True)):
        frequency = THETA ** -(torch.arange(pairs, device=device, dtype=torch.float64) / pairs)
        shape = [1, 1, 1, pairs]
        shape[axis] = len(position)
        angles.append((position.double()[:, None] * frequency).view(shape).expand(*grid, pairs))
    table = torch.cat(angles, dim=-1).flatten(0, 2)
    return table.cos().float(), table.sin().float()
