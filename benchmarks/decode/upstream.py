"""Upstream's way of computing the stages, on the weights of our modules: provider `eager`.

Separate PyTorch operators in the model's dtype on channels-first memory, one latent frame at a
time, position signals made anew for every chunk of 8 frames. Modules that are built with
`operators="reference"` already run so but for their norms, which compute in float32, and for the
dense heads, whose operations are ordered otherwise; both are here as upstream has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gen3r import causal_layers
from gen3r.cameras import decode_pose
from gen3r.vggt import VGGT, token_list
from gen3r.vggt.dense_decoder import Fusion, ResidualUnit
from gen3r.vggt.dense_head import DenseHead, inverse_log, position_tables
from gen3r_kernels import Backends

ONE_FRAME = 0.0  # GiB of working memory: one latent frame a chunk
FRAMES_PER_CHUNK = 8  # of the dense heads


def rms_norm_silu(
    x: Tensor,
    gamma: Tensor,
    silu: bool = True,
    *,
    out_dtype: torch.dtype | None = None,
    lead: Tensor | None = None,
    backends: Backends | None = None,
) -> Tensor:
    """The norm of the autoencoders in the dtype of x, see `gen3r_kernels.rms_norm_silu`."""
    y = F.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma
    y = (F.silu(y) if silu else y).to(x.dtype if out_dtype is None else out_dtype)
    return y if lead is None else torch.cat([lead.to(y.dtype), y], dim=2)


@contextmanager
def upstream_norms() -> Iterator[None]:
    """Inside, the autoencoders take the norm above."""
    with patch.object(causal_layers, "rms_norm_silu", rms_norm_silu):
        yield


def _add_position(x: Tensor, aspect: float) -> Tensor:
    channels, rows, columns = x.shape[1:]
    across, down = position_tables((rows, columns), channels, aspect, x.device)
    horizontal = across.t()[:, None, :].expand(-1, rows, -1)
    vertical = down.t()[:, :, None].expand(-1, -1, columns)
    return x + torch.cat([horizontal, vertical]).to(x.dtype)


def _unit(module: ResidualUnit, x: Tensor) -> Tensor:
    x = F.relu(x)
    return module.conv2(F.relu(module.conv1(x))) + x


def _fuse(
    module: Fusion, x: Tensor, skip: Tensor | None, size: Sequence[int] | torch.Size
) -> Tensor:
    if skip is not None:
        x = x + _unit(module.resConfUnit1, skip)
    x = _unit(module.resConfUnit2, x)
    return module.out_conv(F.interpolate(x, tuple(size), mode="bilinear", align_corners=True))


def _decode(head: DenseHead, patches: Sequence[Tensor], height: int, width: int) -> Tensor:
    patch_size, aspect, scratch = head.config.patch_size, width / height, head.scratch
    grid = (height // patch_size, width // patch_size)
    levels = []
    for x, project, resize in zip(patches, head.projects, head.resize_layers, strict=True):
        plane = head.norm(x).transpose(1, 2).unflatten(2, grid)
        levels.append(resize(_add_position(project(plane), aspect)))
    layers = (scratch.layer1_rn, scratch.layer2_rn, scratch.layer3_rn, scratch.layer4_rn)
    one, two, three, x = (layer(level) for layer, level in zip(layers, levels, strict=True))
    x = _fuse(scratch.refinenet4, x, None, three.shape[-2:])
    x = _fuse(scratch.refinenet3, x, three, two.shape[-2:])
    x = _fuse(scratch.refinenet2, x, two, one.shape[-2:])
    x = _fuse(scratch.refinenet1, x, one, (2 * one.shape[-2], 2 * one.shape[-1]))
    x = scratch.output_conv1(x)
    size = (grid[0] * patch_size, grid[1] * patch_size)
    x = F.interpolate(x, size, mode="bilinear", align_corners=True)
    return scratch.output_conv2(_add_position(x, aspect)).permute(0, 2, 3, 1).float()


def dense_head(
    head: DenseHead,
    tokens: Sequence[Tensor],  # four of [B, S, P, 2 C]
    height: int,
    width: int,
    special: int,
) -> tuple[Tensor, Tensor]:  # values [B, S, H, W, channels], confidence [B, S, H, W]
    """A dense head in upstream's order of operations."""
    batch, views = tokens[0].shape[:2]
    flat = [t.flatten(0, 1)[:, special:] for t in tokens[:4]]
    chunks = [
        _decode(head, [t[i : i + FRAMES_PER_CHUNK] for t in flat], height, width)
        for i in range(0, batch * views, FRAMES_PER_CHUNK)
    ]
    raw = torch.cat(chunks).unflatten(0, (batch, views))
    values = raw[..., :-1]
    return values.exp() if head.exponential else inverse_log(values), 1 + raw[..., -1].exp()


def camera_and_depth(
    vggt: VGGT,
    tokens: Tensor,  # [1, F, h, w, 10 C]
    height: int,
    width: int,
) -> tuple[Tensor, ...]:  # depth, confidence, extrinsics, intrinsics
    """What the heads read off a token map."""
    lists = token_list(tokens)
    encoding = vggt.camera_head(lists[-1])[-1].float()
    extrinsics, intrinsics = decode_pose(encoding, height, width)
    special = vggt.aggregator.num_special_tokens
    depth, confidence = dense_head(vggt.depth_head, lists, height, width, special)
    return depth.squeeze(-1), confidence, extrinsics, intrinsics


class UpstreamDenseHead(nn.Module):
    """A dense head that computes as upstream does, to stand in a `VGGT` in the place of ours."""

    def __init__(self, head: DenseHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self, tokens: Sequence[Tensor], height: int, width: int, patch_start_idx: int = 5
    ) -> tuple[Tensor, Tensor]:
        return dense_head(self.head, tokens, height, width, patch_start_idx)
