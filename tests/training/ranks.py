"""Runs the checks of `two_ranks` in new processes, and the same training in this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gen3r_training.parallel import backward, make_optimizer, start
from tests.training import tiny


def alone(
    module: nn.Module, loss: Callable[[Any, list[int]], Tensor], batch: int = 2
) -> dict[str, Any]:
    """Training in this process, with both ranks' samples in one batch."""
    config = tiny.diffusion_config()
    optimizer = make_optimizer(module, config, start(config))
    losses, norms = [], []
    for step in range(tiny.STEPS):
        value = loss(module, list(range(batch * step, batch * (step + 1))))
        backward(optimizer, value)
        losses.append(value.item())
        norms.append(optimizer.step(tiny.LR, tiny.MAX_NORM))
    return {"losses": losses, "norms": norms, "weights": optimizer.masters()}


def assert_close(
    found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5
) -> None:
    """Every tensor within the tolerance of its largest value."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        error = (found[name].float() - tensor).abs().max() / tensor.abs().max().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error:.1e}"


def run_ranks(
    folder: Path, checks: list[str], seconds: float, ranks: int = 2
) -> list[dict[str, Any]]:
    """Each rank's results of the checks, which new processes run one after the other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.two_ranks", str(folder), *checks]
    processes, deadline = [], time.monotonic() + seconds
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(folder / f"log-{rank}", "w") as log:
            processes.append(
                subprocess.Popen(
                    command, env=os.environ | common | own, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:  # a rank that fails leaves the others waiting
        while None in (codes := [process.poll() for process in processes]):
            if any(codes) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = "\n".join((folder / f"log-{rank}").read_text() for rank in range(ranks))
    assert not any(process.returncode for process in processes), logs
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(ranks)]
