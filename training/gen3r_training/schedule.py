"""Learning rate and clip norm as functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from gen3r_training.config import TrainConfig
from gen3r_training.losses import linear_decay

CLIP_DECAY = 0.1  # of all steps, over which upstream's stage 2 lowers its clip norm


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate of step `step` (from 0) of `total`.

    It rises as (step + 1) / warmup_steps, so that no step is without effect, then stays, or follows
    half a cosine from learning_rate at the end of the warm-up to min_lr_ratio of it at `total`.
    """
    base, warmup = config.learning_rate, config.warmup_steps
    if step < warmup:
        return base * (step + 1) / warmup
    if config.schedule == "constant":
        return base
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    ratio = config.min_lr_ratio
    return base * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def clip_norm(config: TrainConfig, step: int, total: int) -> float:
    """Limit of the gradient's norm at step `step` (from 0) of `total`; 0 does not clip."""
    if config.clip_norm == 0:
        return 0.0
    decay = max(1, round(CLIP_DECAY * total))
    return linear_decay(step, decay, config.clip_norm, config.clip_norm_end)
