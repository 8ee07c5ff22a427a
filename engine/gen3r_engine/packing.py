"""Frames as bytes, in C++ where it is built (`native`), else in torch: the same bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gen3r_engine.native import native

_PACKED = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def pack_frames(
    frames: Tensor,  # [..., 3] in [0, 1], on the host; any strides
    *,
    threads: int = 0,
) -> np.ndarray:  # same shape, uint8
    """`gen3r.run.to_bytes` on the host: value * 255 in the frames' own dtype, truncated.

    Beyond [0, 1] the result is 0 or 255, and 0 for NaN. Planes (a channel-first tensor, permuted)
    are read as they lie, without a copy.

    Parameters
    ----------
    threads : of the C++ path; 0 takes what OMP_NUM_THREADS allows.

    Raises
    ------
    ValueError : another last dimension, dtype (float32, float16, bfloat16) or device.
    """
    if frames.ndim < 1 or frames.shape[-1] != 3 or frames.dtype not in _PACKED:
        raise ValueError(
            f"frames must be [..., 3] of {', '.join(_PACKED.values())}, "
            f"got {frames.dtype} {list(frames.shape)}"
        )
    if frames.device.type != "cpu":
        raise ValueError(f"frames are on {frames.device}; use gen3r.run.to_bytes there")
    module = native()
    if module is None:
        return pack_frames_reference(frames)
    grid = _as_grid(frames.detach())
    raw = grid if grid.dtype == torch.float32 else grid.view(torch.uint16)
    packed: np.ndarray = module.pack_frames(raw.numpy(), _PACKED[frames.dtype], threads)
    return packed.reshape(tuple(frames.shape))


def pack_frames_reference(frames: Tensor) -> np.ndarray:  # [..., 3] -> same shape, uint8
    """What `pack_frames` computes, in torch."""
    scaled = (frames.detach() * 255).nan_to_num(0.0, 255.0, 0.0).clamp(0, 255)
    packed: np.ndarray = scaled.to(torch.uint8).numpy()
    return packed


def _as_grid(frames: Tensor) -> Tensor:
    """[F, H, W, 3], a view where there are at most four dimensions."""
    if frames.ndim > 4:
        return frames.reshape(-1, *frames.shape[-3:])
    return frames[(None,) * (4 - frames.ndim)]
