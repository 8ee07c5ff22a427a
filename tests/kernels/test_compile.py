"""Every kernel with every launch configuration compiles for Hopper, without a GPU.

A file of gen3r_kernels that holds kernels lists them in `compile_cases()`. Each is compiled for
compute capability 9.0 in a worker process; its shared memory must fit a block. Registers and
stack bytes (spills) are printed: python -m pytest -q -rP tests/kernels/test_compile.py
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton", reason="triton is not installed here")

import gen3r_kernels
from gen3r_kernels.dispatch import CompileCase

SHARED_LIMIT = 232_448  # bytes that one block can have on compute capability 9.0
WORKERS = 2

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"
)


class Compiled(NamedTuple):
    """What the compiler says of one kernel."""

    shared: int  # bytes
    registers: int  # a thread; -1 where the disassembler did not say
    stack: int  # bytes a thread: spilled registers


def cases_of(module: str) -> list[CompileCase]:
    return getattr(importlib.import_module(module), "compile_cases", list)()


def all_cases() -> list[tuple[str, int, str]]:
    """(module, index in its compile_cases(), name), for every kernel of the package."""
    names = [m.name for m in pkgutil.walk_packages(gen3r_kernels.__path__, "gen3r_kernels.")]
    return [(name, i, case.name) for name in names for i, case in enumerate(cases_of(name))]


def compile_case(module: str, index: int) -> Compiled:
    """Compile one case; runs in a worker process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    case = cases_of(module)[index]
    names = case.kernel.arg_names
    missing = [n for n in names if n not in case.signature and n not in case.constexprs]
    unknown = [n for n in (*case.signature, *case.constexprs) if n not in names]
    if missing or unknown:
        raise ValueError(f"{case.name}: arguments without a type {missing}, not known {unknown}")
    signature = {n: "constexpr" if n in case.constexprs else case.signature[n] for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.divisible}
    source = GluonASTSource if case.gluon else ASTSource
    kernel = triton.compile(
        source(case.kernel, signature, case.constexprs, attributes),
        target=GPUTarget("cuda", 90, 32),
        options=dict(case.options),
    )
    return Compiled(kernel.metadata.shared, *resources(kernel.asm["cubin"]))


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, from the disassembler that comes with Triton."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


CASES = all_cases()


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, int], Future[Compiled]]]:
    """The chosen cases, all under way at once."""
    chosen = [
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    context = multiprocessing.get_context("spawn")  # a forked torch keeps its threads' locks
    with ProcessPoolExecutor(WORKERS, context) as pool:
        yield {case[:2]: pool.submit(compile_case, *case[:2]) for case in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=[f"{m.split('.')[-1]}-{n}" for m, _, n in CASES])
def test_compiles(
    case: tuple[str, int, str], compiled: dict[tuple[str, int], Future[Compiled]]
) -> None:
    result = compiled[case[:2]].result()
    print(f"{case[2]}: {result.registers} registers, {result.stack} B stack, {result.shared} B")
    assert result.shared <= SHARED_LIMIT


def test_names_differ() -> None:
    names = [(module, name) for module, _, name in CASES]
    assert len(names) == len(set(names))
