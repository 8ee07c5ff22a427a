"""What the tests run in two processes: each check returns what it saw.

torchrun --nproc_per_node 2 -m tests.training.two_ranks FOLDER fsdp context
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gen3r_training import checkpoints, loop
from gen3r_training.activations import checkpoint_blocks
from gen3r_training.config import TrainConfig
from gen3r_training.data import Sample
from gen3r_training.optimizer import Optimizer
from gen3r_training.parallel import (
    Parallel,
    backward,
    make_optimizer,
    parameter_dtype,
    shard,
    start,
)
from gen3r_training.parallel.launch import ShardOptions
from gen3r_training.parallel.zero import ZeroOptimizer
from gen3r_training.stages import StepResult, ValidationResult
from tests.training import tiny
from tests.training.toy import ToyDataset


def train(
    module: nn.Module,
    loss: Callable[[Any, list[int]], Tensor],
    parallel: Parallel,
    config: TrainConfig,
    steps: int = tiny.STEPS,
) -> tuple[dict[str, Any], Optimizer | ZeroOptimizer]:
    """Steps of one sample a data rank; losses are means over the data ranks."""
    module.to(parameter_dtype(config, parallel))
    shard(module, parallel, config)
    optimizer = make_optimizer(module, config, parallel)
    seen: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(steps):
        more(step, module, loss, parallel, optimizer, seen)
    return seen, optimizer


def more(
    step: int,
    module: nn.Module,
    loss: Callable[[Any, list[int]], Tensor],
    parallel: Parallel,
    optimizer: Optimizer | ZeroOptimizer,
    seen: dict[str, Any],
) -> None:
    """One step more; every micro step sees the same sample."""
    count = optimizer.micro_steps
    for _ in range(count):
        value = loss(module, [step * parallel.data_ranks + parallel.data_rank])
        backward(optimizer, value / count)
    seen["losses"].append(parallel.mean({"loss": value.item()})["loss"])
    seen["norms"].append(optimizer.step(tiny.LR, tiny.MAX_NORM))


def launched(folder: Path) -> dict[str, Any]:
    parallel = start(tiny.diffusion_config())
    order = []
    with parallel.main_first():
        (folder / f"first-{parallel.rank}").touch()
        order = sorted(path.name for path in folder.glob("first-*"))
    parallel.barrier()
    whole = parallel.full({"a": torch.arange(3.0) + parallel.rank})
    means = parallel.mean({"all": float(parallel.rank), f"only-{parallel.rank}": 5.0})
    names = ("strategy", "rank", "world", "data_rank", "data_ranks", "context_ranks", "is_main")
    return {name: getattr(parallel, name) for name in names} | {
        "device": str(parallel.device),
        "order": order,
        "full": whole,
        "mean": means,
        "agree": [parallel.agree(parallel.rank == 1), parallel.agree(False)],
    }


def fsdp(folder: Path, mode: str = "none") -> dict[str, Any]:
    """The transformer, with the main rank's weights on all and blocks recomputed as `mode` says."""
    config = tiny.diffusion_config()
    parallel = start(config)
    model = tiny.transformer(seed=parallel.rank)  # the main rank's weights are to win
    checkpoint_blocks(model, mode)
    result, optimizer = train(model, tiny.diffusion_loss, parallel, config)
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    return {**result, "weights": parallel.full(optimizer.masters()), "sharded": sharded}


def adapter(folder: Path) -> dict[str, Any]:
    """The geometry adapter, with two samples a rank."""
    config = tiny.adapter_config()
    parallel = start(config)

    def loss(model: Any, samples: list[int]) -> Tensor:
        return tiny.adapter_loss(model, [2 * samples[0], 2 * samples[0] + 1])

    result, optimizer = train(tiny.adapter(), loss, parallel, config)
    return {**result, "weights": parallel.full(optimizer.masters())}


def context(folder: Path) -> dict[str, Any]:
    """Two ranks share one sample after the other."""
    config = tiny.diffusion_config(context_parallel=2)
    parallel = start(config)
    model = tiny.transformer()
    checkpoint_blocks(model, "selective")
    shard(model, parallel, config)
    loss = tiny.diffusion_loss(model, [0, 1])
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    places = (parallel.data_rank, parallel.data_ranks, parallel.context_rank)
    return {"loss": loss.item(), "gradients": parallel.full(gradients), "places": places}


