"""Imports go down only: command line > engine > export, training > gen3r > gen3r_kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Each floor: its folder and the packages it may import beside itself.
FLOORS = {
    "gen3r_kernels": ("kernels/gen3r_kernels", set[str]()),
    "gen3r": ("gen3r", {"gen3r_kernels"}),
    "gen3r_export": ("export/gen3r_export", {"gen3r", "gen3r_kernels"}),
    "gen3r_training": ("training/gen3r_training", {"gen3r", "gen3r_kernels"}),
    "gen3r_engine": (
        "engine/gen3r_engine",
        {"gen3r", "gen3r_kernels", "gen3r_export", "gen3r_training"},
    ),
}
OUTSIDE = {"tests", "benchmarks"}


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import in `source`, a module of `package` (dotted)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            yield node.lineno, ".".join(part for part in (base, node.module) if part)


def violations(source: str, package: str) -> list[str]:
    """Imports in `source` that go up or sideways, one text each."""
    floor = package.split(".")[0]
    allowed = FLOORS[floor][1] | {floor}
    found = []
    for line, name in imported_modules(source, package):
        top = name.split(".")[0]
        if top in (FLOORS.keys() | OUTSIDE) - allowed:
            found.append(f"line {line}: {floor} imports {name}")
        if (
            floor == "gen3r_engine"
            and ".cli" not in package
            and name.startswith("gen3r_engine.cli")
        ):
            found.append(f"line {line}: the runtime imports its command line ({name})")
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down(floor: str) -> None:
    folder = REPOSITORY / FLOORS[floor][0]
    found = []
    for path in sorted(folder.rglob("*.py")):
        package = ".".join((floor, *path.relative_to(folder).parent.parts))
        found += [f"{path}: {v}" for v in violations(path.read_text(encoding="utf-8"), package)]
    assert not found, "\n".join(found)


def test_the_check_finds_what_it_should() -> None:
    assert violations("import gen3r_engine.outputs", "gen3r")
    assert violations("def f():\n    from gen3r.config import GEN3R", "gen3r_kernels")
    assert violations("import gen3r_training", "gen3r_export")
    assert violations("from gen3r_engine.cli import main", "gen3r_engine")
    assert violations("from .cli import main", "gen3r_engine")
    assert violations("import tests.conftest", "gen3r")
    assert not violations("from gen3r_kernels import attention", "gen3r.vggt")
    assert not violations("from gen3r_engine.cli import main", "gen3r_engine.cli")


@pytest.mark.parametrize("folder", ["kernels", "engine", "export", "training"])
def test_no_package_directly_in_a_floor_folder(folder: str) -> None:
    """A top-level package called `kernels` would shadow the one that transformers looks for."""
    assert not (REPOSITORY / folder / "__init__.py").exists()


def test_every_package_is_typed() -> None:
    for name, (folder, _) in FLOORS.items():
        assert (REPOSITORY / folder / "py.typed").is_file(), name
