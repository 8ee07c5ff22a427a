"""The driver of an export: every graph that a config asks for, from the checkpoint into a folder.

    from gen3r_export.export import load_model, run_export

    config = ExportConfig(parts=("vae_decoder",), format="onnx", out=Path("plans"))
    done = run_export(lambda: load_model("checkpoints/gen3r", config), config, print)

A graph is placed when it is finished (see `gen3r_export.files`): an export that is interrupted
keeps the graphs before, whole, and nothing of the one it was at.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gen3r.checkpoint import (
    build_component,
    checked_reports,
    load_component,
    pipeline_values,
    resolve_checkpoint,
)
from gen3r.components import COMPONENTS
from gen3r.nano import EMBEDDED
from gen3r.pipeline import Gen3RPipeline
from gen3r_export.config import ExportConfig
from gen3r_export.files import (
    export_folder,
    file_facts,
    publish,
    remove_unnamed,
    temporary_folder,
    write_manifest,
)
from gen3r_export.graph import Exported, Graph, Tell
from gen3r_export.manifest import FILE, Entry, Gpu, Manifest, read_manifest
from gen3r_export.parts import COMPONENT, Request, chosen_parts, graphs
from gen3r_export.weights import component_hash, pipeline_hashes
from gen3r_kernels import Backends

# Example inputs of these parts come out of the geometry adapter.
NEEDS_ADAPTER = ("adapter_encoder", "camera_head", "depth_head", "point_head")
CAPABILITY = re.compile(r"\.sm(\d+)\.")  # in the file name of a TensorRT-RTX plan


@dataclass(frozen=True)
class Model:
    """What is exported. name : for people. hashes : by component, see `gen3r_export.weights`."""

    pipeline: Gen3RPipeline
    hashes: Mapping[str, str]
    name: str


@dataclass(frozen=True)
class Exports:
    """What an export gave: the folder's manifest, its new entries, and reasons by failed graph."""

    manifest: Manifest
    entries: tuple[Entry, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


def load_model(
    checkpoint: str | Path | None, config: ExportConfig, allow_pickle: bool = False
) -> Model:
    """A checkpoint folder or hub id (None: the embedded model) in the config's dtype.

    Components that the config's parts do not need have no weights: the text encoder of a decoder's
    export is not read.

    Raises
    ------
    CheckpointError : all problems of all components in one message. ValueError : an unknown part,
    or a device that is not here.
    """
    parts = chosen_parts(config)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked, but there is no CUDA GPU; use device 'cpu'")
    folder = EMBEDDED if checkpoint is None else resolve_checkpoint(checkpoint)
    reports = checked_reports(folder, allow_pickle)
    # The transformer always: its dtype and device are the pipeline's.
    needed = {"transformer", *(COMPONENT[part] for part in parts)}
    if any(part in NEEDS_ADAPTER for part in parts):
        needed.add("geo_adapter")
    # Libraries of graphs have no operators of ours; AOTInductor packages carry them.
    backends = Backends() if config.format == "aoti" else Backends(operators="reference")
    dtype, device = getattr(torch, config.dtype), torch.device(config.device)
    modules: dict[str, Any] = {
        report.name: load_component(report, dtype, device, backends)
        if report.name in needed
        else build_component(report, backends).to(dtype).eval()
        for report in reports
        if report.name in COMPONENTS
    }
    return Model(
        Gen3RPipeline(**pipeline_values(folder, reports), **modules),
        {r.name: component_hash(r) for r in reports if r.name in needed},
        "embedded" if checkpoint is None else str(checkpoint),
    )


def model_of(pipeline: Gen3RPipeline, name: str = "in memory") -> Model:
    """A pipeline in memory as what is exported; its hashes are of its values as they are."""
    return Model(pipeline, pipeline_hashes(pipeline), name)


def check_installed(config: ExportConfig) -> None:
    """ValueError where a library that the config's format needs is not installed; one line."""
    if config.format == "aoti":
        return
    from gen3r_export.onnx_runner import need

    need("onnx", "onnxscript", "onnx_ir", *(("onnxruntime",) if config.run else ()))
    if config.format == "tensorrt":
        from gen3r_export.tensorrt import preferred_library

        preferred_library(config)


def run_export(load: Callable[[], Model], config: ExportConfig, tell: Tell) -> Exports:
    """Export every graph of the config into its folder.

    A graph that cannot be exported is told and told again in `Exports.failed`; the others go on.

    Parameters
    ----------
    load : gives the model; called once all that can be checked before is.
    tell : called with a line about what is being done.

    Raises
    ------
    ValueError : libraries or parts that are not there, a folder that is in use, broken or cannot be
        written. KeyboardInterrupt carries a note of what was kept.
    """
    chosen_parts(config)
    check_installed(config)
    with export_folder(config.out) as out:
        before = _placed(out)
        remove_unnamed(before, out)
        return _Export(load(), config, tell, out, before).run()


class _Export:
    """One export at work in a folder that is its own."""

    def __init__(
        self, model: Model, config: ExportConfig, tell: Tell, out: Path, manifest: Manifest
    ) -> None:
        self.model, self.config, self.tell, self.out = model, config, tell, out
        self.manifest = manifest
        self.entries: list[Entry] = []
        self.failed: dict[str, str] = {}

    def run(self) -> Exports:
        try:
            for graph in graphs(self.model.pipeline, self.config):
                try:
                    self._export(graph)
                except ValueError as error:
                    self.failed[graph.name] = str(error)
                    self.tell(f"{graph.name} failed: {error}")
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(
                f"{self.out} cannot be written ({reason}); make room, or give another folder"
            ) from error
        except KeyboardInterrupt as stop:
            if self.entries:
                stop.add_note(f"{len(self.entries)} finished graphs kept in {self.out}")
            raise
        return Exports(self.manifest, tuple(self.entries), self.failed)

    def _export(self, graph: Graph) -> None:
        config, tell = self.config, self.tell
        tell(f"{graph.name}: {config.format} {config.precision}")
        start = time.perf_counter()
        if config.format == "aoti":
            from gen3r_export.aoti import export_aoti

            self._place(graph, "aoti", partial(export_aoti, graph, config=config, tell=tell))
        else:
            from gen3r_export.onnx import export_onnx

            work = partial(export_onnx, graph, config=config, tell=tell)
            (entry,) = self._place(graph, "onnx", work)
            if config.format == "tensorrt":
                from gen3r_export.tensorrt import build_tensorrt

                file = self.out / entry.folder / entry.main_file
                build = partial(build_tensorrt, file, graph, config=config, tell=tell)
                self._place(graph, "tensorrt", build)
        tell(f"{graph.name}: done in {time.perf_counter() - start:.1f} s")

    def _place(self, graph: Graph, format: str, work: Callable[..., Exported]) -> list[Entry]:
        """Do the work in a temporary folder; its files and their entries are there after it."""
        try:
            with temporary_folder(self.out) as folder:
                exported = work(folder=folder)
                facts = file_facts(folder, exported.files)
                stem = f"{graph.name}.{format}-{self.config.precision}"
                name = publish(folder, facts, self.out, stem)
            made = []
            for files, gpu in _targets(exported, format, self.config):
                entry = self._entry(graph, format, _share(exported, files), gpu)
                listed = {file: facts[file] for file in files}
                made.append(replace(entry, folder=name, files=listed))
            manifest = self.manifest.merged(made, self.model.name)
            write_manifest(manifest, self.out)
            self.manifest = manifest
        finally:
            # By what lies there: an interruption may come right behind the replacement.
            remove_unnamed(_placed(self.out), self.out)
        self.entries += made
        return made

    def _entry(self, graph: Graph, format: str, exported: Exported, gpu: Gpu | None) -> Entry:
        """The entry but for its folder and files."""
        config = self.config
        request = Request.of(self.model.pipeline, config)
        facts = dict(exported.facts)
        if format == "aoti" and config.device == "cuda":
            facts["made_on"] = torch.cuda.get_device_name()  # runs on others of its capability
        versions = library_versions(format) | dict(facts.pop("versions", {}))
        device = {"onnx": "any", "tensorrt": "cuda"}.get(format, config.device)
        component = COMPONENT[graph.part]
        return Entry(
            name=graph.name,
            part=graph.part,
            form=graph.form,
            component=component,
            format=format,
            precision=config.precision,
            folder="",
            files={},
            inputs=graph.inputs,
            outputs=graph.outputs,
            dims=dict(graph.dims),
            height=request.height,
            width=request.width,
            frames=request.frames,
            batch=config.batch,
            device=device,
            gpu=gpu,
            versions=versions,
            weights=self.model.hashes[component],
            errors=dict(exported.errors),
            checked=dict(exported.checked),
            seconds=dict(exported.seconds),
            facts=facts,
        )


def _placed(out: Path) -> Manifest:
    """The manifest that lies in a folder, empty where none does."""
    return read_manifest(out) if (out / FILE).exists() else Manifest()


def _share(exported: Exported, files: tuple[str, ...]) -> Exported:
    """What was found of these files where several plans were built at once: facts, build time, and
    the errors of a run only where it was of theirs."""
    facts = dict(exported.facts)
    if "plans" not in facts:
        return exported
    facts["plans"] = plans = {name: facts["plans"][name] for name in files}
    seconds = dict(exported.seconds) | {"build": sum(plan["seconds"] for plan in plans.values())}
    if facts.get("ran") in (None, *files):
        return replace(exported, seconds=seconds, facts=facts)
    checked = dict(exported.checked) | {"run": f"not run: {facts['ran']} was, on this GPU"}
    return replace(exported, seconds=seconds, facts=facts, errors={}, checked=checked)


def _targets(
    exported: Exported, format: str, config: ExportConfig
) -> Iterator[tuple[tuple[str, ...], Gpu | None]]:
    """The files of every GPU that something was exported for: one entry each."""
    if format == "tensorrt":
        for name in exported.files:
            found = CAPABILITY.search(name)
            yield (name,), Gpu(found[1]) if found else gpu_here(named=True)
    else:
        on_gpu = format == "aoti" and config.device == "cuda"
        yield exported.files, gpu_here(named=False) if on_gpu else None


def gpu_here(*, named: bool) -> Gpu:
    """Torch's current GPU; its name where plans depend on it (TensorRT proper tunes for it)."""
    major, minor = torch.cuda.get_device_capability()
    return Gpu(f"{major}{minor}", torch.cuda.get_device_name() if named else None)


def library_versions(format: str) -> dict[str, str]:
    """Versions of the libraries that made a file of this format, but for TensorRT's own."""
    found: dict[str, str] = {"torch": str(torch.__version__)}
    names = {"onnx": ("onnx", "onnxscript"), "aoti": ("triton",)}.get(format, ())
    for name in ("gen3r-engine", *names):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
