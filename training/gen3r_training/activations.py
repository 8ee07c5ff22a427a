"""Activation checkpointing of the transformer: what a block computes again in the backward pass.

``full`` keeps a block's inputs and computes everything again, as upstream does. ``selective`` keeps
the attention's output and the logarithm of its denominator as well (101 MB a block of 31,850
tokens): self-attention is 70 % of a block's operations, so that the recomputation costs 30 % of a
forward pass and not all of it. ``none`` keeps everything: 2.2 GB a block.
Source: arXiv 1604.06174; the selective form is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gen3r.transformer import WanTransformer, call

MODES = ("none", "selective", "full")


def kept_operators() -> frozenset[Any]:
    """Operators whose results ``selective`` keeps: every form of attention that has a backward."""
    aten = torch.ops.aten
    names = ("attention_forward", "attention_forward_fa3", "context_attention")
    own = [getattr(torch.ops.gen3r, name, None) for name in names]
    return frozenset(
        {
            aten._scaled_dot_product_cudnn_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            *(packet.default for packet in own if packet is not None),
        }
    )


# Cross-attention is cheap to compute again and goes through the same library operators where the
# fused one does not run: only attention with as many queries as keys is kept.
def _policy(
    kept: frozenset[Any], context: Any, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    if op in kept and args[0].shape == args[1].shape:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def recompute(mode: str) -> Callable[..., Any]:
    """What calls a block's function so that `mode` is kept of it.

    Raises
    ------
    ValueError : an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"activation checkpointing '{mode}' is unknown; known: {', '.join(MODES)}")
    if mode == "none":
        return call
    # The blocks draw no random numbers, so that no generator's state needs to be kept.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        contexts = partial(_policy, kept_operators())
        options["context_fn"] = partial(create_selective_checkpoint_contexts, contexts)
    again: Callable[..., Any] = partial(cast(Callable[..., Any], checkpoint), **options)

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        return again(function, *arguments) if torch.is_grad_enabled() else function(*arguments)

    return run


def checkpoint_blocks(module: nn.Module, mode: str) -> None:
    """Let every block of a transformer be recomputed as `mode` says, in place.

    Raises
    ------
    ValueError : an unknown mode, or a module other than the transformer with a mode other than
        ``none``.
    """
    run = recompute(mode)
    if isinstance(module, WanTransformer):
        module.run_block = run
    elif mode != "none":
        raise ValueError(
            f"activation checkpointing '{mode}': {type(module).__name__} has no blocks that can be "
            "recomputed; use none"
        )
