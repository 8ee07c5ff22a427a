"""A model repository for NVIDIA Triton Inference Server, made from an export folder.

    models/vae_decoder/config.pbtxt
    models/vae_decoder/1/model.onnx | model.plan | model.pt2

Files are hard links where the file system allows it, else copies. What Triton takes:

* ONNX files: backend ``onnxruntime``. TensorRT plans: backend ``tensorrt``, for the GPU and version
  that they were built with. Plans of TensorRT-RTX, which Triton has no backend for, are refused.
* AOTInductor packages: backend ``pytorch`` with platform ``torch_aoti`` (beta, since 26.03), which
  names tensors by position, and whose container must have the torch that made the package.

An axis of scenes from 1 up that leads every input and output is Triton's batch: it is left out of
the dims. Otherwise ``max_batch_size`` is 0 and the dims are whole.
Sources: ModelConfig's protobuf schema and the backends' own documentation.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gen3r.folders import whole_folder
from gen3r_export.graph import TensorSpec
from gen3r_export.manifest import Entry
from gen3r_export.runtime import Plans, check_files

BATCH = "batch"  # the dynamic axis of scenes
TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
}
# Backend, platform and the model's file name by format.
BACKENDS = {
    "onnx": ("onnxruntime", "onnxruntime_onnx", "model.onnx"),
    "tensorrt": ("tensorrt", "tensorrt_plan", "model.plan"),
    "aoti": ("pytorch", "torch_aoti", "model.pt2"),
}
KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU", "any": "KIND_AUTO"}


@dataclass(frozen=True)
class Repository:
    """What was written: the folder, models by name with their entries, reasons for the others."""

    path: Path
    models: Mapping[str, Entry] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def write_triton_repository(
    folder: str | Path, out: str | Path, names: Sequence[str] = ()
) -> Repository:
    """Write a model repository of an export folder; it appears whole or not at all.

    A graph in several formats or precisions gets a model each, with them in its name.

    Parameters
    ----------
    names : of graphs; empty: all.

    Raises
    ------
    ValueError : no plans.json, an unknown name, files that are missing or differ, nothing that
        Triton can serve. FileExistsError : `out` exists. OSError : it cannot be written.
    """
    plans = Plans(folder)
    known = {entry.name for entry in plans.entries}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} is not in {folder}; there are: {', '.join(sorted(known))}"
        )
    wanted = [entry for entry in plans.entries if not names or entry.name in names]
    refused = {str(e): reason for e in wanted if (reason := why_not(e)) is not None}
    models = _named([entry for entry in wanted if str(entry) not in refused])
    if not models:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"{folder} has nothing that Triton can serve ({reasons or 'no entries'})")
    target = Path(out).expanduser().absolute()
    with whole_folder(target.parent, target.name) as pending:
        for name, entry in models.items():
            check_files(entry, plans.folder, verify=True)
            model = pending.path / name
            (model / "1").mkdir(parents=True)
            text = model_config(name, entry)
            (model / "config.pbtxt").write_text(text, encoding="utf-8")
            main, *others = entry.files
            _, _, file = BACKENDS[entry.format]
            place(plans.folder / entry.folder / main, model / "1" / file)
            for other in others:  # external weights, by the name that the graph knows
                place(plans.folder / entry.folder / other, model / "1" / other)
    return Repository(target, models, refused)


def why_not(entry: Entry) -> str | None:
    """Why Triton cannot serve an entry; None: it can."""
    if entry.format not in BACKENDS:
        return f"format '{entry.format}' has no backend"
    if entry.format == "tensorrt" and "tensorrt-rtx" in entry.versions:
        return (
            "Triton has no backend for TensorRT-RTX; build it with TensorRT proper, or serve the "
            "ONNX file"
        )
    return None


def _named(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Models by name: the graph's where it is unique, else with what tells them apart."""
    listed = list(entries)
    found: dict[str, Entry] = {}
    for entry in listed:
        alike = [other for other in listed if other.name == entry.name]
        name = entry.name
        if len(alike) > 1:
            name = f"{name}_{entry.format}_{entry.precision}"
        if len({(e.format, e.precision) for e in alike}) < len(alike):
            frames, batch = ("-".join(map(str, pair)) for pair in (entry.frames, entry.batch))
            name = f"{name}_{frames}x{entry.height}x{entry.width}_b{batch}"
        if name in found:
            name = f"{name}_{entry.folder.rpartition('.')[2]}"
        found[name] = entry
    return found


def model_config(name: str, entry: Entry) -> str:
    """config.pbtxt of an entry: the text format of Triton's ModelConfig."""
    backend, platform, _ = BACKENDS[entry.format]
    most = batch_size(entry)
    ordinal = entry.format == "aoti"
    lines = [
        f"name: {json.dumps(name)}",
        f"backend: {json.dumps(backend)}",
        f"platform: {json.dumps(platform)}",
        f"max_batch_size: {most}",
    ]
    for kind, specs in (("input", entry.inputs), ("output", entry.outputs)):
        for index, spec in enumerate(specs):
            named = f"{kind.upper()}__{index}" if ordinal else spec.name
            dims = ", ".join(map(str, dims_of(spec, batched=most > 0)))
            lines.append(
                f"{kind} {{ name: {json.dumps(named)} data_type: {TYPES[spec.dtype]} "
                f"dims: [ {dims} ] }}"
            )
    lines.append(f"instance_group {{ count: 1 kind: {KINDS[entry.device]} }}")
    for key, value in (("part", entry.part), ("form", entry.form), ("precision", entry.precision)):
        said = f"{{ string_value: {json.dumps(value)} }}"
        lines.append(f"parameters {{ key: {json.dumps(key)} value: {said} }}")
    return "\n".join(lines) + "\n"


def batch_size(entry: Entry) -> int:
    """Triton's max_batch_size: most scenes, or 0 where its batching does not fit the graph.

    It fits where every tensor begins with the axis of scenes, from one up, and has no other of it.
    """
    tensors = (*entry.inputs, *entry.outputs)
    dim = entry.dims.get(BATCH)
    if dim is None or dim.least > 1:
        return 0
    leads = all(
        spec.shape
        and spec.shape[0] == BATCH
        and not any(isinstance(n, str) and BATCH in n for n in spec.shape[1:])
        for spec in tensors
    )
    return dim.most if leads else 0


def dims_of(spec: TensorSpec, *, batched: bool) -> tuple[int, ...]:
    """Triton's dims of a tensor: -1 for a dynamic axis, without the batch where it is Triton's."""
    shape = spec.shape[1:] if batched else spec.shape
    return tuple(length if isinstance(length, int) else -1 for length in shape)


def place(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none between the two."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
