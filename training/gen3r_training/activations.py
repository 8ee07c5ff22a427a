"""Activation checkpointing: what is computed again in the backward pass.

``full`` keeps a block's inputs and computes everything again, as upstream does. ``selective`` keeps
the attention's output and the logarithm of its denominator as well (101 MB a block of 31,850
tokens): self-attention is 70 % of a block's operations, so that the recomputation costs 30 % of a
forward pass and not all of it. In `kept` blocks it keeps the results of the linear layers too: 1.05
GiB a block and 3.4 ms less, measured on an H100. ``none`` keeps everything, by count of tensors
3.2 GB a block.
Source: arXiv 1604.06174; the selective form is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from gen3r.transformer import WanTransformer
from gen3r.transformer_blocks import call

MODES = ("none", "selective", "full")
LINEAR = frozenset({torch.ops.aten.addmm.default, torch.ops.aten.mm.default})


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


def _policy(
    kept: frozenset[Any], linears: bool, context: Any, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    # Cross-attention is cheap to compute again and goes through the same library operators where
    # the fused one does not run: only attention with as many queries as keys is kept.
    if (op in kept and args[0].shape == args[1].shape) or (linears and op in LINEAR):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def recompute(mode: str, linears: bool = False) -> Callable[..., Any]:
    """What calls a function so that `mode` is kept of it; ``selective``: `linears` as well.

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
        contexts = partial(_policy, kept_operators(), linears)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, contexts)
    again: Callable[..., Any] = partial(cast(Callable[..., Any], checkpoint), **options)

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        return again(function, *arguments) if torch.is_grad_enabled() else function(*arguments)

    return run


def checkpoint_blocks(transformer: WanTransformer, mode: str, kept: int = 0) -> None:
    """Let every block be recomputed as `mode` says, in place.

    kept : with ``selective``, of how many blocks (the last ones) the linear layers' results stay.

    Raises
    ------
    ValueError : an unknown mode, or a number of kept blocks that does not fit mode or model.
    """
    blocks = transformer.typed_blocks
    if not 0 <= kept <= len(blocks):
        raise ValueError(f"{kept} blocks to keep: the transformer has {len(blocks)}")
    if kept and mode != "selective":
        raise ValueError(f"{kept} blocks to keep: only with 'selective', not with '{mode}'")
    for index, block in enumerate(blocks):
        block.run = recompute(mode, linears=index >= len(blocks) - kept)
