"""Write a pipeline as the published folder: upstream's layout, parameter names and config keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from gen3r.components import COMPONENTS, Component
from gen3r.config import OWN_VALUES, ComponentConfig, Gen3RConfig
from gen3r.folders import whole_folder

if TYPE_CHECKING:
    from gen3r.pipeline import Gen3RPipeline

MAX_SHARD = "10GB"  # upstream's (diffusers') default: umt5-xxl in bf16 makes two files


def save_pipeline(pipeline: Gen3RPipeline, folder: Path) -> None:
    """Write the whole folder or nothing.

    The unused CLIP text tower is not written; upstream's own loader, which is strict, wants it.

    Raises
    ------
    FileExistsError : the folder exists and is not empty. OSError : it cannot be written.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    folder = folder.absolute()
    with whole_folder(folder.parent, folder.name) as pending:
        for name, component in COMPONENTS.items():
            config: ComponentConfig = getattr(pipeline.config, name)
            save_component(component, getattr(pipeline, name), config, pending.path / name)
        pipeline.tokenizer.save_pretrained(pending.path / "tokenizer")
        pipeline.scheduler.save_pretrained(pending.path / "scheduler")
        write_json(pending.path / "model_index.json", model_index(pipeline))


def save_component(
    component: Component, module: nn.Module, config: ComponentConfig, folder: Path
) -> None:
    """One component's config.json and its safetensors, sharded above 10 GB."""
    folder.mkdir()
    write_json(folder / "config.json", config_json(component, config))
    state: Mapping[str, Tensor] = module.state_dict()
    if component.keys is not None:
        state = component.keys.state_to_upstream(state)
    pattern = f"{component.file_stem}{{suffix}}.safetensors"
    plan = split_torch_state_dict_into_shards(
        dict(state), filename_pattern=pattern, max_shard_size=MAX_SHARD
    )
    for filename, names in plan.filename_to_tensors.items():
        tensors = {name: state[name].contiguous() for name in names}
        save_file(tensors, folder / filename, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / f"{component.file_stem}.safetensors.index.json", index)


def config_json(component: Component, config: ComponentConfig) -> dict[str, Any]:
    """Upstream's keys always; sizes that upstream hard-codes only where they differ from it."""
    values, usual = config.to_dict(), component.config().to_dict()
    header: dict[str, Any] = {}
    if component.name != "vggt":  # written by the hub's mixin, which puts no class name
        header = {
            "_class_name": component.class_name,
            "_diffusers_version": diffusers.__version__,
        }
    kept = {k: v for k, v in values.items() if k in component.upstream_keys or v != usual[k]}
    return {**header, **component.extra_json, **kept}


def model_index(pipeline: Gen3RPipeline) -> dict[str, Any]:
    """model_index.json with upstream's class names, and what only this project knows."""
    config, usual = pipeline.config, Gen3RConfig()
    ours: dict[str, Any] = {
        name: getattr(config, name)
        for name in OWN_VALUES
        if getattr(config, name) != getattr(usual, name)
    }
    if pipeline.untrained:
        ours["untrained"] = True
    parts: dict[str, Any] = {n: [c.library, c.class_name] for n, c in COMPONENTS.items()}
    parts["vggt"] = [None, None]
    parts["scheduler"] = ["diffusers", type(pipeline.scheduler).__name__]
    parts["tokenizer"] = ["transformers", type(pipeline.tokenizer).__name__]
    index = {"_class_name": "Gen3RPipeline", "_diffusers_version": diffusers.__version__}
    extra = {"_gen3r_engine": ours} if ours else {}
    return {**index, **extra, **dict(sorted(parts.items()))}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(values, indent=2) + "\n")
