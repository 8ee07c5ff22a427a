"""ONNX files: a graph's module through `torch.export` and `torch.onnx`, cleaned, checked and run.

    torch module -> torch.export -> torch.onnx (opset of the config) -> names, metadata -> file
                                                                  fp8: Q/DQ nodes (onnx_fp8) ^

`open_onnx` runs a file in onnxruntime and needs nothing of the model.
"""

from __future__ import annotations

import json
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.onnx.errors

from gen3r_export.config import ExportConfig
from gen3r_export.graph import Exported, Graph, Tell, file_bytes
from gen3r_export.onnx_check import check_onnx
from gen3r_export.onnx_fp8 import calibrated_scales, quantise
from gen3r_export.onnx_runner import DIMS, OnnxRunner, need, open_onnx
from gen3r_export.onnx_translate import forbidden, translation_table
from gen3r_export.trace import first_line, trace

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OnnxRunner", "export_onnx", "open_onnx"]

PRODUCER = "gen3r-engine"
EXTERNAL_BYTES = 256 * 2**20  # weights beyond this go beside the graph (a protobuf ends at 2 GiB)
SMALL = 1024  # bytes: what is smaller stays in the graph


def export_onnx(graph: Graph, folder: Path, config: ExportConfig, tell: Tell) -> Exported:
    """Write `<graph.name>.onnx` (and `.onnx.data` beside it where weights are large) and check it.

    Raises
    ------
    ValueError : onnx, onnxscript or onnxruntime is not installed; a graph that cannot be traced at
        its lengths, or that needs an operator which must not be in it; see `check_onnx`.
    """
    need("onnx", "onnxscript", "onnx_ir", *(("onnxruntime",) if config.run else ()))
    start = time.perf_counter()
    model = convert(graph, config.onnx_opset)
    wrong = forbidden(model)
    if wrong:
        raise ValueError(f"{graph.name} has operators that an export must not: {', '.join(wrong)}")
    describe(model, graph, config)
    facts: dict[str, Any] = {"opset": config.onnx_opset}
    if config.precision == "fp8":
        tell(f"{graph.name}: measuring activations for fp8")
        scales = calibrated_scales(model, graph, folder)
        facts |= quantise(model, scales)
    files = save(model, folder, graph.name)
    built = time.perf_counter() - start
    tell(f"{graph.name}: {file_bytes(folder, files) / 1e6:.1f} MB of ONNX in {built:.1f} s")
    facts["nodes"] = sum(1 for _ in model.graph)
    start = time.perf_counter()
    found = check_onnx(folder / files[0], graph, config.precision, run=config.run)
    return Exported(
        files=files,
        seconds={"export": built, "check": time.perf_counter() - start},
        errors=found.errors,
        checked=found.checked,
        facts=facts,
    )


def convert(graph: Graph, opset: int) -> ir.Model:
    """The graph as an ONNX model in memory, its tensors named as the graph names them.

    Raises
    ------
    ValueError : the module cannot be traced with these dynamic axes, or has an operator that ONNX
        has not.
    """
    program = trace(graph)
    with torch.no_grad(), _quiet():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in graph.inputs],
                output_names=[spec.name for spec in graph.outputs],
                custom_translation_table=translation_table(),
                verbose=False,
                optimize=True,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(
                f"{graph.name} has an operator that ONNX has not: {first_line(error)}; models on "
                "the CPU have none of their own kernels"
            ) from error
    if made is None:
        raise ValueError(f"{graph.name}: torch.onnx gave no model")
    model: ir.Model = made.model
    _name_axes(model, graph)
    return model


def _name_axes(model: ir.Model, graph: Graph) -> None:
    """Write the graph's shapes on inputs and outputs, and its axes' names wherever they appear."""
    import onnx_ir as ir

    known: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, graph.inputs, strict=True):
        for dim, length in zip(value.shape or (), spec.shape, strict=True):
            symbol = "" if isinstance(dim, int) else str(dim.value)
            if isinstance(length, str) and symbol.isidentifier():
                known[symbol] = length if length.isidentifier() else f"({length})"
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape(_renamed(dim, known) for dim in value.shape)
        node.metadata_props.clear()  # source lines and paths of whoever exported it
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    pairs = zip(
        (*model.graph.inputs, *model.graph.outputs), (*graph.inputs, *graph.outputs), strict=True
    )
    for value, spec in pairs:
        value.shape = ir.Shape(spec.shape)


def _renamed(dim: Any, known: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return re.sub(r"[A-Za-z_]\w*", lambda found: known.get(found[0], found[0]), str(dim.value))


def describe(model: ir.Model, graph: Graph, config: ExportConfig) -> None:
    """Who made the file, of what, and the lengths that its axes may have."""
    model.producer_name = PRODUCER
    try:
        model.producer_version = metadata.version(PRODUCER)
    except metadata.PackageNotFoundError:  # run from a checkout
        model.producer_version = "0"
    model.graph.name = graph.name
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    quantised = config.precision == "fp8"
    model.metadata_props.update(
        {
            "part": graph.part,
            "form": graph.form,
            "precision": config.precision,
            "weights": "those of products in float8_e4m3fn" if quantised else "unchanged",
            "torch": torch.__version__,
            DIMS: json.dumps({name: [d.least, d.most] for name, d in graph.dims.items()}),
        }
    )


def save(model: ir.Model, folder: Path, name: str) -> tuple[str, ...]:
    """Write the model; names of the files, the graph first."""
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    path = folder / f"{name}.onnx"
    if size <= EXTERNAL_BYTES:
        ir.save(model, path)
        return (path.name,)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=SMALL)
    return path.name, f"{path.name}.data"


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the exporter does not speak of itself (absent torchvision, old pytree calls)."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
