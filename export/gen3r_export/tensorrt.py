"""TensorRT plans from ONNX files: built, inspected, and where there is a GPU run and compared.

    exported = build_tensorrt(Path("vae_decoder_next.onnx"), graph, folder, config, print)

TensorRT proper builds for the GPU at hand; TensorRT-RTX builds for GeForce and RTX GPUs anywhere,
a plan for each compute capability. Which is taken: `preferred_library`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen3r_export.compare import relative_error, wrong
from gen3r_export.config import ExportConfig
from gen3r_export.graph import DTYPES, DimRange, Exported, Graph, Tell, TensorSpec
from gen3r_export.tensorrt_build import (
    Parsed,
    Shapes,
    build_plan,
    check_inputs,
    command_line,
    parse_network,
    plan_name,
    target_capabilities,
)
from gen3r_export.tensorrt_inspect import inspect_network
from gen3r_export.tensorrt_library import RTX, Library, dotted, find_library, gpu_capability
from gen3r_export.tensorrt_plan import inspect_engine, inspect_plan
from gen3r_export.tensorrt_run import TensorRTRunner, open_tensorrt

__all__ = [
    "TensorRTRunner",
    "build_tensorrt",
    "check_tensorrt",
    "open_tensorrt",
    "preferred_library",
    "sample_inputs",
    "trtexec_command",
]

# Products that a part keeps in float32 in every precision: the time embedding's linear layers.
FLOAT32_PRODUCTS = {"denoiser_prepare": 3}
PASSED = "passed"


def preferred_library(config: ExportConfig) -> Library:
    """TensorRT-RTX where capabilities are named, else `find_library`'s choice. ValueError as it."""
    return find_library(RTX if config.capabilities else None)


def build_tensorrt(
    onnx_file: Path, graph: Graph, folder: Path, config: ExportConfig, tell: Tell
) -> Exported:
    """Builds `<graph.name>.plan`, or `<graph.name>.sm89.rtx.plan` for each capability, in `folder`.

    Facts: library and version, the network's and every plan's inspection, bytes and seconds, and
    the equivalent commands of NVIDIA's own tool. `checked` says whether layers are as the precision
    says and whether the plan was run; `errors` are of that run, against PyTorch.

    Raises
    ------
    ValueError : TensorRT not installed; no GPU (TensorRT proper) or one that RTX does not support;
        an ONNX file that is not there, of another graph, or that TensorRT cannot parse or build.
    KeyboardInterrupt : the person stopped it.
    """
    library = preferred_library(config)
    capabilities = target_capabilities(library, config, tell)
    shapes = Shapes(graph.name, graph.inputs, graph.dims)
    start = time.monotonic()
    parsed = parse_network(library, onnx_file)
    check_inputs(parsed, shapes)
    inspection = inspect_network(parsed.network, onnx_file)
    allowed = FLOAT32_PRODUCTS.get(graph.name, 0)
    problems = inspection.problems(config.precision, allowed)
    seconds = {"parse": time.monotonic() - start}
    if config.timing_cache is not None and not library.timing_cache:
        tell(
            f"timing cache {config.timing_cache} is not used: TensorRT-RTX times nothing when it "
            "builds"
        )
    plans: dict[str, dict[str, Any]] = {}
    for capability in capabilities:
        name, facts, found = _build_one(
            parsed, onnx_file, shapes, folder, config, capability, allowed, tell
        )
        plans[name] = facts
        problems += found
    seconds["build"] = sum(facts["seconds"] for facts in plans.values())
    for problem in problems:
        tell(f"{graph.name}: {problem}")
    ran, errors, run = _run(graph, folder, tuple(plans), config, tell)
    return Exported(
        files=tuple(plans),
        seconds=seconds,
        errors=errors,
        checked={"layers": "; ".join(problems) or PASSED, "run": run},
        facts={
            "library": {"kind": library.kind, "version": library.version},
            "versions": {library.kind: library.version},
            "network": inspection.to_dict(),
            "plans": plans,
            "ran": ran,
        },
    )


def _build_one(
    parsed: Parsed,
    onnx_file: Path,
    shapes: Shapes,
    folder: Path,
    config: ExportConfig,
    capability: str | None,
    allowed: int,
    tell: Tell,
) -> tuple[str, dict[str, Any], list[str]]:
    """File name, facts and problems of the plan for one capability."""
    library = parsed.library
    command = command_line(library, onnx_file, shapes, config, capability)
    tell(f"as NVIDIA's tool would: {command}")
    plan, seconds = build_plan(parsed, shapes, config, capability, tell)
    name = plan_name(shapes.name, library, capability)
    (folder / name).write_bytes(plan)
    tell(f"{name}: {plan.nbytes / 1e6:.1f} MB in {seconds:.1f} s")
    facts = {
        "capability": dotted(capability or gpu_capability() or "00"),
        "bytes": int(plan.nbytes),
        "seconds": seconds,
        # Without the folder, which says nothing on another machine.
        "command": command.replace(str(onnx_file), onnx_file.name),
    }
    if library.rtx:
        found = inspect_plan(folder / name)
    else:
        found = inspect_engine(library, open_tensorrt(folder / name).engine)
    facts["inspection"] = found.to_dict()
    problems = [f"{name}: {text}" for text in found.problems(config.precision, allowed)]
    return name, facts, problems


