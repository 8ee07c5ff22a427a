"""What a training run is asked to do: one frozen value per stage, checked when it is made.

Nothing here reads a file or touches a device; folders and checkpoints are checked by
`gen3r_training.stages.plan_stage`. The command line (`gen3r_training.arguments`) has one flag for
each field, of the same name.

Stage 1's loss, with recon = image tokens + camera tokens + 10 camera + 2 depth + 1 point (all terms
against VGGT's own heads on the true tokens) and KL = KL(adapter posterior || Wan VAE posterior):

| weight of       | default        | --upstream_loss_weights |
| --------------- | -------------- | ----------------------- |
| recon           | lambda_rec     | 0.5                     |
| cosine distance | 0.2 lambda_rec | 0.1                     |
| KL              | lambda_kl w    | 2.0 w                   |

w = 0.1 * 10^floor(log10(weighted recon / KL)), and 0.1 where the KL is not above the weighted
recon; no gradient flows through it. So lambda_rec 0.5 with lambda_kl 2 is upstream's recipe, and
lambda_kl 0 has no KL at all. `kl_reduction` says over which axes the KL is summed: ``upstream`` as
diffusers does (channels, time and height; the width is averaged), ``full`` over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from gen3r_kernels import Backends

STAGES = ("adapter", "diffusion")
MIXED_PRECISIONS = ("no", "bf16")
MASTER_WEIGHTS = ("float32", "stochastic")
CHECKPOINTING = ("none", "selective", "full")
REPORTS = ("tensorboard", "none")
SCHEDULES = ("constant", "cosine")
DEVICES = ("auto", "cpu", "cuda")
STRATEGIES = ("auto", "none", "fsdp", "deepspeed")
KL_REDUCTIONS = ("upstream", "full")
# none: every timestep alike. logit_normal and mode draw timesteps unevenly, sigma_sqrt and cosmap
# weigh their losses (Stable Diffusion 3, arXiv 2403.03206, section 3.1).
WEIGHTINGS = ("none", "logit_normal", "mode", "sigma_sqrt", "cosmap")
RESOLUTION_STEP = 56  # pixels: VGGT's patches of 14, the VAE's stride of 8
EMA_DECAY = 0.999  # of a bare --ema
TOLERANCE = 1e-6  # of the sum of probabilities


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What both stages share.

    Parameters
    ----------
    data_root : folders that hold train/ and val/, one data set each.
    data_weights : how often each data set is drawn, by scenes; empty: alike.
    skip_bad_scenes : leave out scenes that do not fit the layout instead of ending.
    output_dir : receives checkpoints/, logs and final_pipeline/.
    num_epochs, max_steps : the run ends at whichever comes first; steps are optimiser steps.
    batch_size : samples per data rank and micro step.
    gradient_accumulation : micro steps per optimiser step.
    num_frames : frames of a clip, 4k + 1. resolution : pixels of its sides, a multiple of 56.
    max_stride : a clip takes every n-th frame, n drawn from 1..max_stride.
    mixed_precision : ``bf16``: the trained module is held and computed in bf16 (master weights as
        `master_weights`), the frozen ones too on a GPU; ``no``: float32 everywhere.
    master_weights : ``float32`` copies beside the bf16 parameters, or ``stochastic``: none, updates
        are rounded to bf16 stochastically.
    gradient_checkpointing : which activations are computed again in the backward pass: stage 1
        has two forms only, ``none`` and another.
    ema : decay of the averaged weights, 0 for none.
    validate_every, save_every : in optimiser steps, 0 for never (the end of a run is always saved).
    keep : newest checkpoints that stay. resume : ``auto`` (the newest of output_dir) or a folder.
    init_from : weights to begin with: a pipeline or component folder. None: stage 1 begins with
        random weights, stage 2 with the pipeline's.
    learning_rate, weight_decay, beta1, beta2, epsilon : of AdamW.
    schedule, warmup_steps, min_lr_ratio : learning rate: linear warm-up, then constant, or a cosine
        down to min_lr_ratio of it.
    clip_norm, clip_norm_end : limit of the gradient's norm at the start and from a tenth of the
        steps on, linear between; clip_norm 0 does not clip.
    num_workers : processes that read samples, per rank; 0 reads in place.
    strategy : how ranks share the model; ``auto`` takes what the launcher says.
    context_parallel : ranks that share one sample's tokens (stage 2).
    latent_cache : folder of ``gen3r-engine prepare latents``, whose samples are not encoded again.
    attention, operators : backends by name, as `gen3r_kernels.Backends`.
    compile : put the transformer's blocks through torch.compile (stage 2).

    Raises
    ------
    ValueError : a value outside its limits; the text begins with the flag.
    """

    stage: ClassVar[str] = ""

    data_root: tuple[Path, ...]
    output_dir: Path
    data_weights: tuple[float, ...] = ()
    skip_bad_scenes: bool = False
    num_epochs: int = 1
    batch_size: int = 1
    learning_rate: float = 1e-4
    num_frames: int = 49
    resolution: int = 560
    max_stride: int = 2
    mixed_precision: str = "bf16"
    master_weights: str = "float32"
    seed: int = 42
    max_steps: int | None = None
    gradient_accumulation: int = 1
    gradient_checkpointing: str = "none"
    ema: float = 0.0
    validate_every: int = 0
    save_every: int = 500
    keep: int = 3
    resume: str | None = None
    init_from: Path | None = None
    report: str = "tensorboard"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    schedule: str = "constant"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.2
    clip_norm: float = 0.5
    clip_norm_end: float = 0.5
    num_workers: int = 2
    device: str = "auto"
    strategy: str = "auto"
    context_parallel: int = 1
    latent_cache: Path | None = None
    attention: str = "auto"
    operators: str = "auto"
    compile: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        self._check_data()
        self._check_optimizer()
        for flag, known in (
            ("mixed_precision", MIXED_PRECISIONS),
            ("master_weights", MASTER_WEIGHTS),
            ("gradient_checkpointing", CHECKPOINTING),
            ("report", REPORTS),
            ("schedule", SCHEDULES),
            ("device", DEVICES),
            ("strategy", STRATEGIES),
        ):
            _known(flag, getattr(self, flag), known)
        for flag in ("num_epochs", "batch_size", "gradient_accumulation", "keep"):
            _at_least(flag, getattr(self, flag), 1)
        for flag in ("context_parallel", "max_stride"):
            _at_least(flag, getattr(self, flag), 1)
        for flag in ("validate_every", "save_every", "num_workers", "seed"):
            _at_least(flag, getattr(self, flag), 0)
        if self.max_steps is not None:
            _at_least("max_steps", self.max_steps, 1)
        _require(0 <= self.ema < 1, f"--ema {self.ema}: a decay lies in 0..1, below 1 (0 is off)")
        if self.master_weights == "stochastic" and self.mixed_precision == "no":
            raise ValueError(
                "--master_weights stochastic rounds to bf16; use --mixed_precision bf16 with it"
            )
        _ = self.backends

    def _check_data(self) -> None:
        _require(len(self.data_root) > 0, "--data_root: give at least one folder")
        count, weights = len(self.data_root), self.data_weights
        if weights and len(weights) != count:
            raise ValueError(
                f"--data_weights: {len(weights)} weights for {count} data roots; give one for each"
            )
        if weights and not (all(0 <= w < math.inf for w in weights) and sum(weights) > 0):
            raise ValueError(f"--data_weights {_words(weights)}: not negative, and not all 0")
        frames, size = self.num_frames, self.resolution
        if frames < 1 or frames % 4 != 1:
            raise ValueError(
                f"--num_frames {frames}: clips have 4k + 1 frames; "
                f"use {max(1, frames - (frames - 1) % 4)} or {max(1, frames + (1 - frames) % 4)}"
            )
        if size < RESOLUTION_STEP or size % RESOLUTION_STEP:
            near = max(RESOLUTION_STEP, round(size / RESOLUTION_STEP) * RESOLUTION_STEP)
            raise ValueError(
                f"--resolution {size} is not a multiple of {RESOLUTION_STEP}; use {near}"
            )

    def _check_optimizer(self) -> None:
        for flag in ("learning_rate", "epsilon"):
            value = getattr(self, flag)
            _require(0 < value < math.inf, f"--{flag} {value} must be above 0")
        for flag in ("beta1", "beta2"):
            value = getattr(self, flag)
            _require(0 <= value < 1, f"--{flag} {value} must lie in 0..1, below 1")
        for flag in ("weight_decay", "clip_norm", "clip_norm_end"):
            value = getattr(self, flag)
            _require(0 <= value < math.inf, f"--{flag} {value} must not be negative")
        _require(
            0 <= self.min_lr_ratio <= 1, f"--min_lr_ratio {self.min_lr_ratio} must lie in 0..1"
        )
        _at_least("warmup_steps", self.warmup_steps, 0)

    @property
    def backends(self) -> Backends:
        """The operators' backends, of the trained module and of the frozen ones."""
        # Imported here: the command line reads this module's defaults and shall not wait for torch.
        from gen3r_kernels import Backends

        return Backends(attention=self.attention, operators=self.operators)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(TrainConfig):
    """Stage 1: the geometry adapter. The defaults below are the seed's, the rest upstream's.

    Parameters
    ----------
    vggt_path, wan_vae_path : a component's folder, a file in it, or a folder with ``vggt/`` or
        ``wan_vae/`` in it.
    pretrained_path : a pipeline folder; with it `final_pipeline` is that pipeline with the new
        adapter, and its adapter is the start. None: `final_pipeline` holds ``geo_adapter/`` alone,
        unless `init_from` is a whole pipeline, which then serves.
    lambda_rec, lambda_kl, upstream_loss_weights, kl_reduction : see the module's docstring.
    """

    stage: ClassVar[str] = "adapter"

    vggt_path: Path
    wan_vae_path: Path
    pretrained_path: Path | None = None
    lambda_rec: float = 1.0
    lambda_kl: float = 0.001
    upstream_loss_weights: bool = False
    kl_reduction: str = "upstream"

    num_epochs: int = 100
    num_frames: int = 25
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    schedule: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        _known("kl_reduction", self.kl_reduction, KL_REDUCTIONS)
        for flag in ("lambda_rec", "lambda_kl"):
            value = getattr(self, flag)
            _require(0 <= value < math.inf, f"--{flag} {value} must not be negative")
        if self.lambda_rec == 0 and not self.upstream_loss_weights:
            raise ValueError("--lambda_rec 0 trains nothing; use a weight above 0")
        if self.context_parallel != 1:
            raise ValueError("--context_parallel belongs to stage 2; use 1 for stage 1")
        if self.compile:
            raise ValueError("--compile belongs to stage 2; leave it out for stage 1")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(TrainConfig):
    """Stage 2: the diffusion transformer. The defaults below are the seed's, the rest upstream's.

    Parameters
    ----------
    pretrained_path : the pipeline folder: frozen modules, tokenizer, scheduler, first weights.
    geo_adapter : another adapter than the pipeline's (stage 1's `final_pipeline`), or None.
    text_dropout_prob, camera_dropout_prob : per sample: no prompt, no cameras.
    task_1view_prob, task_2view_prob, task_allview_prob : sum to 1.
    upstream_control_geometry : the geometry half of the control latents holds the masked video's
        encoded tokens, as upstream trains, instead of zeros, as everybody infers.
    weighting : of timesteps, one of `WEIGHTINGS`.
    kept_blocks : with selective recomputation: of how many blocks the linear layers' results stay.
    """

    stage: ClassVar[str] = "diffusion"

    pretrained_path: Path
    geo_adapter: Path | None = None
    text_dropout_prob: float = 0.1
    camera_dropout_prob: float = 0.1
    task_1view_prob: float = 0.4
    task_2view_prob: float = 0.3
    task_allview_prob: float = 0.3
    upstream_control_geometry: bool = False
    weighting: str = "none"
    kept_blocks: int = 0

    num_epochs: int = 50
    num_frames: int = 49
    learning_rate: float = 1e-5
    weight_decay: float = 0.03
    warmup_steps: int = 50
    clip_norm_end: float = 0.25
    gradient_checkpointing: str = "selective"

    def __post_init__(self) -> None:
        super().__post_init__()
        _known("weighting", self.weighting, WEIGHTINGS)
        _at_least("kept_blocks", self.kept_blocks, 0)
        if self.kept_blocks and self.gradient_checkpointing != "selective":
            raise ValueError(
                f"--kept_blocks {self.kept_blocks} goes with --gradient_checkpointing selective, "
                f"not with {self.gradient_checkpointing}"
            )
        tasks = ("task_1view_prob", "task_2view_prob", "task_allview_prob")
        for flag in ("text_dropout_prob", "camera_dropout_prob", *tasks):
            value = getattr(self, flag)
            _require(0 <= value <= 1, f"--{flag} {value}: a probability lies in 0..1")
        if abs(sum(self.task_probabilities) - 1) > TOLERANCE:
            raise ValueError(
                f"--task_1view_prob, --task_2view_prob and --task_allview_prob "
                f"{_words(self.task_probabilities)} sum to {sum(self.task_probabilities):g}; "
                "they must sum to 1"
            )

    @property
    def task_probabilities(self) -> tuple[float, float, float]:
        """Of 1view, 2view and allview."""
        return self.task_1view_prob, self.task_2view_prob, self.task_allview_prob


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _at_least(flag: str, value: int, least: int) -> None:
    _require(value >= least, f"--{flag} {value} must be at least {least}")


def _known(flag: str, value: str, known: Sequence[str]) -> None:
    _require(value in known, f"--{flag} '{value}' is unknown; known: {', '.join(known)}")


def _words(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
