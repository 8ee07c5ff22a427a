"""Every entry of an export folder verified, run and compared: `gen3r-engine export --check DIR`.

What a machine cannot run (a plan of another GPU, bf16 in onnxruntime, TensorRT that is not there)
is said and is no failure. ONNX files are also built and run with TensorRT where a GPU and TensorRT
are there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gen3r_export.compare import BOUNDS, largest_error
from gen3r_export.config import ExportConfig
from gen3r_export.export import Model, load_model
from gen3r_export.graph import Graph, Tell
from gen3r_export.manifest import Entry
from gen3r_export.parts import chosen_parts, graphs
from gen3r_export.runtime import Plans, Runner, check_files

PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run here"
NOT_FINITE = "it gives numbers that are not finite"


@dataclass(frozen=True)
class Row:
    """What became of one entry. name : for people. error : relative, None where not compared."""

    name: str
    verdict: str
    text: str = ""
    error: float | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        parts = [self.verdict]
        if self.error is not None:
            parts.append(f"error {self.error:.1e}")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.3f} s")
        return f"{self.name}: {', '.join(parts)}" + (f" ({self.text})" if self.text else "")


@dataclass(frozen=True)
class _Reference:
    """Inputs, what PyTorch gives for them in float32, and how far its own precision is from that.

    expected : None where the checkpoint is not the entry's.
    """

    inputs: tuple[Tensor, ...]
    expected: tuple[Tensor, ...] | None
    limit: float | None


def check_folder(
    folder: str | Path, checkpoint: str | Path | None, tell: Tell, allow_pickle: bool = False
) -> list[Row]:
    """Check every entry; `tell` gets each row as it is there.

    checkpoint : what results are compared with; None: the embedded model. Entries of other weights
    are run on made-up inputs and compared with nothing.

    Raises
    ------
    ValueError : no plans.json, or a broken one. CheckpointError : a checkpoint that does not load.
    """
    plans = Plans(folder)
    rows: list[Row] = []
    models: dict[tuple[str, str, bool], Model] = {}
    for entry in plans.entries:
        for row in _check(plans, entry, checkpoint, models, allow_pickle):
            rows.append(row)
            tell(str(row))
    reasons = {_tensorrt_here(entry) for entry in plans.entries if entry.format == "onnx"} - {None}
    for reason in reasons:  # once, not for every file
        rows.append(Row("ONNX files built with TensorRT", NOT_RUN, str(reason)))
        tell(str(rows[-1]))
    return rows


def _check(
    plans: Plans,
    entry: Entry,
    checkpoint: str | Path | None,
    models: dict[tuple[str, str, bool], Model],
    allow_pickle: bool,
) -> Iterator[Row]:
    try:
        check_files(entry, plans.folder, verify=True)
    except ValueError as error:
        yield Row(str(entry), FAILED, str(error))
        return
    try:
        chosen_parts(_config(entry))
    except ValueError as error:  # of another version, or edited
        yield Row(str(entry), FAILED, f"plans.json: {error}")
        return
    reason, reference = unrunnable(entry), None
    if reason is None or _tensorrt_here(entry) is None:
        reference = _reference(plans, entry, checkpoint, models, allow_pickle)
    if reason is not None:
        yield Row(str(entry), NOT_RUN, reason)
    elif reference is not None:
        try:
            yield _run(plans, entry, reference)
        except (ValueError, RuntimeError) as error:  # libraries of compiled code raise the latter
            yield Row(str(entry), FAILED, " ".join(str(error).split()))
    if reference is not None and _tensorrt_here(entry) is None:
        yield _with_tensorrt(plans, entry, reference)


def unrunnable(entry: Entry) -> str | None:
    """Why this machine cannot run an entry at all; None: it can."""
    if (entry.device == "cuda" or entry.gpu is not None) and not torch.cuda.is_available():
        return "it is for a GPU, and there is none"
    if entry.gpu is not None:
        here = "".join(map(str, torch.cuda.get_device_capability()))
        if entry.gpu.capability != here:
            return f"it is for {entry.gpu}, this GPU is sm_{here}"
    try:
        if entry.format == "onnx":
            from gen3r_export.onnx_runner import need

            need("onnx", "onnxruntime")
        if entry.format == "tensorrt":
            from gen3r_export.tensorrt_library import RTX, TENSORRT, find_library

            kind = RTX if RTX in entry.versions else TENSORRT
            version = find_library(kind).version
            if version != entry.versions.get(kind, version):
                return f"it is of {kind} {entry.versions[kind]}, here is {version}"
    except ValueError as error:
        return str(error)
    dtypes = {spec.dtype for spec in (*entry.inputs, *entry.outputs)}
    if entry.format == "onnx" and "bfloat16" in dtypes:
        return "onnxruntime has no bf16 convolutions and products on a CPU"
    return None


def _reference(
    plans: Plans,
    entry: Entry,
    checkpoint: str | Path | None,
    models: dict[tuple[str, str, bool], Model],
    allow_pickle: bool,
) -> _Reference:
    config = _config(entry)
    key = (config.dtype, config.device, config.format == "aoti")
    if key not in models:
        alike = [e for e in plans.entries if _config(e).dtype == config.dtype]
        parts = tuple(dict.fromkeys(e.part for e in alike))
        models.clear()  # one at a time
        models[key] = load_model(checkpoint, replace(config, parts=parts), allow_pickle)
    model = models[key]
    graph = None
    if model.hashes.get(entry.component) == entry.weights:
        found = (g for g in graphs(model.pipeline, config) if g.name == entry.name)
        graph = next(
            (g for g in found if (g.inputs, g.outputs) == (entry.inputs, entry.outputs)), None
        )
    # The entry's lengths: those of the graph made anew depend on --working-gib.
    lengths = {name: dim.best for name, dim in entry.dims.items()}
    if graph is None:
        from gen3r_export.tensorrt import sample_inputs

        return _Reference(sample_inputs(entry.inputs, lengths), None, None)
    return _expected(graph, entry.precision, lengths)


def _expected(graph: Graph, precision: str, lengths: Mapping[str, int]) -> _Reference:
    inputs = graph.example(lengths)
    wide = graph.module if graph.wide is None else graph.wide()
    exact = _outputs(wide, [x.float() if x.is_floating_point() else x for x in inputs])
    limit: float | None = None
    if precision != "fp8":  # what 8 bits cost is not PyTorch's to say
        own = largest_error(_outputs(graph.module, inputs), exact)
        limit = max(BOUNDS.get(precision, 0.0), 2 * own)
    return _Reference(inputs, exact, limit)


def _outputs(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(x.cpu() for x in module(*inputs))


def _config(entry: Entry) -> ExportConfig:
    """The config that gives the entry's graph again."""
    fused = any(spec.name == "text_lengths" for spec in entry.inputs)
    on_gpu = torch.cuda.is_available() and (entry.part != "denoiser" or fused)
    if entry.format == "aoti":
        on_gpu = entry.device == "cuda"
    return ExportConfig(
        parts=(entry.part,),
        format=entry.format,
        precision=entry.precision,
        height=entry.height,
        width=entry.width,
        frames=entry.frames,
        batch=entry.batch,
        form="chunk" if entry.form in ("first", "next") else "auto",
        device="cuda" if on_gpu else "cpu",
    )


