"""What a component's weights are, in one short text: plans are matched to a model by it.

Taken in are the name and shape of every tensor under upstream's names, `SAMPLE` values at its
beginning and as many at its middle, and the settings of the component's config.json that differ
from upstream's (latent statistics among them). Values are hashed as float32. So the hash depends on
no folder, no file time, no sharding and no dtype that holds the values exactly, and ten gigabytes
take about a second, most of it finding the places in the files.

It is taken of the checkpoint's own tensors, before any rounding to the dtype that they run in: a
plan in fp16 and an engine in bf16 of one checkpoint agree, which rounded values could not (no
rounding of two rounded values is always the same). A module in memory is hashed as it is: that is
its checkpoint's hash where it was loaded in the checkpoint's dtype or a wider one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gen3r.checkpoint import ComponentReport, checked_reports, read_tensors
from gen3r.components import COMPONENTS
from gen3r.config import ComponentConfig
from gen3r.pipeline import Gen3RPipeline

SAMPLE = 1024  # values
LETTERS = 32  # of the hash that are kept: 128 bits


def component_hash(report: ComponentReport) -> str:
    """The hash of a component as its files hold it."""
    config = report.config
    if config is None:
        raise ValueError(f"component {report.name} has no config; its folder is not complete")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file in report.files:
            # Views of the mapped file: only the pages that are looked at are read.
            yield from read_tensors(file, report.expected, torch.device("cpu"))

    return _hash(report.name, config, dict(_samples(tensors())))


def module_hash(name: str, module: nn.Module, config: ComponentConfig) -> str:
    """The hash of a component in memory. ValueError for an unknown name."""
    if name not in COMPONENTS:
        raise ValueError(f"component '{name}' is unknown; known: {', '.join(COMPONENTS)}")
    state: Any = module.state_dict()
    keys = COMPONENTS[name].keys
    if keys is not None:
        state = keys.state_to_upstream(state)
    return _hash(name, config, dict(_samples(iter(state.items()))))


def checkpoint_hashes(folder: Path, allow_pickle: bool = False) -> dict[str, str]:
    """The hashes of all components of a folder. CheckpointError where it is not complete."""
    reports = checked_reports(folder, allow_pickle)
    return {r.name: component_hash(r) for r in reports if r.name in COMPONENTS}


def pipeline_hashes(pipeline: Gen3RPipeline) -> dict[str, str]:
    """The hashes of all components in memory."""
    return {
        name: module_hash(name, getattr(pipeline, name), getattr(pipeline.config, name))
        for name in COMPONENTS
    }


def _samples(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, bytes]]:
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        middle = flat.numel() // 2
        taken = torch.cat([flat[:SAMPLE], flat[middle : middle + SAMPLE]]).cpu().float()
        yield name, f"{list(tensor.shape)}".encode() + taken.numpy().tobytes()


def _hash(name: str, config: ComponentConfig, samples: dict[str, bytes]) -> str:
    usual = COMPONENTS[name].config().to_dict()
    own = {key: value for key, value in config.to_dict().items() if value != usual[key]}
    digest = hashlib.sha256(f"{name} {json.dumps(own, sort_keys=True)}\n".encode())
    for key in sorted(samples):
        digest.update(f"{key}\0".encode() + samples[key] + b"\n")
    return digest.hexdigest()[:LETTERS]
