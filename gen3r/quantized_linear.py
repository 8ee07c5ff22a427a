"""A linear layer whose weight is held in 8 bits, in the place of an `nn.Linear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from gen3r_kernels import Quantized, QuantizedWeight, quantize_weight
from gen3r_kernels.dispatch import FLOAT8

_FIXED = ("values", "scale", "length")


class QuantizedLinear(nn.Module):
    """y = x w^T + b with w in e4m3, one scale per output channel; inference only.

    Parameters
    ----------
    weight : [N, K] in 8 bits, as `quantize_weight` makes it
    bias : [N] in the model's dtype, which is also the dtype of y

    `module.to(dtype)` changes the bias alone: converted weights would be neither 8-bit nor right.
    """

    values: Tensor
    scale: Tensor
    length: Tensor
    bias: Tensor

    def __init__(self, weight: QuantizedWeight, bias: Tensor) -> None:
        super().__init__()
        for name, part in zip(_FIXED, weight, strict=True):
            self.register_buffer(name, part)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, *layers: nn.Linear) -> Self:
        """One layer that computes all of `layers`, their outputs side by side.

        Raises
        ------
        ValueError : a layer without bias, or layers that read different widths.
        """
        widths = {layer.in_features for layer in layers}
        if len(widths) != 1 or any(layer.bias is None for layer in layers):
            raise ValueError(
                f"8-bit layer of inputs {sorted(widths)}: layers must have a bias and share their "
                "input's width; keep them in bfloat16"
            )
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = torch.cat([layer.bias.detach() for layer in layers])
        return cls(quantize_weight(weight), bias)

    @property
    def weight(self) -> QuantizedWeight:
        """What `gen3r_kernels.linear` takes."""
        return QuantizedWeight(self.values, self.scale, self.length)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers[name] for name in _FIXED}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        channels, width = self.values.shape
        return f"in_features={width}, out_features={channels}, weight=float8_e4m3fn"


Linear = nn.Linear | QuantizedLinear
Rows = Tensor | Quantized  # [..., C], plain or in 8 bits


def rows_dtype(layer: Linear) -> torch.dtype:
    """In which dtype an operator should leave the rows that `layer` reads."""
    return FLOAT8 if isinstance(layer, QuantizedLinear) else layer.weight.dtype
