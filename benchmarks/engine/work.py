"""Floating-point operations of a denoising step, counted from the shapes.

Counted is upstream's step: every forward computes all of it. A runtime that leaves out what is the
same in every step (keys and values of text and image, the first self-attention's second half) does
less and shows a higher rate for it. At 49 frames of 560 x 560 one forward of one sample is 271.4
TFLOP: self-attention 187.0, linears 79.7, cross-attention 4.5, keys and values of text 0.2.
"""

from __future__ import annotations

import math

from gen3r import stages
from gen3r.config import TransformerConfig

IMAGE_TOKENS = 257


def tokens(config: TransformerConfig, frames: int, size: int) -> int:
    """S: tokens of the joint latents."""
    shape = stages.latent_shape(frames, size, size)
    return math.prod(shape[1:]) // math.prod(config.patch_size)


def forward_flops(config: TransformerConfig, frames: int, size: int) -> int:
    """Of one forward of one sample."""
    s, c, context = tokens(config, frames, size), config.dim, config.text_len + IMAGE_TOKENS
    linears = 2 * s * c * (6 * c + 2 * config.ffn_dim)  # q, k, v, o, cross q and o, two of the ffn
    keys_values = 2 * context * c * 2 * c
    block = 4 * s * s * c + linears + 4 * s * context * c + keys_values
    patch = math.prod(config.patch_size)
    ends = 2 * s * c * patch * (config.in_dim + config.out_dim)
    return config.num_layers * block + ends


def step_flops(config: TransformerConfig, frames: int, size: int, scenes: int = 1) -> int:
    """Of one guided step of `scenes` scenes."""
    return 2 * scenes * forward_flops(config, frames, size)
