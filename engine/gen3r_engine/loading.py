"""A checkpoint as the engine wants it: components read at once, each where its tier puts it.

The text encoder, more than half of all weights, is read when it is first used: prompts whose
features are kept do without it.
"""

from __future__ import annotations

import hashlib
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gen3r.checkpoint import (
    ComponentReport,
    build_component,
    checked_reports,
    fill_component,
    pipeline_values,
    resolve_checkpoint,
)
from gen3r.components import COMPONENTS
from gen3r.nano import EMBEDDED, build_nano
from gen3r.pipeline import MODULES, Gen3RPipeline
from gen3r.precision import EXACT, apply_precision
from gen3r_engine.caches import CacheFolder, preload_compiler
from gen3r_engine.config import EngineConfig
from gen3r_engine.memory import limit_process
from gen3r_engine.presets import DeviceFacts, PresetChoice, resolve_here
from gen3r_engine.reading import ParallelReader, read_spans
from gen3r_engine.residency import VISITORS, LazyModule, Residency, module_bytes
from gen3r_export.manifest import read_manifest
from gen3r_export.weights import checkpoint_hashes, component_hash
from gen3r_kernels import Backends

LAZY = "text_encoder"
SAMPLE = 4096  # bytes of every tensor that a fingerprint looks at, at its beginning and its middle
HOST = torch.device("cpu")


@dataclass
class LoadedModel:
    """A model that the engine can run.

    Parameters
    ----------
    pipeline : its text_encoder may be a `LazyModule`.
    residency : gives the modules out, on the device.
    fingerprint : of tokenizer and text encoder, for `prompts.prompt_fingerprint`.
    facts, choice : the device, and what the config came to on it before anything was loaded.
    seconds : of the parts of loading.
    hashes : of the components' weights, for plans; empty where the config names no plans.
    """

    pipeline: Gen3RPipeline
    residency: Residency
    fingerprint: str
    facts: DeviceFacts
    choice: PresetChoice
    seconds: dict[str, float] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.facts.device


def load_pipeline(
    checkpoint: str | Path | None = None, config: EngineConfig | None = None
) -> LoadedModel:
    """Load a checkpoint folder or hub id, or with None the embedded model.

    Everything is checked before the first weight is read.

    Raises
    ------
    CheckpointError : all problems of all components in one message.
    ValueError : the preset, the tier or the device can not be had here; the text names what can.
    OSError : the cache folder can not be made.
    """
    config = config or EngineConfig()
    if config.plans is not None:
        read_manifest(config.plans)  # a folder without plans is told before minutes of loading
    started = time.perf_counter()
    if checkpoint is None:
        return _embedded(config)
    folder = resolve_checkpoint(checkpoint)
    reports = {r.name: r for r in checked_reports(folder, config.allow_pickle)}
    values = pipeline_values(folder, list(reports.values()))
    facts, choice = resolve_here(config, _half_gib(reports))
    _prepare_process(config, facts.device)
    checked = time.perf_counter()

    dtype = getattr(torch, choice.dtype)
    backends = Backends(attention=choice.attention)
    # Built here, one after another, and filled on threads: see `build_component`.
    built = {name: build_component(reports[name], backends) for name in COMPONENTS}
    places = {name: HOST if name in _visitors(choice) else facts.device for name in COMPONENTS}
    fill = partial(_fill, dtype=dtype)
    modules: dict[str, Any] = {
        LAZY: LazyModule(
            lambda: fill(built[LAZY], reports[LAZY], places[LAZY]),
            _parameters(reports[LAZY]) * dtype.itemsize,
        )
    }
    with (
        ParallelReader(dtype) as read,
        ThreadPoolExecutor(len(built), thread_name_prefix="load") as pool,
    ):
        # The largest first: its chunks are queued before those of the others.
        order = sorted(set(built) - {LAZY}, key=lambda name: -_parameters(reports[name]))
        tasks = {n: pool.submit(fill, built[n], reports[n], places[n], read=read) for n in order}
        modules |= {name: task.result() for name, task in tasks.items()}
    pipeline = Gen3RPipeline(**values, **modules)
    hashes = {}
    if config.plans is not None:
        hashes = {name: component_hash(reports[name]) for name in COMPONENTS}
    model = _finished(
        pipeline,
        modules,
        fingerprint_files(folder, reports[LAZY]),
        facts,
        choice,
        config,
        {"check": checked - started, "read": time.perf_counter() - checked},
    )
    model.hashes.update(hashes)
    return model


