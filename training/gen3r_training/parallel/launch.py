"""What a launcher began: ranks, devices, process groups, and what ranks tell each other.

    accelerate launch --config_file training/configs/accelerate_8gpu.yaml \\
        training/train_diffusion.py ...
    torchrun --nproc_per_node 8 training/train_diffusion.py ...
    python training/train_diffusion.py ...          # one process, no process group
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec

import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from gen3r_training.config import TrainConfig

# Others wait while the main rank writes a checkpoint or a pipeline of 40 GB.
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class ShardOptions:
    """What is left to a launcher's configuration; none of it changes a result.

    reshard : a block's weights are whole only while it computes; False: from its forward pass to
        the end of its backward pass
    offload : shards lie in host memory, where the optimiser runs
    zero_stage : DeepSpeed's, 1 or 2
    """

    reshard: bool = True
    offload: bool = False
    zero_stage: int = 2


@dataclass(frozen=True)
class Parallel:
    """One process among those of a run.

    Ranks are numbered so that neighbours share a sample: rank = data_rank * context_ranks +
    context_rank. What a rank draws follows from its data_rank.

    device : of this rank, with an index on a GPU
    strategy : ``none``, ``fsdp`` or ``deepspeed``
    mesh : data x context, or None without a process group
    shards : all ranks in a row, over which weights are spread, or None likewise
    sharding : what the launcher says about FSDP or ZeRO
    """

    rank: int
    world: int
    device: torch.device
    strategy: str
    context_ranks: int = 1
    mesh: DeviceMesh | None = None
    shards: DeviceMesh | None = None
    sharding: ShardOptions = ShardOptions()

    @property
    def data_rank(self) -> int:
        return self.rank // self.context_ranks

    @property
    def data_ranks(self) -> int:
        return self.world // self.context_ranks

    @property
    def context_rank(self) -> int:
        return self.rank % self.context_ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def context_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's samples.

        Raises
        ------
        ValueError : there is no process group.
        """
        if self.mesh is None:
            raise ValueError("a process without a launcher belongs to no context group")
        return self.mesh.get_group("context")

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            PartialState().wait_for_everyone()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main rank runs the block first, then all others together."""
        if not self.is_main:
            self.barrier()
        try:
            yield
        finally:
            if self.is_main:
                self.barrier()

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """Mean of each value over the ranks that have it, the same on every rank.

        Ranks of a context group count alike, since they have the same values.
        """
        if self.world == 1:
            return dict(values)
        every = gather_object([dict(values)])
        names = dict.fromkeys(name for one in every for name in one)
        found = {name: [one[name] for one in every if name in one] for name in names}
        return {name: sum(numbers) / len(numbers) for name, numbers in found.items()}

    def agree(self, flag: bool) -> bool:
        """Whether any rank says yes; the same answer on every rank."""
        if self.world == 1:
            return flag
        said = torch.tensor([flag], dtype=torch.int32, device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return bool(said.item())

    def full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the main rank's CPU, in their own dtype; {} on the other ranks.

        To be called on every rank with the same names in the same order. One tensor at a time is
        whole on the devices.
        """
        whole = {}
        for name, tensor in tensors.items():
            tensor = tensor.detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if self.is_main:
                whole[name] = tensor.to("cpu", copy=True)
        return whole

    def close(self) -> None:
        """Leave the process group, if there is one."""
        if dist.is_initialized():
            PartialState().destroy_process_group()


