"""The flags of both training commands: one for each field of the stage's configuration.

``training/train_adapter.py``, ``training/train_diffusion.py`` and ``gen3r-engine train`` all use
these. Defaults are the configuration's. Building the parser does not import torch.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NoReturn

from gen3r_training import config as known
from gen3r_training.config import EMA_DECAY, AdapterConfig, DiffusionConfig, TrainConfig

CONFIGS: dict[str, type[TrainConfig]] = {"adapter": AdapterConfig, "diffusion": DiffusionConfig}
Flags = dict[str, tuple[Any, str]]  # name -> type, or the names it may have; help


DATA: Flags = {
    "data_root": (Path, "folder(s) that hold train/ and val/, one data set each"),
    "data_weights": (float, "how often each data set is drawn, by scenes (default: alike)"),
    "skip_bad_scenes": (bool, "leave out scenes that do not fit the layout, and say which"),
    "num_frames": (int, "frames of a clip, 4k + 1"),
    "resolution": (int, "pixels of its sides, a multiple of 56"),
    "max_stride": (int, "a clip takes every n-th frame, n drawn from 1 to this"),
    "latent_cache": (Path, "folder of 'gen3r-engine prepare latents'"),
    "num_workers": (int, "processes that read samples, per GPU; 0 reads in place"),
}
ADAPTER: Flags = {
    "vggt_path": (Path, "VGGT: its folder, its file, or a folder with vggt/ in it"),
    "wan_vae_path": (Path, "Wan VAE: its folder, its file, or a folder with wan_vae/ in it"),
    "pretrained_path": (Path, "pipeline that final_pipeline is made from, with the new adapter"),
    "init_from": (Path, "adapter to begin with: a pipeline or component folder"),
    "lambda_rec": (float, "weight of the reconstruction (with 0.2 of it on the cosine distance)"),
    "lambda_kl": (float, "weight of the KL to the Wan VAE's posterior, before the adaptive one"),
    "upstream_loss_weights": (bool, "upstream's fixed recipe 0.5, 0.1, 2.0 for the two lambdas"),
    "kl_reduction": (known.KL_REDUCTIONS, "sum of the KL: upstream's, or over all axes"),
}
DIFFUSION: Flags = {
    "pretrained_path": (Path, "pipeline folder: frozen modules and first weights"),
    "geo_adapter": (Path, "geometry adapter in place of the pipeline's (stage 1's result)"),
    "init_from": (Path, "transformer to begin with, in place of the pipeline's"),
    "text_dropout_prob": (float, "share of samples without a prompt"),
    "camera_dropout_prob": (float, "share of samples without cameras"),
    "task_1view_prob": (float, "share of samples given their first frame"),
    "task_2view_prob": (float, "share of samples given their first and last frame"),
    "task_allview_prob": (float, "share of samples given all frames; the three sum to 1"),
    "upstream_control_geometry": (bool, "encode the control video's geometry, not zeros"),
    "weighting": (known.WEIGHTINGS, "of timesteps, as in Stable Diffusion 3"),
    "kept_blocks": (int, "blocks whose linear layers are not computed again (with selective)"),
}
RUN: Flags = {
    "output_dir": (Path, "receives checkpoints/, logs and final_pipeline/"),
    "num_epochs": (int, "passes over the data"),
    "max_steps": (int, "end after so many optimiser steps"),
    "batch_size": (int, "samples per GPU and micro step"),
    "gradient_accumulation": (int, "micro steps per optimiser step"),
    "seed": (int, "of everything that is drawn"),
    "resume": (str, "go on from a checkpoint: auto (the newest) or its folder"),
    "save_every": (int, "steps between checkpoints; 0: only at the end"),
    "keep": (int, "newest checkpoints that stay"),
    "validate_every": (int, "steps between validations; 0: none"),
    "ema": (float, f"average the weights with this decay (bare --ema: {EMA_DECAY}; 0: off)"),
    "report": (known.REPORTS, "where scalars and videos go"),
}
OPTIMIZER: Flags = {
    "learning_rate": (float, "of AdamW, after the warm-up"),
    "schedule": (known.SCHEDULES, "learning rate after the warm-up"),
    "warmup_steps": (int, "steps in which the learning rate rises from 0"),
    "min_lr_ratio": (float, "share of the learning rate at which the cosine ends"),
    "weight_decay": (float, "of AdamW"),
    "beta1": (float, "of AdamW"),
    "beta2": (float, "of AdamW"),
    "epsilon": (float, "of AdamW"),
    "clip_norm": (float, "limit of the gradient's norm at the start; 0: none"),
    "clip_norm_end": (float, "limit from a tenth of the steps on; linear between"),
}
COMPUTE: Flags = {
    "mixed_precision": (known.MIXED_PRECISIONS, "bf16, or no: float32 everywhere"),
    "master_weights": (known.MASTER_WEIGHTS, "float32 copies, or bf16 rounded stochastically"),
    "gradient_checkpointing": (known.CHECKPOINTING, "activations that are computed again"),
    "device": (known.DEVICES, "where to compute"),
    "strategy": (known.STRATEGIES, "how GPUs share the model; auto: as launched"),
    "context_parallel": (int, "GPUs that share one sample's tokens (stage 2)"),
    "attention": (str, "attention backend (see gen3r-engine doctor)"),
    "operators": (str, "operators: auto, reference or triton"),
    "deterministic": (bool, "only operators that repeat to the bit"),
    "compile": (bool, "put the transformer's blocks through torch.compile (stage 2)"),
}
GROUPS = {"data": DATA, "run": RUN, "optimiser": OPTIMIZER, "computation": COMPUTE}
MANY = ("data_root", "data_weights")
# Flags that may stand alone, and what they then mean.
BARE: dict[str, Any] = {"ema": EMA_DECAY, "gradient_checkpointing": "selective"}


class OneLineParser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def add_arguments(parser: argparse.ArgumentParser, stage: str) -> None:
    """The flags of ``adapter`` or ``diffusion``."""
    own = ADAPTER if stage == "adapter" else DIFFUSION
    fields = {f.name: f for f in dataclasses.fields(CONFIGS[stage])}
    for title, flags in {"model": own, **GROUPS}.items():
        group = parser.add_argument_group(title)
        for name, (kind, text) in flags.items():
            _add(group, fields[name], kind, text)


def _add(group: argparse._ArgumentGroup, field: Any, kind: Any, text: str) -> None:
    required = field.default is dataclasses.MISSING
    options: dict[str, Any] = {"help": text, "required": required}
    if kind is bool:
        group.add_argument(f"--{field.name}", action="store_true", help=text)
        return
    if isinstance(kind, tuple):
        options["metavar"] = "|".join(kind)
    else:
        options |= {"type": kind, "metavar": _METAVARS[kind]}
    if field.name in MANY:
        options["nargs"] = "+"
    if field.name in BARE:
        options |= {"nargs": "?", "const": BARE[field.name]}
    if not required:
        options["default"] = field.default
        shown = field.default not in (None, ()) and "default" not in text
        options["help"] += f" (default: {field.default})" if shown else ""
    options["help"] = options["help"].replace("%", "%%")
    group.add_argument(f"--{field.name}", **options)


_METAVARS: dict[Any, str] = {Path: "PATH", int: "N", float: "X", str: "NAME"}


def config_from(args: argparse.Namespace, stage: str) -> TrainConfig:
    """The checked configuration of parsed flags.

    Raises
    ------
    ValueError : a value outside its limits; the text begins with the flag.
    """
    kind = CONFIGS[stage]
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(kind)}
    return kind(**values | {name: tuple(values[name]) for name in MANY})