def _embedded(config: EngineConfig) -> LoadedModel:
    started = time.perf_counter()
    pipeline = build_nano(torch.float32, "cpu", Backends(attention=config.attention))
    parts = [getattr(pipeline, name) for name in MODULES]
    facts, choice = resolve_here(config, sum(map(module_bytes, parts)) / 2 / 2**30)
    _prepare_process(config, facts.device)
    modules = {}
    for name in MODULES:
        place = HOST if name in _visitors(choice) else facts.device
        modules[name] = getattr(pipeline, name).to(place, getattr(torch, choice.dtype))
    fingerprint = fingerprint_module(
        pipeline.text_encoder, pipeline.tokenizer.backend_tokenizer.to_str()
    )
    seconds = {"check": 0.0, "read": time.perf_counter() - started}
    model = _finished(pipeline, modules, fingerprint, facts, choice, config, seconds)
    if config.plans is not None:
        model.hashes.update(checkpoint_hashes(EMBEDDED))
    return model


def _finished(
    pipeline: Gen3RPipeline,
    modules: dict[str, nn.Module | LazyModule],
    fingerprint: str,
    facts: DeviceFacts,
    choice: PresetChoice,
    config: EngineConfig,
    seconds: dict[str, float],
) -> LoadedModel:
    """Apply the preset and gather what was loaded."""
    started = time.perf_counter()
    if choice.precision != EXACT:
        apply_precision(pipeline.transformer, choice.precision)
    pipeline.wan_vae.set_encoder_precision(config.encoder_precision)
    residency = Residency(modules, choice.residency, facts.device)
    seconds["apply preset"] = time.perf_counter() - started
    return LoadedModel(pipeline, residency, fingerprint, facts, choice, seconds)


def _prepare_process(config: EngineConfig, device: torch.device) -> None:
    """What must be in place before the first weight and the first compilation."""
    limit_process(config.max_memory_gib, device)
    if device.type == "cuda" and config.compiled:
        CacheFolder.of(config.cache_dir).use_for_compiling()
        preload_compiler()


def _visitors(choice: PresetChoice) -> tuple[str, ...]:
    return VISITORS[choice.residency]


def _fill(
    module: nn.Module,
    report: ComponentReport,
    device: torch.device,
    *,
    dtype: torch.dtype,
    read: ParallelReader | None = None,
) -> nn.Module:
    if read is not None:
        return fill_component(module, report, dtype, device, read)
    with ParallelReader(dtype) as own:
        return fill_component(module, report, dtype, device, own)


def _parameters(report: ComponentReport) -> int:
    return sum(math.prod(shape) for shape in report.expected.values())


def _half_gib(reports: dict[str, ComponentReport]) -> float:
    """GiB of all weights in bf16."""
    return sum(_parameters(reports[name]) for name in COMPONENTS) * 2 / 2**30


def fingerprint_files(folder: Path, report: ComponentReport) -> str:
    """A text encoder and its tokenizer by content, without reading 11 GB.

    Taken in: every tokenizer file as a whole; of every weight file its size, its time of change,
    its header, and `SAMPLE` bytes at the beginning and the middle of every tensor.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in (folder / "tokenizer").rglob("*") if p.is_file()):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    digest.update(repr(report.config).encode())
    for tensors in report.files:
        status = tensors.path.stat()
        digest.update(f"{tensors.path.name} {status.st_size} {status.st_mtime_ns}".encode())
        if tensors.path.suffix != ".safetensors":
            continue
        with tensors.path.open("rb") as file:
            for span in read_spans(tensors.path):
                digest.update(repr(span).encode())
                for begin in (span.begin, (span.begin + span.end) // 2):
                    file.seek(begin)
                    digest.update(file.read(min(SAMPLE, span.end - begin)))
    return digest.hexdigest()


def fingerprint_module(module: nn.Module, tokenizer: str) -> str:
    """A small text encoder by all its values, and its tokenizer as text."""
    digest = hashlib.sha256(tokenizer.encode())
    for name, value in module.state_dict().items():
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()
