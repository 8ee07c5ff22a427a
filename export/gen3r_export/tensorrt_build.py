"""From an ONNX file to TensorRT plans: parsing, profiles, the builder's settings, progress.

The network keeps the types of the ONNX file (it is strongly typed), so the file must be in the
target dtype. TF32 is off, so that what is float32 in the graph is float32 in the plan.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gen3r_export.config import ExportConfig
from gen3r_export.graph import DimRange, Tell, TensorSpec
from gen3r_export.onnx_runner import check_files, need
from gen3r_export.tensorrt_library import RTX_CAPABILITIES, Library, dotted, gpu_capability
from gen3r_export.tensorrt_messages import Messages, interrupts_kept, logger, one_line, progress

MIB, GIB = 1 << 20, 1 << 30
NO_FP8 = ("75", "80", "86")  # capabilities that do not multiply in 8-bit floats
# Names of TensorRT's element types for those of `TensorSpec`.
ELEMENTS = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
}
Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # least, best and most shape


@dataclass(frozen=True)
class Shapes:
    """What the builder must know of a graph: its name, inputs and dynamic axes."""

    name: str
    inputs: Sequence[TensorSpec]
    dims: Mapping[str, DimRange]

    def lengths(self, which: str) -> dict[str, int]:
        """``least``, ``best`` or ``most`` of every dynamic axis."""
        return {name: getattr(dim, which) for name, dim in self.dims.items()}

    def profile(self) -> dict[str, Range]:
        """Least, best and most shape of every input that has a dynamic axis."""
        least, best, most = map(self.lengths, ("least", "best", "most"))
        return {
            spec.name: (spec.sizes(least), spec.sizes(best), spec.sizes(most))
            for spec in self.inputs
            if any(isinstance(size, str) for size in spec.shape)
        }


@dataclass(frozen=True)
class Parsed:
    """A network; the parser is kept because it owns the weights, the builder because it made it."""

    library: Library
    builder: Any
    network: Any
    parser: Any


def plan_name(graph: str, library: Library, capability: str | None) -> str:
    """``vae_decoder_next.sm89.rtx.plan``, or ``vae_decoder_next.plan`` of TensorRT proper."""
    return f"{graph}.sm{capability}.rtx.plan" if library.rtx else f"{graph}.plan"


def target_capabilities(
    library: Library, config: ExportConfig, tell: Tell
) -> tuple[str | None, ...]:
    """Compute capabilities to build for; of TensorRT proper (None,), the GPU at hand.

    Raises
    ------
    ValueError : TensorRT proper without a GPU, or asked for a capability that is not the GPU's;
        a capability that RTX does not know (Hopper's 9.0), or fp8 for one that has none.
    """
    here = gpu_capability()
    if not library.rtx:
        if here is None:
            raise ValueError(
                f"TensorRT {library.version} builds for the GPU at hand and there is none; build "
                "on the machine that shall run the plan, or install TensorRT-RTX for GeForce and "
                "RTX GPUs"
            )
        if others := [number for number in config.capabilities if number != here]:
            library.capability(others[0])  # raises: says what builds for other GPUs
        return (None,)
    wanted = config.capabilities or ((here,) if here else RTX_CAPABILITIES)
    for number in wanted:
        library.capability(number)
    if config.precision == "fp8" and (without := [n for n in wanted if n in NO_FP8]):
        if config.capabilities or here:
            raise ValueError(
                f"compute capability {dotted(without[0])} has no 8-bit floats; use precision fp16, "
                "or capability 89 or 120"
            )
        wanted = tuple(number for number in wanted if number not in NO_FP8)
        tell(f"fp8: not for {', '.join(map(dotted, without))}, which have no 8-bit floats")
    return wanted


def parse_network(library: Library, onnx_file: Path) -> Parsed:
    """The strongly typed network of an ONNX file.

    Raises
    ------
    ValueError : a file that is not there, cut short or without its weights; all that the parser
        objects to, in one line.
    """
    need("onnx")
    check_files(onnx_file)
    trt, messages = library.module, Messages(library)
    builder = trt.Builder(logger(library))
    network = builder.create_network(library.network_flags)
    parser = trt.OnnxParser(network, logger(library))
    with interrupts_kept():
        parsed = parser.parse_from_file(str(onnx_file))
    if not parsed:
        found = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        reason = "; ".join(found) or messages.reason("no reason given")
        raise ValueError(f"{onnx_file.name}: {library.kind} cannot parse it: {reason}")
    return Parsed(library, builder, network, parser)


def _parser_error(error: Any) -> str:
    where = f"{error.node_operator()} '{error.node_name()}': " if error.node_name() else ""
    return where + one_line(str(error.desc()))


def check_inputs(parsed: Parsed, shapes: Shapes) -> None:
    """ValueError where the network's inputs are not those of the graph, which would be an ONNX file
    of another export."""
    network = parsed.network
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    names = [spec.name for spec in shapes.inputs]
    if (found := [tensor.name for tensor in tensors]) != names:
        raise ValueError(f"{shapes.name}: the ONNX file takes {found}, the graph {names}")
    for tensor, spec in zip(tensors, shapes.inputs, strict=True):
        wanted = tuple(-1 if isinstance(size, str) else size for size in spec.shape)
        shape, element = tuple(tensor.shape), tensor.dtype.name
        if shape != wanted or element != ELEMENTS[spec.dtype]:
            raise ValueError(
                f"{shapes.name}: input {spec.name} of the ONNX file is {element} {list(shape)}, "
                f"of the graph {ELEMENTS[spec.dtype]} {list(wanted)}; export it again"
            )


def build_plan(
    parsed: Parsed,
    shapes: Shapes,
    config: ExportConfig,
    capability: str | None,
    tell: Tell,
) -> tuple[Any, float]:
    """The plan (an IHostMemory: a buffer with `nbytes`) and the seconds that it took.

    Raises
    ------
    ValueError : TensorRT refuses, with its reason.
    KeyboardInterrupt : the person stopped it; TensorRT is told to stop at its next step.
    """
    library, messages = parsed.library, Messages(parsed.library)
    settings = parsed.builder.create_builder_config()
    what = f"{shapes.name} for {'this GPU' if capability is None else dotted(capability)}"
    _configure(parsed, settings, config, capability)
    _add_profile(parsed, settings, shapes)
    timings = _load_timings(library, settings, config)
    start = time.monotonic()
    try:
        with interrupts_kept() as interrupts:
            monitor = progress(library, what, tell, interrupts)
            settings.progress_monitor = monitor
            plan = parsed.builder.build_serialized_network(parsed.network, settings)
    except RuntimeError as error:
        reason = one_line(str(error))
        raise ValueError(f"{what}: {library.kind} cannot build it: {reason}") from None
    seconds = time.monotonic() - start
    if monitor.failure is not None:
        raise monitor.failure
    if plan is None:
        refit = "; build it without refit" if config.refit else ""
        reason = messages.reason("no reason given")
        raise ValueError(f"{what}: {library.kind} cannot build it: {reason}{refit}")
    if timings is not None:
        _save_timings(settings, timings)
    return plan, seconds


def _configure(parsed: Parsed, settings: Any, config: ExportConfig, capability: str | None) -> None:
    trt = parsed.library.module
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    settings.clear_flag(trt.BuilderFlag.TF32)
    if config.workspace_gib is not None:
        limit = int(config.workspace_gib * GIB)
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, limit)
    if config.refit:
        settings.set_flag(trt.BuilderFlag.REFIT)
    if capability is not None:
        settings.num_compute_capabilities = 1
        if not settings.set_compute_capability(parsed.library.capability(capability), 0):
            raise ValueError(f"TensorRT-RTX refuses compute capability {dotted(capability)}")


def _add_profile(parsed: Parsed, settings: Any, shapes: Shapes) -> None:
    ranges = shapes.profile()
    if not ranges:
        return
    profile = parsed.builder.create_optimization_profile()
    for name, (least, best, most) in ranges.items():
        profile.set_shape(name, least, best, most)
    if settings.add_optimization_profile(profile) < 0:
        raise ValueError(f"{shapes.name}: TensorRT refuses the shapes {ranges}")


def _load_timings(library: Library, settings: Any, config: ExportConfig) -> Path | None:
    """Gives the builder the timings of earlier builds; None where none shall be kept."""
    path = config.timing_cache
    if path is None or not library.timing_cache:
        return None
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"timing cache {path} cannot be a file there; name one in a folder")
    try:
        kept = path.read_bytes() if path.exists() else b""
        # Now, not after a build that would be lost.
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(
            f"timing cache {path} cannot be read and written ({error.strerror}); name another file"
        ) from None
    timings = settings.create_timing_cache(kept)
    if timings is None or not settings.set_timing_cache(timings, False):
        raise ValueError(
            f"timing cache {path} is damaged, or of another GPU or TensorRT version; delete it or "
            "name another file"
        )
    return path


def _save_timings(settings: Any, path: Path) -> None:
    """Replaces the file at once, so that a build beside this one never reads half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(bytes(settings.get_timing_cache().serialize()))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def command_line(
    library: Library,
    onnx_file: Path,
    shapes: Shapes,
    config: ExportConfig,
    capability: str | None,
) -> str:
    """What `trtexec` or `tensorrt_rtx` needs to build the same plan."""
    words = ["tensorrt_rtx" if library.rtx else "trtexec", f"--onnx={onnx_file}"]
    if not library.rtx:
        words.append("--stronglyTyped")  # needed by 10, without effect in 11
    ranges = shapes.profile()
    for index, flag in enumerate(("minShapes", "optShapes", "maxShapes")):
        sizes = [f"{name}:{'x'.join(map(str, found[index]))}" for name, found in ranges.items()]
        if sizes:
            words.append(f"--{flag}={','.join(sizes)}")
    words += ["--noTF32", "--profilingVerbosity=detailed"]
    if config.workspace_gib is not None:
        words.append(f"--memPoolSize=workspace:{int(config.workspace_gib * GIB) // MIB}M")
    if config.timing_cache is not None and library.timing_cache:
        words.append(f"--timingCacheFile={config.timing_cache}")
    if config.refit:
        words.append("--refit")
    if capability is not None:
        words.append(f"--computeCapabilities={capability}")
    name = plan_name(shapes.name, library, capability)
    return shlex.join([*words, f"--saveEngine={name}", "--skipInference"])
