"""A pipeline made elsewhere (random weights, say) as a model that the engine can run."""

from __future__ import annotations

import uuid

import torch

from gen3r.pipeline import MODULES, Gen3RPipeline
from gen3r.precision import EXACT, apply_precision
from gen3r_engine.caches import CacheFolder, preload_compiler
from gen3r_engine.config import EngineConfig
from gen3r_engine.loading import LoadedModel
from gen3r_engine.memory import limit_process
from gen3r_engine.presets import DeviceFacts, device_facts, resolve
from gen3r_engine.residency import VISITORS, Residency, module_bytes
from gen3r_export.weights import pipeline_hashes


def adopt_pipeline(pipeline: Gen3RPipeline, config: EngineConfig) -> LoadedModel:
    """The pipeline's modules where the config's tier keeps them, in its preset's precision.

    Raises
    ------
    ValueError : a preset, tier or device that cannot be had, or a pipeline that is on another
        device or in another dtype than the config asks for.
    """
    facts = device_facts(config)
    if pipeline.device.type != facts.device.type:
        raise ValueError(
            f"the pipeline is on {pipeline.device}, the config asks for {facts.device}; "
            "move it there, or change the config's device"
        )
    modules = {name: getattr(pipeline, name) for name in MODULES}
    count = sum(p.numel() for module in modules.values() for p in module.parameters())
    choice = resolve(
        config, facts.name, facts.capability, _room(facts, pipeline), model_gib=count * 2 / 2**30
    )
    if pipeline.dtype != getattr(torch, choice.dtype):
        raise ValueError(
            f"the pipeline is in {pipeline.dtype}, the config asks for {choice.dtype}; "
            "convert it, or change the config's dtype"
        )
    limit_process(config.max_memory_gib, facts.device)
    if facts.device.type == "cuda" and config.compiled:
        CacheFolder.of(config.cache_dir).use_for_compiling()
        preload_compiler()
    for name in VISITORS[choice.residency]:
        modules[name].to("cpu")
    # Before the preset changes them.
    hashes = {} if config.plans is None else pipeline_hashes(pipeline)
    if choice.precision != EXACT:
        apply_precision(pipeline.transformer, choice.precision)
    pipeline.wan_vae.set_encoder_precision(config.encoder_precision)
    residency = Residency(modules, choice.residency, facts.device)
    # A fingerprint of its own: what 11 GB of weights are is not known without reading them.
    return LoadedModel(pipeline, residency, uuid.uuid4().hex, facts, choice, hashes=hashes)


def _room(facts: DeviceFacts, pipeline: Gen3RPipeline) -> float | None:
    """GiB that may be had: what is free, and what the pipeline's own modules take already."""
    if facts.free_gib is None:
        return None
    taken = sum(module_bytes(getattr(pipeline, name)) for name in MODULES)
    return facts.free_gib + taken / 2**30
