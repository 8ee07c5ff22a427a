"""What a launch may ask for: strategies, the launcher's options, shipped configurations."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_multi_gpu_env

from gen3r_training.parallel import Parallel, check_heads, master_mode, parameter_dtype, start
from gen3r_training.parallel import launch as launching
from gen3r_training.parallel.launch import (
    ShardOptions,
    choose_strategy,
    launcher_options,
    zero_options,
)
from tests.conftest import REPOSITORY
from tests.training import tiny

CONFIGS = REPOSITORY / "training" / "configs"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("asked", "ranks", "launched", "chosen"),
    [
        ("auto", 1, False, "none"),
        ("auto", 1, True, "none"),
        ("auto", 8, True, "fsdp"),
        ("none", 1, True, "none"),
        ("fsdp", 1, True, "fsdp"),
    ],
)
def test_strategy(asked: str, ranks: int, launched: bool, chosen: str) -> None:
    assert choose_strategy(asked, ranks, launched=launched) == chosen


@pytest.mark.parametrize(
    ("asked", "ranks", "launched", "message"),
    [
        ("none", 2, True, "2 models that never meet; use auto or fsdp"),
        ("fsdp", 1, False, "needs a launcher"),
        ("deepspeed", 1, False, "needs a launcher"),
        ("deepspeed", 2, True, "DeepSpeed is not installed"),
    ],
)
def test_strategies_that_cannot_be(
    asked: str, ranks: int, launched: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        choose_strategy(asked, ranks, launched=launched)


def test_the_launcher_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert choose_strategy("auto", 1, launched=True) == "fsdp"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(launching, "find_spec", lambda name: object())
    assert choose_strategy("auto", 1, launched=True) == "deepspeed"
    with pytest.raises(ValueError, match="asks for DeepSpeed and --strategy for fsdp"):
        choose_strategy("fsdp", 2, launched=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_parallel": 2}, "2 does not divide the 1 ranks; use one of 1"),
        ({"strategy": "fsdp"}, "needs a launcher"),
    ],
)
def test_one_process(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start(tiny.diffusion_config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_parallel": 3}, "3 does not divide the 8 ranks; use one of 1, 2, 4, 8"),
        (
            {"mixed_precision": "bf16", "master_weights": "stochastic"},
            "stochastic is for one process",
        ),
    ],
)
def test_eight_processes(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a process group is made."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match=message):
        start(tiny.diffusion_config(**changes))


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: no CUDA GPU is visible"):
        start(tiny.diffusion_config(device="cuda"))
    assert start(tiny.diffusion_config(device="auto")).device == torch.device("cpu")


def test_heads() -> None:
    check_heads(12, 4)
    with pytest.raises(ValueError, match=r"8 does not divide .* 12 heads; use one of 1, 2"):
        check_heads(12, 8)


@pytest.mark.parametrize(
    ("precision", "strategy", "mode", "dtype"),
    [
        ("no", "none", "none", torch.float32),
        ("bf16", "none", "float32", torch.bfloat16),
        ("bf16", "fsdp", "none", torch.float32),
        ("bf16", "deepspeed", "float32", torch.bfloat16),
    ],
)
def test_who_holds_float32_weights(
    precision: str, strategy: str, mode: str, dtype: torch.dtype
) -> None:
    config = tiny.diffusion_config(mixed_precision=precision)
    parallel = Parallel(rank=0, world=1, device=torch.device("cpu"), strategy=strategy)
    assert (master_mode(config, parallel), parameter_dtype(config, parallel)) == (mode, dtype)


@pytest.mark.parametrize(
    ("name", "machines", "reshard"),
    [("accelerate_8gpu", 1, True), ("accelerate_24gpu", 3, False)],
)
def test_shipped_configurations(
    name: str, machines: int, reshard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read by accelerate, handed over in the environment and read again here."""
    args = _accelerate_reads(CONFIGS / f"{name}.yaml", "--main_process_port", "0")
    assert (args.num_processes, args.num_machines) == (8 * machines, machines)
    assert args.mixed_precision == "bf16" and args.use_fsdp
    environment = prepare_multi_gpu_env(args)
    assert args.nproc_per_node == "8"
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert launcher_options() == ShardOptions(reshard=reshard)
    assert choose_strategy("auto", 8 * machines, launched=True) == "fsdp"


def test_shipped_configuration_of_one_gpu() -> None:
    args = _accelerate_reads(CONFIGS / "accelerate_1gpu.yaml")
    assert args.num_processes == 1 and not args.use_fsdp and not args.multi_gpu


def _accelerate_reads(config: Path, *more: str) -> Any:
    command = ["--config_file", str(config), *more, "train_diffusion.py", "--data_root", "DATA"]
    args = accelerate_launch.launch_command_parser().parse_args(command)
    return accelerate_launch._validate_launch_command(args)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use --gradient_checkpointing"),
    ],
)
def test_options_that_are_not_served(
    changes: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        launcher_options()


def test_offload(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher_options() == ShardOptions(reshard=True, offload=False)
    for name in ("ACCELERATE_USE_FSDP", "FSDP_OFFLOAD_PARAMS"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert launcher_options() == ShardOptions(reshard=True, offload=True)


def test_zero_under_torchrun() -> None:
    assert zero_options() == ShardOptions(zero_stage=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stage": 2}, None),
        ({"stage": 3}, "ZeRO stage 3; use 1 or 2"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "fsdp_offload_params: true"),
    ],
)
def test_zero_under_accelerate(
    config: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": config})
    monkeypatch.setattr(launching, "DeepSpeedPlugin", lambda: plugin)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    if message is None:
        assert zero_options().zero_stage == config["stage"]
        return
    with pytest.raises(ValueError, match=message):
        zero_options()
