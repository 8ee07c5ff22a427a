"""A stage of a few weights for tests of the training loop, and runs of it in other processes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from gen3r_training import checkpoints
from gen3r_training.config import AdapterConfig
from gen3r_training.data import Notice, Sample, Ticket
from gen3r_training.loop import train
from gen3r_training.parallel import Parallel, start
from gen3r_training.stages import StepResult, ValidationResult
from gen3r_training.stopping import TrainingError
from gen3r_training.summed_files import SummedFile

ONE = Parallel(rank=0, world=1, device=torch.device("cpu"), strategy="none")
SCENES = 6
Hook = Callable[[int, Tensor], Tensor]  # (place of the first sample, loss) -> loss


class ToyDataset:
    """Scenes whose frames are random numbers of the ticket's seed."""

    def __init__(self, scenes: int = SCENES) -> None:
        self.counts = (scenes,)
        self.skipped: dict[str, str] = {}

    def fetch_noticed(self, ticket: Ticket) -> tuple[Sample, tuple[Notice, ...]]:
        frames = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(ticket.seed))
        eye = torch.eye(4).expand(1, 4, 4)
        name = f"scene_{ticket.scene}"
        sample = Sample(frames, eye, eye[:, :3, :3], "", name, ticket.seed, ticket.index, None)
        return sample, ()


class ToyStage:
    """Regression of the mean of the pixels, with noise from the global random state.

    noisy : off: the loss is a function of the samples alone. hook : sees and replaces losses.
    """

    name = "adapter"
    flops = 1e6
    device = torch.device("cpu")

    def __init__(
        self,
        width: int = 8,
        scenes: int = SCENES,
        hook: Hook | None = None,
        *,
        noisy: bool = True,
    ) -> None:
        torch.manual_seed(7)
        self.module = nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 1))
        self.dataset = ToyDataset(scenes)
        self.hook, self.noisy = hook, noisy
        self.seen: list[int] = []

    def step(self, samples: list[Sample]) -> StepResult:
        self.seen += [sample.index for sample in samples]
        pixels = torch.stack([sample.frames.flatten() for sample in samples])
        target = pixels.mean(1, keepdim=True) + 0.1 * self.noisy * torch.randn(len(samples), 1)
        loss = (self.module(pixels) - target).square().mean()
        if self.hook is not None:
            loss = self.hook(samples[0].index, loss)
        return StepResult(loss, {"error": loss.detach().sqrt(), "pixels": float(pixels.mean())})

    def validate(self, folder: Path, step: int) -> ValidationResult:
        video = (torch.rand(3, 4, 8, 3) * 255).to(torch.uint8)
        weight = float(self.module.state_dict()["0.weight"].sum())
        return ValidationResult({"weight": weight}, {"video": video}, "a prompt")

    def save_final(self, folder: Path, weights: dict[str, Tensor]) -> None:
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")


def config(output: Path, **changes: Any) -> AdapterConfig:
    """Eight steps of one sample."""
    given: dict[str, Any] = {
        "data_root": (Path("data"),),
        "output_dir": output,
        "vggt_path": Path("vggt"),
        "wan_vae_path": Path("wan_vae"),
        "mixed_precision": "no",
        "num_epochs": 100,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "num_workers": 0,
        "report": "none",
        "save_every": 3,
    }
    return AdapterConfig(**{**given, **changes})


def run(output: Path, stage: ToyStage | None = None, **changes: Any) -> Path:
    """Train the toy in this process."""
    return train(stage or ToyStage(), config(output, **changes), ONE)


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in metrics(output)]


def final_weights(output: Path) -> dict[str, Tensor]:
    return load_file(output / "final_pipeline" / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------ in other processes


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def kill_in_step(output: Path, place: int, changes: dict[str, Any]) -> None:
    """Train until sample `place`, there die between forward and backward."""

    def hook(first: int, loss: Tensor) -> Tensor:
        if first == place:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    run(output, ToyStage(hook=hook), **changes)


def kill_in_save(output: Path, step: int, changes: dict[str, Any]) -> None:
    """Train until the checkpoint of `step`, there die with some of its bytes written."""
    write = SummedFile.write

    def dying(self: Any, data: Any) -> int:
        count = write(self, data)
        if f"{checkpoints.folder_name(step)}.partial" in str(self.name):
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    SummedFile.write = dying  # type: ignore[method-assign]
    run(output, **changes)


def two_ranks(rank: int, output: Path, port: int, changes: dict[str, Any]) -> None:
    """Train without noise on two ranks, the weights sharded; an error goes into told-RANK."""
    launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in launch.items()}
    os.environ["MASTER_ADDR"] = "localhost"
    settings = config(output, device="cpu", **changes)
    parallel = start(settings)
    stage = ToyStage(noisy=False)
    fully_shard(stage.module, mesh=parallel.shards)
    try:
        train(stage, settings, parallel)
    except (TrainingError, ValueError) as error:
        (output / f"told-{rank}").write_text(str(error))
        raise SystemExit(1) from None
    finally:
        parallel.close()


def two_ranks_full(rank: int, output: Path, port: int) -> None:
    """The disk of the second rank is full."""

    def full(self: Any, data: Any) -> int:
        self.error = OSError(errno.ENOSPC, "No space left on device")
        raise self.error

    if rank == 1:
        SummedFile.write = full  # type: ignore[method-assign]
    two_ranks(rank, output, port, {})


def elsewhere(target: Callable[..., Any], *args: Any, processes: int = 1) -> list[int]:
    """Run target(*args) in other processes (with (rank, *args) when there are several).

    They are forked from a process that has imported torch and nothing else. Returns exit codes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.toy"])
    ranks = [(rank,) for rank in range(processes)] if processes > 1 else [()]
    started = [context.Process(target=target, args=(*rank, *args)) for rank in ranks]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        process.kill()  # only one that hangs is still there
    return [process.exitcode if process.exitcode is not None else -1 for process in started]