def bf16(folder: Path) -> dict[str, Any]:
    """Float32 shards, bf16 inside: the same prediction as of a bf16 module, bit for bit."""
    config = tiny.diffusion_config(mixed_precision="bf16")
    parallel = start(config)
    model, plain = tiny.transformer(), tiny.transformer().bfloat16()
    shard(model, parallel, config)
    noisy, timesteps, conditions, target = tiny.diffusion_inputs([parallel.rank])
    velocity = model(noisy, timesteps, conditions, side_by_side=False)
    expected = plain(noisy, timesteps, conditions, side_by_side=False)
    (velocity - target).square().mean().backward()
    grads = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    geometry, coarse = tiny.adapter(), tiny.adapter().bfloat16()
    shard(geometry, parallel, tiny.adapter_config(mixed_precision="bf16"))
    latents = tiny.draw(3, 1, 16, 2, 7, 7)
    with torch.no_grad():
        decoded, other = geometry.decode(latents), coarse.decode(latents.bfloat16())
    return {
        "same": torch.equal(velocity, expected) and torch.equal(decoded, other),
        "masters": {p.dtype for p in model.parameters()},
        "gradients": grads,
        "count": sum(p.grad is not None for p in model.parameters()),
    }


def unsharded_once(folder: Path) -> dict[str, Any]:
    """Weights swapped after a pass without gradients must be seen by the next pass."""
    config = tiny.diffusion_config()
    parallel = replace(start(config), sharding=ShardOptions(reshard=False))
    model = tiny.transformer()
    shard(model, parallel, config)
    with torch.no_grad():
        before = tiny.diffusion_loss(model, [0]).item()
        for parameter in model.parameters():
            parameter.mul_(0.5)
        after = tiny.diffusion_loss(model, [0]).item()
    return {"before": before, "after": after}


class TinyStage:
    """Stage 2 in small, as the training loop sees it; `places` are the samples of each step."""

    name = "diffusion"
    flops = 1e6

    def __init__(self, config: TrainConfig, parallel: Parallel) -> None:
        self.module: nn.Module = tiny.transformer()
        self.device, self.dataset = parallel.device, ToyDataset()
        self.places: list[int] = []
        self.seeds: list[int] = []
        shard(self.module, parallel, config)

    def step(self, samples: list[Sample]) -> StepResult:
        self.places += [sample.index for sample in samples]
        self.seeds += [sample.seed for sample in samples]
        loss = tiny.diffusion_loss(self.module, [sample.index for sample in samples])
        return StepResult(loss, {"mse": loss.detach()})

    def validate(self, folder: Path, step: int) -> ValidationResult:
        return ValidationResult({"loss": tiny.diffusion_loss(self.module, [100]).item()})

    def save_final(self, folder: Path, weights: dict[str, Tensor]) -> None:
        folder.mkdir()
        torch.save(weights, folder / "weights.pt")


def run_loop(output: Path, **changes: Any) -> TinyStage:
    """Train to `max_steps`, from the newest checkpoint if there is one."""
    settings = {"max_steps": 3, "save_every": 2, "validate_every": 1, "ema": 0.9, "num_workers": 0}
    settings |= {"output_dir": output, "resume": "auto", "report": "none", "seed": 3}
    config = tiny.diffusion_config(**(settings | changes))
    parallel = start(config)
    stage = TinyStage(config, parallel)
    loop.train(stage, config, parallel)
    return stage


