"""Weights, gradients and optimiser state of the trained module spread over all ranks (FSDP2).

Parameters are DTensors outside the forward pass, cut along their first axis, and whole inside. A
block of the transformer is a unit of its own: its weights are gathered while the block before it
computes, and again for its backward pass. The adapter is one unit: its networks walk over a clip's
chunks, so that every weight is needed for the whole of a pass.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from gen3r.transformer import WanTransformer
from gen3r.video_autoencoder import VideoAutoencoder
from gen3r_training.config import TrainConfig
from gen3r_training.optimizer import Optimizer
from gen3r_training.parallel.launch import Parallel
from gen3r_training.parallel.ulysses import spread_tokens
from gen3r_training.parallel.zero import ZeroOptimizer


def master_mode(config: TrainConfig, parallel: Parallel) -> str:
    """Where the optimiser keeps the weights that it trains; see `gen3r_training.optimizer`.

    ``none`` (the parameters are float32 themselves) in a float32 run and under FSDP, which makes
    bf16 weights from its float32 shards.
    """
    whole = config.mixed_precision == "no" or parallel.strategy == "fsdp"
    return "none" if whole else config.master_weights


def parameter_dtype(config: TrainConfig, parallel: Parallel) -> torch.dtype:
    """In which dtype the trained module is to be built."""
    return torch.float32 if master_mode(config, parallel) == "none" else torch.bfloat16


def make_optimizer(
    module: nn.Module, config: TrainConfig, parallel: Parallel
) -> Optimizer | ZeroOptimizer:
    """The optimiser of a module that `shard` has seen."""
    if parallel.strategy == "deepspeed":
        return ZeroOptimizer(module, config, parallel)
    return Optimizer(
        module,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        master=master_mode(config, parallel),
        seed=config.seed,
        micro_steps=config.gradient_accumulation,
        backends=config.backends,
    )


def backward(optimizer: Optimizer | ZeroOptimizer, loss: Tensor) -> None:
    """Backward pass of one micro step, as the optimiser wants it."""
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.backward(loss)
        return
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.accumulate()


def shard(module: nn.Module, parallel: Parallel, config: TrainConfig) -> None:
    """Spread the built module over the ranks, in place; nothing to do for one process.

    Every rank comes with the whole module; all begin with the main rank's weights. Activation
    checkpointing and compilation of blocks go before this, the optimiser after it.

    Raises
    ------
    ValueError : heads that context_parallel does not divide. TypeError : a module of another kind.
    """
    if parallel.context_ranks > 1:
        if not isinstance(module, WanTransformer):
            raise ValueError(
                f"--context_parallel {parallel.context_ranks} spreads the transformer's tokens; "
                "use 1 for stage 1"
            )
        spread_tokens(module, parallel.context_group)
    if parallel.strategy == "none":
        return
    same_weights(module, parallel)
    if parallel.strategy == "deepspeed":
        return
    if isinstance(module, WanTransformer):
        _shard_transformer(module, parallel, config)
    elif isinstance(module, VideoAutoencoder):
        _shard_autoencoder(module, parallel, config)
    else:
        raise TypeError(f"sharding knows the transformer and the adapter, not {type(module)}")


@torch.no_grad()
def same_weights(module: nn.Module, parallel: Parallel) -> None:
    """Give every rank the main rank's parameters and buffers, one tensor at a time."""
    for tensor in (*module.parameters(), *module.buffers()):
        sent = tensor.to(parallel.device).contiguous()
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)


def _options(parallel: Parallel, config: TrainConfig, *, cast_inputs: bool) -> dict[str, Any]:
    """Arguments of `fully_shard`. The gradients' sum over the ranks is float32 in any case."""
    options: dict[str, Any] = {"mesh": parallel.shards}
    if config.mixed_precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16,
            reduce_dtype=torch.float32,
            cast_forward_inputs=cast_inputs,
        )
    else:
        options["mp_policy"] = MixedPrecisionPolicy(cast_forward_inputs=False)
    if parallel.sharding.offload and parallel.device.type != "cpu":
        options["offload_policy"] = CPUOffloadPolicy()
    return options


def _shard_transformer(module: WanTransformer, parallel: Parallel, config: TrainConfig) -> None:
    """Each block's `alone`, then what is left in `forward`.

    Inputs are not cast: the residual stream, the rotary tables and the modulation are float32.
    """
    options = _options(parallel, config, cast_inputs=False)
    reshard = parallel.sharding.reshard
    # A block's outputs hold its last gate, a view of its modulation, which nobody writes to.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for block in module.typed_blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
        register_fsdp_forward_method(block, "alone")
    fully_shard(module, reshard_after_forward=True, **options)
    if not reshard:
        module.register_forward_hook(_forget_whole_weights)


def _shard_autoencoder(module: VideoAutoencoder, parallel: Parallel, config: TrainConfig) -> None:
    """One unit behind `moments` (which `encode` calls) and `decode`.

    Both take and return one tensor, by which FSDP knows when a backward pass begins and ends.
    Inputs are cast to the dtype of the weights, which callers cannot see.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()  # weights may be channels-last
    options = _options(parallel, config, cast_inputs=True)
    fully_shard(module, reshard_after_forward=True, **options)
    for method in ("moments", "decode"):
        register_fsdp_forward_method(module, method)


def _forget_whole_weights(module: nn.Module, inputs: object, output: object) -> None:
    """After a pass without gradients free the whole weights.

    They would be taken for the weights of the next pass, whatever the shards hold by then.
    """
    if not torch.is_grad_enabled():
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
