"""Rows in 8-bit floating point with one scale per row (token)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Quantized(NamedTuple):
    """x is approximately values * scale.

    values : [..., C] float8_e4m3fn
    scale : [..., 1] float32, per token: max |x| / 448
    length : [..., 1] float32, the Euclidean norm of x's row or a bound of it. By Cauchy-Schwarz
        |x . w_j| <= length * |w_j|, which bounds the outputs of the linear layer that reads x
        before they are computed (so its epilogue can quantise them in the same pass).
    """

    values: Tensor
    scale: Tensor
    length: Tensor