def looped(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two steps of training, and in a new run the third."""
    parts = [run_loop(folder / "run", max_steps=steps, **changes) for steps in (2, 3)]
    return {
        "places": [part.places for part in parts],
        "seeds": [seed for part in parts for seed in part.seeds],
    }


def tensors(of: Optimizer | ZeroOptimizer) -> dict[str, Tensor]:
    """What a checkpoint holds."""
    state = {f"optimizer.{name}": tensor for name, tensor in of.state_dict().items()}
    return state | {f"model.{name}": tensor for name, tensor in of.masters().items()}


def saved(folder: Path, config: TrainConfig) -> dict[str, Any]:
    """Two steps, a checkpoint, a third step; and the third step from the checkpoint."""
    parallel = start(config)
    model = tiny.transformer()
    seen, optimizer = train(model, tiny.diffusion_loss, parallel, config, steps=2)
    checkpoints.save(folder / "checkpoints", 2, tensors(optimizer), {}, parallel, keep=1)
    more(2, model, tiny.diffusion_loss, parallel, optimizer, seen)

    other = tiny.transformer(seed=9)
    after, fresh = train(other, tiny.diffusion_loss, parallel, config, steps=0)
    stored = tensors(fresh)
    path = folder / "checkpoints" / checkpoints.folder_name(2)
    checkpoints.load(path, stored, parallel)
    fresh.load_state_dict({n: stored[f"optimizer.{n}"] for n in fresh.state_dict()})
    more(2, other, tiny.diffusion_loss, parallel, fresh, after)
    weights = {"weights": parallel.full(optimizer.masters())}
    return seen | weights | {"resumed": parallel.full(fresh.masters()), "after": after}


def zero(folder: Path, **changes: Any) -> dict[str, Any]:
    """DeepSpeed."""
    return saved(folder, tiny.diffusion_config(strategy="deepspeed", **changes))


def zero_context(folder: Path) -> dict[str, Any]:
    config = tiny.diffusion_config(strategy="deepspeed", context_parallel=2)
    parallel = start(config)

    def both(model: Any, samples: list[int]) -> Tensor:
        return tiny.diffusion_loss(model, [2 * samples[0], 2 * samples[0] + 1])

    return train(tiny.transformer(), both, parallel, config)[0]


def zero_skips(folder: Path) -> dict[str, Any]:
    """A gradient that is not finite, and one that is discarded, leave no trace."""
    config = tiny.diffusion_config(strategy="deepspeed")
    parallel = start(config)
    model = tiny.transformer()
    _, optimizer = train(model, tiny.diffusion_loss, parallel, config, steps=0)
    backward(optimizer, tiny.diffusion_loss(model, [parallel.rank]) * float("nan"))
    norm = optimizer.step(tiny.LR, tiny.MAX_NORM)
    backward(optimizer, tiny.diffusion_loss(model, [parallel.rank]))
    optimizer.discard()
    seen: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(tiny.STEPS):
        more(step, model, tiny.diffusion_loss, parallel, optimizer, seen)
    return seen | {"first": norm, "weights": parallel.full(optimizer.masters())}


def gpu(folder: Path) -> dict[str, Any]:
    """bf16 on GPUs beside modules that are not sharded: losses, relative errors of gradients.

    With several GPUs the tokens are spread over all of them.
    """
    ranks = int(os.environ["WORLD_SIZE"])
    common: dict[str, Any] = {"mixed_precision": "bf16", "device": "cuda", "strategy": "fsdp"}
    config = tiny.diffusion_config(context_parallel=ranks, **common)
    parallel = start(config)
    wide = replace(tiny.TRANSFORMER, dim=256, num_heads=2, ffn_dim=512)
    model, plain = (tiny.transformer(config=wide).to(parallel.device) for _ in range(2))
    plain.bfloat16()
    checkpoint_blocks(model, "selective")
    shard(model, parallel, config)
    losses = [tiny.diffusion_loss(m, [0, 1], parallel.device) for m in (model, plain)]
    geometry, coarse = (tiny.adapter(ADAPTER).to(parallel.device) for _ in range(2))
    coarse.bfloat16()
    config = tiny.adapter_config(**common)
    shard(geometry, start(config), config)
    losses += [tiny.adapter_loss(m, [0], parallel.device) for m in (geometry, coarse)]
    for loss in losses:
        loss.backward()
    errors = {}
    for name, sharded, one in (("model", model, plain), ("adapter", geometry, coarse)):
        wanted = parallel.full({n: p.grad for n, p in one.named_parameters()})
        found = parallel.full({n: p.grad for n, p in sharded.named_parameters()})
        if parallel.is_main:
            whole = torch.cat([gradient.float().flatten() for gradient in wanted.values()])
            off = torch.cat([found[key].flatten() for key in wanted]) - whole
            errors[name] = (off.norm() / whole.norm()).item()
    return {"losses": [loss.item() for loss in losses], "errors": errors}


ADAPTER = replace(tiny.ADAPTER, hidden_dim=16, input_dim=320, output_dim=320)  # kernels take it

CHECKS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "launched": launched,
    "fsdp": fsdp,
    "full": lambda folder: fsdp(folder, "full"),
    "selective": lambda folder: fsdp(folder, "selective"),
    "adapter": adapter,
    "context": context,
    "bf16": bf16,
    "unsharded_once": unsharded_once,
    "looped": looped,
    "gpu": gpu,
    "zero": zero,
    "zero_bf16": lambda folder: zero(
        folder / "bf16", mixed_precision="bf16", gradient_accumulation=2
    ),
    "zero_context": zero_context,
    "zero_skips": zero_skips,
    "zero_looped": lambda folder: looped(folder, strategy="deepspeed"),
}


def main() -> None:
    folder = Path(sys.argv[1])
    results = {name: CHECKS[name](folder) for name in sys.argv[2:]}
    torch.save(results, folder / f"rank-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
