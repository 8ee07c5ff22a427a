"""What a preset and a memory tier mean on a GPU, as data, and the choice for the GPU at hand.

A row is `measured` when its figures are in benchmarks/results, and then says where; the others
follow from what the hardware has. Rows are tried in order: the first whose name pattern or
capability fits is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from gen3r.precision import EXACT, FP8, Precision
from gen3r.video_autoencoder import WORKING_GIB
from gen3r_engine.config import TIERS, EngineConfig

Capability = tuple[int, int]


@dataclass(frozen=True)
class Row:
    """One preset on one kind of GPU.

    Parameters
    ----------
    preset, gpu : of what the row speaks, in words.
    pattern : of the device's name, matched from its start.
    capabilities : lowest and highest compute capability.
    precision : what the transformer computes in 8 bits.
    attention : the backend that ``auto`` stands for; ``auto`` leaves it to the measured table of
        gen3r_kernels, tensor by tensor.
    measured : None, or where the figures are.
    """

    preset: str
    gpu: str
    pattern: str
    capabilities: tuple[Capability, Capability]
    precision: Precision
    attention: str = "auto"
    measured: str | None = None

    def fits(self, name: str, capability: Capability) -> bool:
        """Whether the row speaks of a GPU of this name and capability."""
        low, high = self.capabilities
        return low <= capability <= high and re.match(self.pattern, name) is not None


_ON_H100 = "benchmarks/results/nvidia-h100-80gb-hbm3, commit 626520078635"
_HOPPER: tuple[Capability, Capability] = ((9, 0), (9, 0))
# int8 scores and the feed-forward that leaves 8 bits are Hopper kernels; the fp8 products of cuBLAS
# run on Ada and Blackwell too.
_FP8_LINEARS = Precision(linears="fp8", scores="bf16", fused_ffn=False)
ROWS: tuple[Row, ...] = (
    Row("exact", "H100", "NVIDIA H100", _HOPPER, EXACT, measured=_ON_H100),
    Row("exact", "H200", "NVIDIA H200", _HOPPER, EXACT),
    Row("exact", "H20", "NVIDIA H20", _HOPPER, EXACT),
    Row("exact", "A100", "NVIDIA A100", ((8, 0), (8, 0)), EXACT),
    Row("exact", "Ada", "", ((8, 9), (8, 9)), EXACT),
    Row("exact", "Blackwell", "", ((10, 0), (12, 9)), EXACT),
    Row("exact", "other GPUs with bfloat16", "", ((8, 0), (99, 9)), EXACT),
    Row("fp8", "H100", "NVIDIA H100", _HOPPER, FP8, measured=_ON_H100),
    Row("fp8", "H200", "NVIDIA H200", _HOPPER, FP8),
    Row("fp8", "H20", "NVIDIA H20", _HOPPER, FP8),
    Row("fp8", "other Hopper", "", _HOPPER, FP8),
    Row("fp8", "Ada", "", ((8, 9), (8, 9)), _FP8_LINEARS),
    Row("fp8", "Blackwell", "", ((10, 0), (12, 9)), _FP8_LINEARS),
)
LOWEST: dict[str, Capability] = {"exact": (8, 0), "fp8": (8, 9)}


@dataclass(frozen=True)
class TierNeed:
    """GiB of GPU memory that one 49-frame 560 x 560 scene in bf16 needs at its peak in a tier.

    working_gib : of it, what the autoencoders' activations may take; it sets the frames of a chunk.
    """

    tier: str
    gib: float
    measured: str | None = None
    working_gib: float = WORKING_GIB


WEIGHTS_GIB = 17.8  # of the published model in bf16: 9.56 B parameters
# A card sold with 24 or 12 GB has about 23.5 or 11.6 GiB, of which the driver keeps some.
TIER_NEEDS: dict[str, TierNeed] = {
    need.tier: need
    for need in (
        # Allocated at the peak: 27.0 and 15.3 GiB; taken by the allocator: 31.9 and 20.4.
        TierNeed("resident", 28.0, _ON_H100),
        TierNeed("24gb", 22.0, _ON_H100),
        TierNeed("12gb", 11.0, working_gib=2.5),
    )
}


@dataclass(frozen=True)
class DeviceFacts:
    """The device a model is to run on: its GPU's name, capability and GiB of memory.

    free_gib counts what other processes left; a CPU has only its device.
    """

    device: torch.device
    name: str = "cpu"
    capability: Capability | None = None
    total_gib: float | None = None
    free_gib: float | None = None


@dataclass(frozen=True)
class PresetChoice:
    """What a config comes to on one device.

    Parameters
    ----------
    preset, gpu : the preset and the row of the table (``cpu`` off a GPU).
    precision : of the transformer's products.
    attention : backend name for ``gen3r_kernels.Backends``.
    residency : the tier; on a CPU always ``resident``.
    dtype : of the weights, ``bfloat16`` or ``float32``.
    budget_gib : GPU memory that may be used, None on a CPU.
    measured, residency_measured : where the figures are, or None.
    working_gib : memory for the autoencoders' activations.
    """

    preset: str
    gpu: str
    precision: Precision
    attention: str
    residency: str
    dtype: str
    budget_gib: float | None
    measured: str | None
    residency_measured: str | None
    working_gib: float = WORKING_GIB


def device_facts(config: EngineConfig) -> DeviceFacts:
    """The device that the config asks for.

    Raises
    ------
    ValueError : a GPU was asked for and torch finds none, or not that many.
    """
    there = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not there):
        return DeviceFacts(torch.device("cpu"))
    if not there:
        raise ValueError(
            f"device '{config.device}' was asked, but this torch ({torch.__version__}) finds no "
            "CUDA GPU; use device 'cpu', or install a CUDA build of torch and the driver"
        )
    device = torch.device("cuda" if config.device == "auto" else config.device)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device '{config.device}': there are {torch.cuda.device_count()} GPUs; "
            f"use cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        )
    device = torch.device("cuda", index)
    free, total = torch.cuda.mem_get_info(device)
    return DeviceFacts(
        device,
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_capability(device),
        total / 2**30,
        free / 2**30,
    )


def resolve(
    config: EngineConfig,
    name: str = "cpu",
    capability: Capability | None = None,
    total_gib: float | None = None,
    *,
    model_gib: float = WEIGHTS_GIB,
) -> PresetChoice:
    """What the config comes to on a GPU of this name, or on a CPU when `capability` is None.

    `total_gib` is the memory that may be had (what is free, where others use the GPU too);
    `model_gib` the weights in bf16, for a model of another size than the published one.

    Raises
    ------
    ValueError : the preset does not run here, or the memory does not hold the tier; the text names
        what does.
    """
    if capability is None:
        _refuse_fp8_on_cpu(config)
        precision = FP8 if config.preset == "fp8" else EXACT
        dtype = config.dtype or "float32"
        attention = config.attention
        return PresetChoice(
            config.preset, "cpu", precision, attention, "resident", dtype, None, None, None
        )
    row = _row(config, name, capability)
    budget = _smallest(total_gib, config.max_memory_gib)
    dtype = config.dtype or "bfloat16"
    tier = choose_tier(config.residency, budget, dtype, model_gib)
    return PresetChoice(
        config.preset,
        row.gpu,
        row.precision,
        row.attention if config.attention == "auto" else config.attention,
        tier,
        dtype,
        budget,
        row.measured,
        TIER_NEEDS[tier].measured,
        TIER_NEEDS[tier].working_gib,
    )


def resolve_here(
    config: EngineConfig, model_gib: float = WEIGHTS_GIB
) -> tuple[DeviceFacts, PresetChoice]:
    """The device that the config asks for and what the config comes to on it. Raises as both."""
    facts = device_facts(config)
    choice = resolve(config, facts.name, facts.capability, facts.free_gib, model_gib=model_gib)
    return facts, choice


def choose_tier(
    residency: str,
    budget_gib: float | None,
    dtype: str = "bfloat16",
    model_gib: float = WEIGHTS_GIB,
) -> str:
    """The tier asked for, or for ``auto`` the first that the budget holds.

    Raises
    ------
    ValueError : the budget holds no tier, or not the one that was asked for.
    """
    needs = {tier: tier_need(tier, dtype, model_gib) for tier in TIERS}
    if budget_gib is None:
        return "resident" if residency == "auto" else residency
    fitting = [tier for tier in TIERS if needs[tier] <= budget_gib]
    if residency == "auto" and fitting:
        return fitting[0]
    if residency in fitting:
        return residency
    if fitting:
        raise ValueError(
            f"residency '{residency}' needs {needs[residency]:.0f} GiB of GPU memory and "
            f"{budget_gib:.1f} GiB may be used; use residency '{fitting[0]}' or 'auto'"
        )
    smallest = TIERS[-1]
    raise ValueError(
        f"{budget_gib:.1f} GiB of GPU memory may be used and the smallest tier, '{smallest}', "
        f"needs {needs[smallest]:.0f} GiB; free memory, raise max_memory_gib (--max-memory), "
        "or use device 'cpu'"
    )


def tier_need(tier: str, dtype: str = "bfloat16", model_gib: float = WEIGHTS_GIB) -> float:
    """GiB that a tier needs: in proportion to the weights, and twice as much in float32."""
    return TIER_NEEDS[tier].gib * model_gib / WEIGHTS_GIB * (2 if dtype == "float32" else 1)


def presets_here(capability: Capability | None) -> list[str]:
    """Names of the presets that run on a GPU of this capability, or on a CPU (None)."""
    if capability is None:
        return ["exact"]
    return [name for name, lowest in LOWEST.items() if capability >= lowest]


def _row(config: EngineConfig, name: str, capability: Capability) -> Row:
    if config.preset == "fp8" and config.dtype == "float32":
        raise ValueError(
            "preset 'fp8' gives bfloat16 results on a GPU, dtype 'float32' was asked; "
            "use dtype 'bfloat16', or preset 'exact'"
        )
    if config.preset == "exact" and config.dtype == "float32":
        return Row("exact", name, "", (capability, capability), EXACT)
    for row in ROWS:
        if row.preset == config.preset and row.fits(name, capability):
            return row
    here = presets_here(capability)
    advice = f"use preset '{here[0]}'" if here else "use dtype 'float32' with preset 'exact'"
    low = LOWEST[config.preset]
    raise ValueError(
        f"preset '{config.preset}' needs compute capability {low[0]}.{low[1]} or a later one that "
        f"its table knows, {name} has {capability[0]}.{capability[1]}; {advice}"
    )


def _refuse_fp8_on_cpu(config: EngineConfig) -> None:
    if config.preset == "fp8" and config.device != "cpu":
        raise ValueError(
            "preset 'fp8' needs a GPU of compute capability 8.9 and there is none; use preset "
            "'exact', or ask for device 'cpu' to run its arithmetic with the reference operators, "
            "which is slow"
        )


def _smallest(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return min(known) if known else None