def start(config: TrainConfig) -> Parallel:
    """Join the other ranks, before any model is built. Gloo on the CPU, NCCL on GPUs.

    ``auto`` is what the launcher's configuration says; without one, ``fsdp`` for several ranks and
    ``none`` for one.

    Raises
    ------
    ValueError : a device that is not there, a strategy that the launch does not fit, a launcher's
        option that is not served, context_parallel that does not divide the ranks, stochastic
        rounding of shards.
    """
    on_cpu = _on_cpu(config)
    launched = int(os.environ.get("LOCAL_RANK", -1)) != -1
    if not launched:
        strategy = choose_strategy(config.strategy, 1, launched=False)
        _check_context(config.context_parallel, 1)
        device = torch.device("cpu") if on_cpu else torch.device("cuda", 0)
        return Parallel(rank=0, world=1, device=device, strategy=strategy)
    strategy = choose_strategy(config.strategy, _launched_ranks(), launched=True)
    _check_context(config.context_parallel, _launched_ranks())
    if strategy != "none" and config.master_weights == "stochastic":
        raise ValueError(
            f"--master_weights stochastic is for one process: with {strategy} the float32 weights "
            "are spread over the ranks and cost little; use float32"
        )
    options = _options(strategy)
    state = PartialState(cpu=on_cpu, timeout=TIMEOUT)
    world, context = state.num_processes, config.context_parallel
    device = torch.device("cpu") if on_cpu else state.device  # accelerate says cpu:0
    kind, grid = device.type, (world // context, context)
    return Parallel(
        rank=state.process_index,
        world=world,
        device=device,
        strategy=strategy,
        context_ranks=context,
        mesh=init_device_mesh(kind, grid, mesh_dim_names=("data", "context")),
        shards=init_device_mesh(kind, (world,), mesh_dim_names=("shard",)),
        sharding=options,
    )


def choose_strategy(asked: str, ranks: int, *, launched: bool) -> str:
    """``none``, ``fsdp`` or ``deepspeed`` for what was asked and what was launched.

    Raises
    ------
    ValueError : ranks that would train each on its own, sharding without a launcher, DeepSpeed
        that is not installed, a launcher that asks for DeepSpeed where the flag does not.
    """
    deepspeed = launcher_asks_deepspeed()
    if asked == "auto":
        several = ranks > 1 or (launched and _flag("ACCELERATE_USE_FSDP"))
        asked = "deepspeed" if deepspeed else "fsdp" if several else "none"
    if deepspeed and asked != "deepspeed":
        raise ValueError(
            f"the launcher asks for DeepSpeed and --strategy for {asked}; use auto, or "
            "distributed_type: FSDP in the launcher's configuration"
        )
    if asked == "none" and ranks > 1:
        raise ValueError(
            f"--strategy none with {ranks} ranks would train {ranks} models that never meet; "
            "use auto or fsdp"
        )
    if asked != "none" and not launched:
        raise ValueError(
            f"--strategy {asked} needs a launcher (accelerate launch, torchrun); use none or auto "
            "for one process"
        )
    if asked == "deepspeed" and find_spec("deepspeed") is None:
        raise ValueError("--strategy deepspeed: DeepSpeed is not installed; install it or use fsdp")
    return asked


def launcher_asks_deepspeed() -> bool:
    """Whether ``accelerate launch`` was configured for DeepSpeed."""
    return _flag("ACCELERATE_USE_DEEPSPEED")


def launcher_options() -> ShardOptions:
    """FSDP's options from ``accelerate launch``, or the defaults.

    Raises
    ------
    ValueError : FSDP1, or activation checkpointing, which has a flag of its own.
    """
    if not _flag("ACCELERATE_USE_FSDP"):
        return ShardOptions()
    asked = FullyShardedDataParallelPlugin()
    if asked.fsdp_version != 2:
        raise ValueError(
            f"the launcher asks for fsdp_version {asked.fsdp_version}; set fsdp_version: 2"
        )
    if asked.activation_checkpointing:
        raise ValueError(
            "the launcher asks for fsdp_activation_checkpointing; use --gradient_checkpointing "
            "selective or full in its place"
        )
    offload = isinstance(asked.cpu_offload, CPUOffloadPolicy)
    return ShardOptions(bool(asked.reshard_after_forward), offload)


def zero_options() -> ShardOptions:
    """DeepSpeed's options from ``accelerate launch``, or ZeRO-2.

    Raises
    ------
    ValueError : a stage or an offload that is not served.
    """
    if not launcher_asks_deepspeed():
        return ShardOptions()
    asked = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    stage = asked["stage"]
    if stage not in (1, 2):
        raise ValueError(
            f"the launcher asks for ZeRO stage {stage}; use 1 or 2, or distributed_type: FSDP"
        )
    for what in ("offload_optimizer", "offload_param"):
        device = asked.get(what, {}).get("device", "none")
        if device not in ("none", None):
            raise ValueError(
                f"the launcher asks for {what} to {device}, which ZeRO does not do here; use "
                "distributed_type: FSDP with fsdp_offload_params: true"
            )
    return ShardOptions(zero_stage=stage)


def _options(strategy: str) -> ShardOptions:
    if strategy == "deepspeed":
        return zero_options()
    return launcher_options() if strategy == "fsdp" else ShardOptions()


def _on_cpu(config: TrainConfig) -> bool:
    """Whether this run computes on the CPU."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError("--device cuda: no CUDA GPU is visible; use --device cpu")
    return config.device == "cpu" or not available or _flag("ACCELERATE_USE_CPU")


def _launched_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _check_context(context: int, ranks: int) -> None:
    if ranks % context:
        fitting = [n for n in range(1, ranks + 1) if ranks % n == 0]
        raise ValueError(
            f"--context_parallel {context} does not divide the {ranks} ranks; "
            f"use one of {', '.join(map(str, fitting))}"
        )


def _flag(name: str) -> bool:
    """A yes or no that ``accelerate launch`` hands over in the environment."""
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