def _run(
    graph: Graph, folder: Path, names: Sequence[str], config: ExportConfig, tell: Tell
) -> tuple[str | None, dict[str, float], str]:
    """Name and errors of the plan for the GPU that is here, and what was done.

    A plan that took long to build is kept where its results are wrong, and that is said.
    """
    from gen3r_export.onnx_check import measure

    here = gpu_capability()
    if not config.run:
        return None, {}, "not run: not asked for"
    if here is None:
        return None, {}, "not run: no GPU here"
    name = next((n for n in names if f".sm{here}." in n or not n.endswith(".rtx.plan")), None)
    if name is None:
        return None, {}, f"not run: no plan for this GPU's capability {dotted(here)}"
    runner = open_tensorrt(folder / name)
    errors = measure(_HostInputs(runner), graph)
    reason = wrong(errors["float32"], config.precision, errors["module"])
    done = f"{name} on this GPU"
    if reason is not None:
        done += f": wrong, {reason}"
        tell(f"{graph.name}: {done}")
    return name, errors, done


@dataclass(frozen=True)
class _HostInputs:
    """A runner that takes inputs wherever they are."""

    runner: TensorRTRunner

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.runner(*(x.to(self.runner.device) for x in inputs))


def trtexec_command(
    onnx_file: Path, graph: Graph, config: ExportConfig, library: Library | None = None
) -> str:
    """What `trtexec` (or `tensorrt_rtx`, a line for each capability) needs to build the same.

    library : None: `preferred_library`. ValueError where none is installed.
    """
    found = library or preferred_library(config)
    shapes = Shapes(graph.name, graph.inputs, graph.dims)
    numbers = target_capabilities(found, config, lambda _: None) if found.rtx else (None,)
    lines = [command_line(found, onnx_file, shapes, config, number) for number in numbers]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------- self-test


@dataclass(frozen=True)
class Checked:
    """What `check_tensorrt` found.

    errors : relative error of every output, by name.
    seconds : of ``build`` and ``run`` (the second call, waited for).
    library : kind and version, for the reader. bytes : of the plan. problems : of its layers.
    """

    errors: Mapping[str, float]
    seconds: Mapping[str, float]
    library: str
    bytes: int
    problems: tuple[str, ...] = ()


def check_tensorrt(
    onnx_file: Path,
    inputs: Sequence[TensorSpec],
    dims: Mapping[str, DimRange],
    config: ExportConfig,
    tell: Tell,
    *,
    given: Sequence[Tensor] | None = None,
    expected: Sequence[Tensor] | None = None,
) -> Checked:
    """Builds a plan for this GPU from an ONNX file, runs it and compares: the self-test of
    ``gen3r-engine export --check DIR``. It needs neither the model nor its weights.

    Use it for every entry of format onnx, with `onnx_file` = folder / entry.folder /
    entry.main_file, `inputs` = entry.inputs, `dims` = entry.dims and
    `config` = ExportConfig(precision=entry.precision). Compare `errors` with
    `gen3r_export.compare.BOUNDS`. The plan is built in a temporary folder and removed.

    Parameters
    ----------
    given : inputs at lengths that `dims` allow; None: `sample_inputs` at the best lengths.
    expected : outputs for them, in the graph's order; None: those of onnxruntime on the CPU (which
        has no bf16 convolutions: give them for such a file).

    Raises
    ------
    ValueError : no TensorRT, no GPU, another number of outputs than `expected`, and whatever
        building or running gives; one line.
    """
    from gen3r_export.onnx_runner import open_onnx

    library = find_library()
    here = gpu_capability()
    if here is None:
        raise ValueError(f"{onnx_file.name}: the self-test runs the plan, and there is no GPU here")
    name = onnx_file.stem
    shapes = Shapes(name, tuple(inputs), dims)
    tensors = given or sample_inputs(inputs, shapes.lengths("best"))
    if expected is None:
        expected = open_onnx(onnx_file)(*(x.cpu() for x in tensors))
    settings = replace(config, capabilities=(here,) if library.rtx else ())
    with tempfile.TemporaryDirectory(prefix="gen3r-check-") as place:
        (capability,) = target_capabilities(library, settings, tell)
        parsed = parse_network(library, onnx_file)
        check_inputs(parsed, shapes)
        inspection = inspect_network(parsed.network, onnx_file)
        plan, seconds = build_plan(parsed, shapes, settings, capability, tell)
        file = Path(place) / plan_name(name, library, capability)
        file.write_bytes(plan)
        runner = open_tensorrt(file)
        results, took = _timed(runner, tensors)
        if len(results) != len(expected):
            raise ValueError(f"{name} gives {len(results)} outputs, {len(expected)} are expected")
        pairs = zip(runner.names_out, results, expected, strict=True)
        return Checked(
            errors={output: relative_error(found, wanted) for output, found, wanted in pairs},
            seconds={"build": seconds, "run": took},
            library=f"{library.kind} {library.version}",
            bytes=int(plan.nbytes),
            problems=tuple(inspection.problems(config.precision, FLOAT32_PRODUCTS.get(name, 0))),
        )


def _timed(runner: TensorRTRunner, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], float]:
    """Outputs, and the seconds of a second call (the first compiles and allocates)."""
    moved = [x.to(runner.device) for x in tensors]
    results = runner(*moved)
    torch.cuda.synchronize(runner.device)
    start = time.perf_counter()
    runner(*moved)
    torch.cuda.synchronize(runner.device)
    return results, time.perf_counter() - start


def sample_inputs(
    specs: Sequence[TensorSpec], lengths: Mapping[str, int], seed: int = 8
) -> tuple[Tensor, ...]:
    """Seeded normal numbers for floating-point inputs, ones for whole numbers (token ids, masks and
    lengths: all valid), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for spec in specs:
        dtype, sizes = DTYPES[spec.dtype], spec.sizes(lengths)
        if dtype.is_floating_point:
            made.append(torch.randn(sizes, generator=generator).to(dtype))
        else:
            made.append(torch.ones(sizes, dtype=dtype))
    return tuple(made)
