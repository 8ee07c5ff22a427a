"""DeepSpeed's ZeRO-1 and ZeRO-2 behind the interface of `gen3r_training.optimizer.Optimizer`.

Weights are whole on every rank; gradients (ZeRO-2), float32 masters and moments are spread, as flat
vectors of equal parts. AdamW is PyTorch's with the numbers of the command line, and every step gets
its learning rate and its limit of the gradient's norm: DeepSpeed's own configuration has no say.

A checkpoint is taken up again by as many ranks as made it, since the vectors are padded for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from gen3r_training.config import TrainConfig
from gen3r_training.parallel.launch import Parallel

MOMENTS = {"first": "exp_avg", "second": "exp_avg_sq"}


class ZeroOptimizer:
    """Gradients in, weights updated; see `Optimizer`, whose methods these are."""

    def __init__(self, module: nn.Module, config: TrainConfig, parallel: Parallel) -> None:
        import deepspeed

        half = config.mixed_precision == "bf16"
        self.parallel = parallel
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.micro_steps, self._passes = config.gradient_accumulation, 0
        self._inner = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=parallel.device.type == "cuda",
        )
        options: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "zero_optimization": {"stage": parallel.sharding.zero_stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        if half:  # gradients are summed in float32, over micro steps and over ranks
            options["bf16"] = {"enabled": True}
            options["communication_data_type"] = "fp32"
            options["data_types"] = {"grad_accum_dtype": "fp32"}
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=module, optimizer=self._inner, config=options, dist_init_required=False
        )
        self._zero.check_grad_overflow = True  # a step that is not finite is left out

    def backward(self, loss: Tensor) -> None:
        """Backward pass of one micro step."""
        self._passes += 1
        last = self._passes % self.micro_steps == 0
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, lr: float, max_norm: float = 0.0) -> float:
        """Update with gradients clipped to `max_norm` (0: not clipped); their norm before that.

        Where it is not finite nothing is updated.
        """
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._zero.clip_grad = max_norm
        self._engine.step()
        return math.inf if self._zero.overflow else float(self._engine.get_global_grad_norm())

    def discard(self) -> None:
        """Drop the gradients of all micro steps."""
        for gradients in self._zero.averaged_gradients.values():
            for gradient in gradients or ():
                gradient.fill_(math.nan)  # which DeepSpeed finds, and cleans up after
        self._engine.step()

    def masters(self) -> dict[str, Tensor]:
        """The module's weights by name, in its dtype; the float32 vectors are in the state."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def publish(self) -> None:
        """Nothing: `masters` are the parameters themselves."""

    def state_dict(self) -> dict[str, Tensor]:
        """Float32 weights, moments and the number of steps; the tensors themselves, no copies."""
        state: dict[str, Tensor] = {}
        for i, part in enumerate(self._parts()):
            moments = self._moments(part)
            state[f"steps.{i}"] = moments["step"]
            state[f"weights.{i}"] = self._spread(part.detach())
            state |= {f"{name}.{i}": self._spread(moments[key]) for name, key in MOMENTS.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state as `state_dict` gives it.

        Raises
        ------
        ValueError : names or shapes that differ.
        """
        own = self.state_dict()
        for name in sorted({*own, *state}):
            here, there = own.get(name), state.get(name)
            if here is None or there is None or here.shape != there.shape:
                raise ValueError(
                    f"optimizer state {name} is of another model or number of ranks; use as many "
                    "ranks as made the checkpoint"
                )
            if here is not there:
                here.copy_(there)

    def _parts(self) -> list[Tensor]:
        """This rank's parts of the float32 vectors, one a parameter group."""
        return self._zero.single_partition_of_fp32_groups

    def _moments(self, part: Tensor) -> dict[str, Tensor]:
        state = self._inner.state[part]
        if not state:  # PyTorch makes it at the first step only
            device = part.device if part.device.type == "cuda" else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(part, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(part, requires_grad=False)
        return state

    def _spread(self, part: Tensor) -> Tensor:
        """The whole vector of which this rank holds a part."""
        return DTensor.from_local(part, self.parallel.shards, [Shard(0)], run_check=False)
