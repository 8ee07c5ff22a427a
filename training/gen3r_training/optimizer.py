"""AdamW for all forms of the trained module: float32, bf16 with masters, bf16 with rounding.

``none``        parameters are float32 (a float32 run, or FSDP2's shards) and their own masters;
                PyTorch's fused AdamW.
``float32``     parameters are bf16; float32 masters, moments and, over several micro steps,
                gradient sums are held here (`gen3r_kernels.adamw_step`).
``stochastic``  parameters are bf16 and nothing else holds them; updates are rounded
                stochastically. 6.5 GB less than ``float32`` at the real size.

Every form clips on every rank: the norm is that of all gradients of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gen3r_kernels import AdamWPlan, AdamWStep, Backends, Moments, adamw_step

MASTERS = ("none", "float32", "stochastic")


class Optimizer:
    """Gradients in, weights updated.

    Parameters
    ----------
    module : its parameters with ``requires_grad`` are trained. They must lie where they will stay:
        moved or cast afterwards, they are no longer those that are updated.
    lr, betas, eps, weight_decay : AdamW's (arXiv 1711.05101), on every parameter alike.
    master : see above. seed : of stochastic rounding.
    micro_steps : backward passes a step; with more than one `accumulate` must follow each.

    Raises
    ------
    ValueError : nothing to train, an unknown `master`, or one that does not fit the dtype.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        master: str = "none",
        seed: int = 0,
        micro_steps: int = 1,
        backends: Backends | None = None,
    ) -> None:
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("nothing to train: no parameter of the module requires gradients")
        if master not in MASTERS:
            raise ValueError(f"master weights '{master}' are unknown; known: {', '.join(MASTERS)}")
        wanted = torch.float32 if master == "none" else torch.bfloat16
        for name, parameter in trained.items():
            if parameter.dtype != wanted:
                raise ValueError(
                    f"master weights '{master}' train {wanted} parameters, {name} is "
                    f"{parameter.dtype}; cast the module first"
                )
        self.parameters = trained
        self.numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.master, self.seed, self.micro_steps = master, seed, micro_steps
        self.backends = backends or Backends()
        self.steps = 0
        self._sums: list[Tensor] | None = None
        own = list(trained.values())
        if master == "none":
            fused = own[0].device.type == "cuda"
            self._inner = torch.optim.AdamW(own, fused=fused, **cast(Any, self.numbers))
            return
        self._moments = Moments(
            [_zeros(p) for p in own],
            [_zeros(p) for p in own],
            [p.detach().float() for p in own] if master == "float32" else None,
        )
        self._plan = AdamWPlan([p.detach() for p in own], self._moments)

    def accumulate(self) -> None:
        """After each backward pass: with several micro steps bf16 gradients are summed in float32.

        Added up in bf16, small ones would be lost beside large ones.
        """
        if self.micro_steps == 1 or self.master == "none":
            return
        own = list(self.parameters.values())
        if self._sums is None:
            self._sums = [_zeros(p) for p in own]
        for total, parameter in zip(self._sums, own, strict=True):
            if parameter.grad is not None:
                total += parameter.grad
                parameter.grad = None

    def step(self, lr: float, max_norm: float = 0.0) -> float:
        """Update with gradients clipped to `max_norm` (0: not clipped) and drop the gradients.

        Returns their norm before clipping. Where it is not finite nothing is updated.
        """
        gradients = self._gradients()
        total = _norm(gradients)
        # What the host has to do for the update it does while the device is still at work: asking
        # for the norm waits for that.
        prepared = None if self.master == "none" else self._plan.prepare(gradients)
        norm = float(total)
        if math.isfinite(norm):
            scale = min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0
            self.steps += 1
            if prepared is None:
                self._step_float32(lr, scale)
            else:
                adamw_step(self._plan, prepared, self._numbers(lr, scale), backends=self.backends)
        self.discard()
        return norm

    def discard(self) -> None:
        """Drop all gradients without an update."""
        for parameter in self.parameters.values():
            parameter.grad = None
        if self._sums is not None:
            torch._foreach_zero_(self._sums)

    def _gradients(self) -> list[Tensor]:
        if self._sums is not None:
            return self._sums
        found = []
        for parameter in self.parameters.values():
            if parameter.grad is None:  # not part of this step's graph
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
        return found

    def _numbers(self, lr: float, scale: float) -> AdamWStep:
        beta1, beta2 = cast(tuple[float, float], self.numbers["betas"])
        eps, decay = cast(float, self.numbers["eps"]), cast(float, self.numbers["weight_decay"])
        return AdamWStep(lr, beta1, beta2, eps, decay, self.steps, scale, self.seed)

    def _step_float32(self, lr: float, scale: float) -> None:
        if scale != 1.0:
            gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
            torch._foreach_mul_(gradients, scale)
        for group in self._inner.param_groups:
            group["lr"] = lr
        self._inner.step()

    def masters(self) -> dict[str, Tensor]:
        """The weights that are trained, by parameter name: float32, or bf16 for ``stochastic``.

        The tensors themselves: what is copied into them is trained on once `publish` has run.
        """
        if self.master == "float32":
            assert self._moments.masters is not None
            return dict(zip(self.parameters, self._moments.masters, strict=True))
        return {name: p.detach() for name, p in self.parameters.items()}

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the module: after something was written into them."""
        if self.master == "float32":
            for parameter, master in zip(
                self.parameters.values(), self.masters().values(), strict=True
            ):
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and the number of steps, by flat names; the tensors themselves, no copies."""
        state: dict[str, Tensor] = {"steps": torch.tensor(self.steps, dtype=torch.int64)}
        first, second = self._moment_lists()
        for name, m, v in zip(self.parameters, first, second, strict=True):
            state[f"first.{name}"], state[f"second.{name}"] = m, v
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take up a state as `state_dict` gives it.

        Raises
        ------
        ValueError : names or shapes that differ.
        """
        own = self.state_dict()
        if set(own) != set(state):
            wrong = sorted(set(own) ^ set(state))[:3]
            raise ValueError(f"optimizer state: missing or unknown entries: {', '.join(wrong)}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"optimizer state {name} is {tuple(state[name].shape)}, "
                    f"this model's is {tuple(tensor.shape)}"
                )
            if name != "steps" and tensor is not state[name]:
                tensor.copy_(state[name])
        self.steps = int(state["steps"])
        if self.master == "none":
            for entry in self._inner.state.values():
                entry["step"].fill_(self.steps)

    def _moment_lists(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if self.master != "none":
            return self._moments.first, self._moments.second
        first, second = [], []
        for parameter in self.parameters.values():
            state = self._inner.state[parameter]
            if not state:  # PyTorch makes it at the first step only
                device = parameter.device if parameter.device.type == "cuda" else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"], state["exp_avg_sq"] = _zeros(parameter), _zeros(parameter)
            first.append(state["exp_avg"])
            second.append(state["exp_avg_sq"])
        return first, second


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float32, requires_grad=False)


def gradient_norm(
    gradients: Sequence[Tensor],  # of any shapes; shards where they are DTensors
) -> float:
    """The length of all gradients together, over all ranks where they are sharded."""
    return float(_norm(gradients))


@torch.no_grad()
def _norm(gradients: Sequence[Tensor]) -> Tensor:
    norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float32)
    total = torch.linalg.vector_norm(torch.stack(norms))
    return total.full_tensor() if isinstance(total, DTensor) else total
