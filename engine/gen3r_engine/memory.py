"""GPU memory planned before a run, and its end told with what would help.

need = weights on the GPU + the working memory of the stage. Working memory is a table of GiB at
49 frames of 560 x 560 in bf16, guided, and grows with frames times pixels (attention works in
blocks, so nothing grows with their square).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gen3r.scene import SceneRequest
from gen3r_engine.config import TIERS, EngineConfig
from gen3r_engine.presets import tier_need

FULL = 49 * 560 * 560  # frames x pixels that the table speaks of
SPARE_GIB = 0.5  # CUDA context of libraries, fragments between allocations


@dataclass(frozen=True)
class Working:
    """GiB that a stage takes at `FULL` in bf16: once a scene, and once however many scenes.

    `measured` says where the figures are; None marks an estimate from the tensors' sizes.
    """

    per_scene: float
    shared: float
    measured: str | None = None


# denoise, a scene: stream, two 8960-wide halves of the feed-forward, q, k, v and text keys of all
# layers, of two guided rows. Encoders and decoders work on one scene at a time.
WORKING: dict[str, Working] = {
    "encode text": Working(0.0, 0.5),
    "encode views": Working(0.1, 4.2),
    "denoise": Working(3.5, 0.3),
    "decode appearance": Working(0.0, 4.7),
    "decode geometry": Working(0.0, 5.0),
    "fuse": Working(0.0, 3.0),  # with the points, the depth and the pixels
    "copy to the host": Working(0.0, 0.8),
}
BESIDE = (
    "encode views",
    "decode appearance",
    "decode geometry",
    "fuse",
)  # beside another's denoising


class OutOfMemory(RuntimeError):
    """The GPU's memory did not hold a stage.

    stage : its name; needed : GiB that were estimated, None when unknown; advice : what fits.
    """

    def __init__(self, stage: str, needed: float | None, advice: str, detail: str = "") -> None:
        need = f" (about {needed:.1f} GiB needed)" if needed is not None else ""
        told = f": {detail}" if detail else ""
        super().__init__(f"out of GPU memory in stage '{stage}'{need}{told}; {advice}")
        self.stage = stage
        self.needed = needed
        self.advice = advice


def working_gib(
    stage: str, frames: int, height: int, width: int, batch: int = 1, dtype: str = "bfloat16"
) -> float:
    """GiB of working memory of a stage. ValueError for an unknown stage."""
    if stage not in WORKING:
        raise ValueError(f"stage '{stage}' is unknown; known: {', '.join(WORKING)}")
    row = WORKING[stage]
    scale = frames * height * width / FULL * (2 if dtype == "float32" else 1)
    return (row.per_scene * batch + row.shared) * scale


def needed_gib(
    frames: int,
    height: int,
    width: int,
    batch: int,
    weights_gib: float,
    *,
    overlap: bool = True,
    dtype: str = "bfloat16",
) -> float:
    """GiB at the peak of a batch: weights, denoising, and beside it another's encode or decode.

    Without overlap the larger of denoising and any other stage counts.
    """
    shape = (frames, height, width)
    denoise = working_gib("denoise", *shape, batch, dtype)
    others = max(working_gib(stage, *shape, batch, dtype) for stage in BESIDE)
    peak = denoise + others if overlap else max(denoise, others)
    return weights_gib + SPARE_GIB + peak


def plan_batches(
    requests: Sequence[SceneRequest],
    config: EngineConfig,
    weights_gib: float,
    budget_gib: float | None,
) -> list[list[SceneRequest]]:
    """Requests in their order, in batches: neighbours of one shape, at most `max_batch`, fitting.

    Parameters
    ----------
    weights_gib : GiB of weights on the GPU while denoising.
    budget_gib : GiB that may be used, weights included; None where nothing limits (a CPU).

    Raises
    ------
    ValueError : no requests, or one that does not fit even alone; it names the stage, the need and
        the tier or the size that fits.
    """
    if not requests:
        raise ValueError("no requests given")
    batches: list[list[SceneRequest]] = []
    for request in requests:
        shape = _shape(request)
        last = batches[-1] if batches else None
        if (
            last is not None
            and _shape(last[0]) == shape
            and len(last) < config.max_batch
            and _fits(shape, len(last) + 1, config, weights_gib, budget_gib)
        ):
            last.append(request)
            continue
        if not _fits(shape, 1, config, weights_gib, budget_gib):
            raise ValueError(_does_not_fit(shape, config, weights_gib, budget_gib or 0.0))
        batches.append([request])
    return batches


def advice(
    residency: str, batch: int = 1, budget_gib: float | None = None, dtype: str = "bfloat16"
) -> str:
    """What a person may change to need less memory, the least costly first."""
    steps = []
    if batch > 1:
        steps.append(f"a batch of {batch // 2} (max_batch, --batch)")
    smaller = TIERS[TIERS.index(residency) + 1 :] if residency in TIERS else ()
    for tier in smaller:
        need = tier_need(tier, dtype)
        if budget_gib is None or need <= budget_gib:
            steps.append(f"residency '{tier}' ({need:.0f} GiB for 49 frames of 560 x 560)")
            break
    steps.append("fewer frames or a smaller size")
    return "use " + ", or ".join(steps)


@contextmanager
def guard(
    stage: str,
    needed_gib: float | None = None,
    tiers: str | Sequence[str] = (),
    *,
    batch: int = 1,
    budget_gib: float | None = None,
) -> Iterator[None]:
    """Inside, running out of GPU memory raises `OutOfMemory` with the stage, the need and advice.

    `tiers` : the tier in use, or the tiers that would fit. A batch is told to be halved first.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        if isinstance(tiers, str):
            told = advice(tiers, batch, budget_gib)
        else:
            steps = [f"a batch of {batch // 2} (max_batch, --batch)"] if batch > 1 else []
            steps += [f"residency '{tier}'" for tier in tiers]
            told = "use " + ", or ".join([*steps, "fewer frames or a smaller size"])
        raise OutOfMemory(stage, needed_gib, told, _first_line(error)) from error