def _run(plans: Plans, entry: Entry, reference: _Reference) -> Row:
    device = "cpu" if entry.device == "any" else entry.device
    runner: Runner = plans.open(entry, device)
    inputs = [x.to(device) for x in reference.inputs]
    runner(*inputs)  # the first call allocates and may compile
    start = time.perf_counter()
    outputs = tuple(x.cpu() for x in runner(*inputs))
    seconds = time.perf_counter() - start
    return _judged(str(entry), outputs, reference, seconds)


def _judged(
    name: str, outputs: tuple[Tensor, ...], reference: _Reference, seconds: float, text: str = ""
) -> Row:
    if reference.expected is None:
        finite = all(bool(x.isfinite().all()) for x in outputs if x.is_floating_point())
        verdict = PASSED if finite else FAILED
        said = "run, and not compared: the checkpoint has other weights or shapes"
        return Row(name, verdict, said if finite else NOT_FINITE)
    if len(outputs) != len(reference.expected):
        return Row(name, FAILED, f"{len(outputs)} outputs, not {len(reference.expected)}")
    error = largest_error(outputs, reference.expected)
    if error == float("inf"):
        return Row(name, FAILED, NOT_FINITE, error, seconds)
    if reference.limit is None:
        return Row(name, PASSED, "no bound is set for fp8", error, seconds)
    if error > reference.limit:
        return Row(name, FAILED, f"the bound is {reference.limit:.1e}", error, seconds)
    return Row(name, PASSED, text, error, seconds)


def _tensorrt_here(entry: Entry) -> str | None:
    """Why an entry is not built and run with TensorRT here; None: it can be."""
    if entry.format != "onnx":
        return "it is no ONNX file"
    if not torch.cuda.is_available():
        return "there is no GPU"
    from gen3r_export.tensorrt_library import find_library, gpu_capability

    try:
        library = find_library()
        if library.rtx:
            library.capability(gpu_capability() or "")
    except ValueError as error:
        return str(error)
    return None


def _with_tensorrt(plans: Plans, entry: Entry, reference: _Reference) -> Row:
    """Build an ONNX entry for this GPU, run it and compare."""
    name = f"{entry}, built with TensorRT"
    from gen3r_export.tensorrt import check_tensorrt

    file = plans.folder / entry.folder / entry.main_file
    config = ExportConfig(precision=entry.precision)
    given = reference.inputs if reference.expected is not None else None
    try:
        found = check_tensorrt(
            *(file, entry.inputs, entry.dims, config, _quiet),
            given=given,
            expected=reference.expected,
        )
    except ValueError as refused:
        return Row(name, FAILED, str(refused))
    error = max(found.errors.values())
    limit = reference.limit or BOUNDS.get(entry.precision)
    text = "; ".join((f"{found.library}, {found.bytes / 1e6:.1f} MB", *found.problems))
    seconds = found.seconds["run"]
    if error == float("inf"):
        return Row(name, FAILED, f"{text}; {NOT_FINITE}", error, seconds)
    if limit is not None and error > limit:
        return Row(name, FAILED, f"{text}; the bound is {limit:.1e}", error, seconds)
    return Row(name, PASSED, text, error, seconds)


def _quiet(line: str) -> None:
    return None
