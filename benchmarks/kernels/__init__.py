"""The kernel suite: every operator at the model's real shapes, providers side by side."""

from benchmarks.kernels import attention, heads, latents, linear, transformer_norms, video
from benchmarks.kernels.case import REAL, SMALL, Case, Sizes

__all__ = ["REAL", "SMALL", "Case", "Sizes", "cases"]


def cases(sizes: Sizes) -> list[Case]:
    """All cases, in the order of the report."""
    parts = (transformer_norms, latents, video, heads, linear, attention)
    return [case for part in parts for case in part.cases(sizes)]
