"""What a resident training run is asked to do: one frozen value, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("vae", "vggt", "text", "adapter", "diffusion")
DTYPES = ("bfloat16", "float32")
DEVICES = ("auto", "cpu", "cuda")
PARTS = ("transformer", "wan_vae", "geo_adapter", "vggt", "text_encoder", "clip_image_encoder")

# What each stage takes where nothing is said: batch (clips of 17 frames), learning rate, dtype.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "vae": {"batch": 16, "learning_rate": 2e-3, "dtype": "bfloat16"},
    "vggt": {"batch": 24, "learning_rate": 1e-3, "dtype": "bfloat16"},
    "text": {"batch": 128, "learning_rate": 2e-3, "dtype": "float32"},
    "adapter": {"batch": 16, "learning_rate": 2e-3, "dtype": "bfloat16"},
    "diffusion": {"batch": 128, "learning_rate": 2e-3, "dtype": "bfloat16"},
}


@dataclass(frozen=True, kw_only=True)
class ResidentConfig:
    """One stage of training.

    Parameters
    ----------
    stage : one of `STAGES`.
    data : folder of packed clips (``gen3r-engine prepare procedural --form packed``).
    output : the pipeline folder to write; it must not exist.
    model : the pipeline folder to begin with; None: NANO with seeded random weights.
    take : components that come from other pipeline folders: (name, folder).
    steps : optimiser steps. minutes : the run ends after so long even if steps are left; None: no
        limit. The learning rate follows whichever is further.
    batch : clips a step. scenes : most training clips to load; None: all.
    held_out : held-out clips of an evaluation.
    learning_rate, weight_decay, beta2, warmup : AdamW, after a linear warm-up a cosine to 0.
    ema : decay of the averaged weights, which are what is kept; 0 for none.
    clip_norm : limit of the gradient's norm, 0 for none.
    dtype : ``bfloat16`` (with float32 master weights) or ``float32`` (TF32 products on a GPU).
    attention, operators : backends by name, as `gen3r_kernels.Backends`.
    captured : forward and backward are replayed as CUDA graphs (on a GPU).
    log_every, evaluate_every : in steps, 0 for never; the end is always evaluated.

    Raises
    ------
    ValueError : a value outside its limits; the text begins with the flag.
    """

    stage: str
    data: Path
    output: Path
    model: Path | None = None
    take: tuple[tuple[str, Path], ...] = ()
    steps: int = 5000
    minutes: float | None = None
    batch: int = 16
    scenes: int | None = None
    held_out: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    beta2: float = 0.99
    warmup: int = 200
    ema: float = 0.999
    clip_norm: float = 1.0
    dtype: str = "bfloat16"
    attention: str = "auto"
    operators: str = "auto"
    captured: bool = True
    seed: int = 2601
    device: str = "auto"
    log_every: int = 100
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        for flag, known in (("stage", STAGES), ("dtype", DTYPES), ("device", DEVICES)):
            value = getattr(self, flag)
            if value not in known:
                raise ValueError(f"--{flag} '{value}' is unknown; known: {', '.join(known)}")
        for name, _ in self.take:
            if name not in PARTS:
                raise ValueError(f"--take '{name}' is unknown; known: {', '.join(PARTS)}")
        for flag, least in (
            *(("steps", 1), ("batch", 1), ("held_out", 1), ("warmup", 0), ("seed", 0)),
            *(("log_every", 0), ("evaluate_every", 0)),
        ):
            if getattr(self, flag) < least:
                raise ValueError(f"--{flag} {getattr(self, flag)} must be at least {least}")
        if self.scenes is not None and self.scenes < 1:
            raise ValueError(f"--scenes {self.scenes} must be at least 1")
        for flag in ("learning_rate", "minutes"):
            value = getattr(self, flag)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{flag} {value} must be above 0")
        for flag in ("weight_decay", "clip_norm"):
            if not 0 <= getattr(self, flag) < math.inf:
                raise ValueError(f"--{flag} {getattr(self, flag)} must not be negative")
        for flag in ("ema", "beta2"):
            if not 0 <= getattr(self, flag) < 1:
                raise ValueError(f"--{flag} {getattr(self, flag)} must lie in 0..1, below 1")

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of step `step` (from 0), `progress` (0..1) through the run."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
