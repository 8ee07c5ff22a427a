"""Measured speed of the attention backends, per GPU: what ``auto`` reads.

A row holds for sequences of at least `min_length` queries and keys and for head sizes up to
`max_head_dim`; the first row that fits counts. TFLOP/s are medians in bfloat16 at the shape given,
4 * B * H * Sq * Sk * D operations a call. A GPU without rows takes those of the GPU that
`ARCHITECTURES` names for its compute capability, else ``sdpa``.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Measured(NamedTuple):
    """One backend at the row's shape."""

    backend: str
    tflops: float


class Row(NamedTuple):
    """Backends for one class of shapes, fastest first."""

    min_length: int
    max_head_dim: int
    shape: str
    order: tuple[Measured, ...]


# Pattern of the GPU's name to its rows, longest sequences first. A backend joins a row when it has
# been measured at the row's shape. cudnn and sdpa at this shape are the same kernel.
TABLE: dict[str, tuple[Row, ...]] = {
    r"NVIDIA H100": (
        Row(
            4096,
            64,
            "[1, 78645, 16, 64]",
            (Measured("triton", 585.0), Measured("fa3", 536.0), Measured("cudnn", 431.0)),
        ),
        Row(
            1024,
            64,
            "[49, 1605, 16, 64]",
            (Measured("fa3", 434.0), Measured("triton", 428.0), Measured("cudnn", 367.0)),
        ),
        Row(
            4096,
            128,
            "[2, 31850, 12, 128]",
            (Measured("triton", 735.0), Measured("fa3", 719.0), Measured("cudnn", 597.0)),
        ),
    ),
}


# Compute capability times ten to the GPU whose order also serves others of that architecture: H200
# and H20 run the same kernels, with another memory and another number of processors.
ARCHITECTURES: dict[int, str] = {90: "NVIDIA H100"}


def measured_order(gpu: str, length: int, head_dim: int) -> Row | None:
    """The row for a GPU's name and the shorter of both sequences; None where nothing was measured.

    >>> measured_order("NVIDIA H100 80GB HBM3", 31_850, 128).order[0].backend
    'triton'
    >>> measured_order("some GPU", 31_850, 128) is None
    True
    """
    for pattern, rows in TABLE.items():
        if re.match(pattern, gpu):
            for row in rows:
                if length >= row.min_length and head_dim <= row.max_head_dim:
                    return row
    return None
