"""AOTInductor packages: a graph's module through `torch.export` into one compiled ``.pt2`` file.

    torch module -> torch.export -> our operators become their twins -> AOTInductor -> package

The package holds the compiled program, its weights, on a GPU our Triton kernels as machine code,
and a note of what it takes. `open_aoti` runs it and needs nothing of the model.
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from gen3r_export.aoti_dynamic import unchanged_axes
from gen3r_export.aoti_package import KEY, AotiRunner, Machine, Note, memory_order, open_aoti
from gen3r_export.compare import BOUNDS, largest_error
from gen3r_export.config import ExportConfig
from gen3r_export.graph import Exported, Graph, Tell
from gen3r_export.trace import first_line, trace

__all__ = ["AotiRunner", "export_aoti", "open_aoti"]

RUNS = 5  # timed calls
LONG = 2.0  # seconds: a call beyond this is timed once


def export_aoti(
    graph: Graph, folder: Path, config: ExportConfig, tell: Tell, *, attention: str = "cudnn"
) -> Exported:
    """Write `<graph.name>.pt2` for the config's device, and run it beside PyTorch.

    attention : what runs where the engine has its own Hopper kernels, see `aoti_carried`.

    ``seconds`` holds ``export``, ``build`` and ``check``, and of one call (median of 5) ``package``
    and ``module``, the same in PyTorch. ``errors`` holds ``same`` (against the module), ``float32``
    (against the module in float32) and ``module`` (the module against that).

    Raises
    ------
    ValueError : a graph that cannot be traced or compiled, an operator that a package cannot carry,
        or results beyond the precision's bound and twice PyTorch's own error.
    """
    machine = Machine.here(config.device)
    start = time.perf_counter()
    program = trace(graph, keep_memory=True)
    facts: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if config.device == "cuda":
        from gen3r_export import aoti_carried

        aoti_carried.place_constants(program, torch.device("cuda", torch.cuda.current_device()))
        facts, options = aoti_carried.carry(program, attention), aoti_carried.options()
    traced = time.perf_counter()
    tell(f"{graph.name}: compiling a package for {machine.gpu or machine.cpu}")
    path = folder / f"{graph.name}.pt2"
    compile_package(graph, program, path, machine, **options)
    del program
    built = time.perf_counter()
    seconds = {"export": traced - start, "build": built - traced}
    tell(f"{graph.name}: {path.stat().st_size / 1e6:.1f} MB in {built - start:.1f} s")
    if not config.run:
        return Exported((path.name,), seconds, checked={"run": "not asked for"}, facts=facts)
    runner = open_aoti(path, config.device)
    errors = check(graph, runner, config.precision)
    seconds |= timed(graph, runner)
    seconds["check"] = time.perf_counter() - built
    return Exported((path.name,), seconds, errors, {"run": "passed"}, facts)


def compile_package(
    graph: Graph, program: ExportedProgram, path: Path, machine: Machine, **options: Any
) -> None:
    """Compile a traced graph for this machine into a package at `path`.

    options : of Inductor's configuration.

    Raises
    ------
    ValueError : AOTInductor, or the compiler that it calls, does not take the program, or not for
        all lengths of its axes.
    """
    note = Note(
        name=graph.name,
        inputs=graph.inputs,
        outputs=graph.outputs,
        dims=dict(graph.dims),
        orders=tuple(memory_order(x) for x in program.example_inputs[0]),
        machine=machine,
    )
    settings = {"aot_inductor.metadata": {KEY: note.text()}, **options}
    with torch.no_grad(), _quiet(), unchanged_axes(program, graph.name):
        try:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=settings
            )
        except Exception as error:
            # Inductor wraps whatever fails in it, a compiler's exit code included.
            raise ValueError(
                f"{graph.name} cannot be compiled into a package: {first_line(error)}"
            ) from error


def check(graph: Graph, runner: AotiRunner, precision: str) -> dict[str, float]:
    """Largest errors over the least and most lengths of the dynamic axes.

    Raises
    ------
    ValueError : an error beyond the precision's bound and twice PyTorch's own.
    """
    every = [graph.lengths(which) for which in (("least", "most") if graph.dims else ("best",))]
    found = [_pair(graph, runner, lengths) for lengths in every]
    errors = {"same": max(largest_error(package, own) for package, own in found)}
    if graph.wide is not None:
        wide = graph.wide()
        exact = [_run(wide, graph.example(lengths), widen=True) for lengths in every]
        del wide
        for name, side in (("float32", 0), ("module", 1)):
            errors[name] = max(
                largest_error(pair[side], truth) for pair, truth in zip(found, exact, strict=True)
            )
    limit = max(BOUNDS.get(precision, 0.0), 2 * errors.get("module", 0.0))
    error = errors.get("float32", errors["same"])
    if error == float("inf") or not error <= (limit or float("inf")):
        raise ValueError(
            f"{graph.name}: the package differs from float32 by {error:.2e}, PyTorch in "
            f"{precision} by {errors.get('module', 0.0):.2e}; the bound is {limit:.2e}: it is wrong"
        )
    return errors


def _pair(
    graph: Graph, runner: AotiRunner, lengths: Mapping[str, int]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results of the package and of the module, on the host."""
    inputs = graph.example(lengths)
    return _run(runner, inputs), _run(graph.module, inputs)


def _run(
    call: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], *, widen: bool = False
) -> tuple[Tensor, ...]:
    if widen:
        inputs = tuple(x.float() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        return tuple(y.cpu() for y in call(*inputs))


def timed(graph: Graph, runner: AotiRunner) -> dict[str, float]:
    """Seconds of a call of the package and of the module at the best lengths (median of 5)."""
    inputs = graph.examples()
    calls = {"package": lambda: runner(*inputs), "module": lambda: graph.module(*inputs)}
    with torch.no_grad():
        return {name: median_seconds(call, runner.device) for name, call in calls.items()}


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call after one that is not counted, the GPU's work included."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = once()
    return statistics.median(once() for _ in range(1 if first > LONG else RUNS))


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the compiler's remarks on itself are unsaid."""
    logger = logging.getLogger("torch._inductor")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
