"""VGGT's token lists as one dense map per view, the form the geometry adapter compresses, and back.

Channels of a map: the patch tokens of the four intermediate layers (2 C each), then the camera
token of the last layer, broadcast over space (behaviour 7).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_LISTS = 4
NUM_SPECIAL_TOKENS = 5


def token_map(
    tokens: Sequence[
        Tensor
    ],  # the four intermediate layers, the last layer at the end; [B, S, P, 2 C]
    rows: int,
    columns: int,
    num_special_tokens: int = NUM_SPECIAL_TOKENS,
) -> Tensor:  # [B, S, rows, columns, 10 C]
    """Join the token lists that `Aggregator` returns into one map.

    Raises
    ------
    ValueError : fewer than four lists, or a token count that does not fit the grid.
    """
    if len(tokens) < NUM_LISTS or tokens[0].shape[2] != num_special_tokens + rows * columns:
        raise ValueError(
            f"token_map: {len(tokens)} lists {list(tokens[0].shape) if tokens else []} do not fit "
            f"a {rows} x {columns} grid; expected {NUM_LISTS} lists with "
            f"{num_special_tokens} + {rows * columns} tokens"
        )
    patches = [t[:, :, num_special_tokens:] for t in tokens[:NUM_LISTS]]
    camera = tokens[-1][:, :, :1].expand_as(patches[0])
    return torch.cat([*patches, camera], dim=-1).unflatten(2, (rows, columns))


def token_views(
    tokens: Tensor,  # [B, S, h, w, 10 C]
) -> tuple[list[Tensor], Tensor]:  # 4 of [B, S, h * w, 2 C], camera token [B, S, 1, 2 C]
    """Patch tokens of the four layers as views of a map, and the camera token.

    The camera token is the spatial mean of the map's last block. Nothing but it is written: the
    lists of `token_list` would be a copy of the map, 1.3 GB for 49 frames of 560 x 560 in bf16.

    Raises
    ------
    ValueError : a channel count that is not five equal blocks.
    """
    if tokens.ndim != 5 or tokens.shape[-1] % (NUM_LISTS + 1):
        raise ValueError(
            f"token_views takes a map [B, S, h, w, {NUM_LISTS + 1} * 2C], got {list(tokens.shape)}"
        )
    *layers, camera = tokens.flatten(2, 3).chunk(NUM_LISTS + 1, dim=-1)
    return layers, camera.mean(dim=2, keepdim=True)


def token_list(
    tokens: Tensor,  # [B, S, h, w, 10 C]
    num_special_tokens: int = NUM_SPECIAL_TOKENS,
) -> list[Tensor]:  # 4 of [B, S, num_special_tokens + h * w, 2 C]
    """Split a map into token lists of the form that `Aggregator` returns.

    The camera token takes the place of all special tokens of all four lists.

    Raises
    ------
    ValueError : as `token_views`.
    """
    layers, camera = token_views(tokens)
    special = camera.expand(-1, -1, num_special_tokens, -1)
    return [torch.cat([special, layer], dim=2) for layer in layers]
