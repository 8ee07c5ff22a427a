"""Floating-point operations of a denoising step, counted from the shapes.

Counted is upstream's step: every forward computes all of it. A runtime that leaves out what is the
same in every step (keys and values of text and image, the first self-attention's second half) does
less and shows a higher rate for it. At 49 frames of 560 x 560 one forward of one sample is 271.4
TFLOP: self-attention 187.0, linears 79.7, cross-attention 4.5, keys and values of text 0.2.
"""

from __future__ import annotations

from gen3r.config import TransformerConfig
from gen3r_training.flops import transformer_forward_flops


def step_flops(config: TransformerConfig, frames: int, size: int, scenes: int = 1) -> int:
    """Of one guided step of `scenes` scenes."""
    return 2 * scenes * transformer_forward_flops(config, frames, size)