def limit_process(max_memory_gib: float | None, device: torch.device) -> None:
    """Hold this process's tensors on a GPU to so many GiB; None takes an earlier limit away."""
    if device.type != "cuda":
        return
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    share = 1.0 if max_memory_gib is None else min(1.0, max_memory_gib / total)
    torch.cuda.set_per_process_memory_fraction(share, device)


def _shape(request: SceneRequest) -> tuple[int, int, int]:
    return request.num_frames, request.height, request.width


def _fits(
    shape: tuple[int, int, int],
    batch: int,
    config: EngineConfig,
    weights_gib: float,
    budget_gib: float | None,
) -> bool:
    if budget_gib is None:
        return True
    dtype = config.dtype or "bfloat16"
    needed = needed_gib(*shape, batch, weights_gib, overlap=config.overlap, dtype=dtype)
    return needed <= budget_gib


def _does_not_fit(
    shape: tuple[int, int, int], config: EngineConfig, weights_gib: float, budget_gib: float
) -> str:
    dtype = config.dtype or "bfloat16"
    stages = {stage: working_gib(stage, *shape, 1, dtype) for stage in ("denoise", *BESIDE)}
    stage = max(stages, key=lambda name: stages[name])
    needed = needed_gib(*shape, 1, weights_gib, overlap=config.overlap, dtype=dtype)
    frames, height, width = shape
    told = advice(config.residency, 1, budget_gib, dtype)
    if config.overlap:
        without = needed_gib(*shape, 1, weights_gib, overlap=False, dtype=dtype)
        if without <= budget_gib:
            told = f"use overlap=False ({without:.1f} GiB), or " + told.removeprefix("use ")
    return (
        f"{frames} frames of {height} x {width} need about {needed:.1f} GiB of GPU memory "
        f"({weights_gib:.1f} GiB of weights; the largest stage, '{stage}', "
        f"{stages[stage]:.1f} GiB) and {budget_gib:.1f} GiB may be used; {told}"
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
