"""3D convolution, with the processor library that PyTorch passes over for single clips.

On a CPU PyTorch (seen in 2.13) sends a batch of one with kernels of up to 3 to its unblocked im2col
path and larger batches to oneDNN. Here a batch of one goes to oneDNN as well: 4 to 8 times faster
on 2 cores (docs/measured.md); the sums are the same, in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def conv3d_reference(
    x: Tensor,  # [B, Cin, T, H, W]
    weight: Tensor,  # [Cout, Cin, kt, kh, kw]
    bias: Tensor | None,  # [Cout]
    stride: tuple[int, ...] = (1, 1, 1),
    padding: tuple[int, ...] = (0, 0, 0),
) -> Tensor:  # [B, Cout, T', H', W'] float32
    """The definition in float32."""
    wide = None if bias is None else bias.float()
    return F.conv3d(x.float(), weight.float(), wide, stride, padding)


def conv3d(
    x: Tensor,  # [B, Cin, T, H, W]
    weight: Tensor,  # [Cout, Cin, kt, kh, kw]
    bias: Tensor | None,  # [Cout]
    stride: tuple[int, ...] = (1, 1, 1),
    padding: tuple[int, ...] = (0, 0, 0),
) -> Tensor:  # [B, Cout, T', H', W'], dtype of x
    """Zero-padded 3D convolution; differentiable."""
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    # Exported and compiled graphs keep the plain operator.
    if on_cpu and torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling():
        return torch.ops.aten.mkldnn_convolution(
            x, weight, bias, list(padding), list(stride), [1, 1, 1], 1
        )
    return F.conv3d(x, weight, bias, stride, padding)
