"""Options and golden-fixture selection shared by the whole suite."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden_fixtures.golden import RECORD, Row
from tests.golden_fixtures.summary import write_worst_errors

REPOSITORY = Path(__file__).resolve().parents[1]
FULL_GOLDEN = REPOSITORY.parent / "shared" / "reference" / "golden"
SLIM_GOLDEN = REPOSITORY / "tests" / "golden"
GPU_TESTS = pytest.StashKey[frozenset[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        action="append",
        type=Path,
        metavar="DIR",
        help="folder of golden fixtures (repeatable); default: the full reference set where it "
        "lies beside the checkout, else the slim set in tests/golden",
    )


def golden_folders(config: pytest.Config) -> list[Path]:
    """The fixture folders of this run."""
    chosen = config.getoption("--golden")
    if not chosen:
        return [FULL_GOLDEN if FULL_GOLDEN.is_dir() else SLIM_GOLDEN]
    for folder in chosen:
        if not folder.is_dir():
            raise pytest.UsageError(f"--golden {folder}: no such folder")
    return [folder.resolve() for folder in chosen]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[GPU_TESTS] = frozenset(item.nodeid for item in marked)
    if torch.cuda.is_available():
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


# With pytest-xdist tests run in worker processes, whose knowledge the summaries below need.
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker's part: which tests are for a GPU, and what the golden fixtures measured."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["gpu_tests"] = sorted(session.config.stash.get(GPU_TESTS, frozenset()))
        output["golden"] = [dataclasses.astuple(row) for row in RECORD]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """The main process' part."""
    output = getattr(node, "workeroutput", {})
    known = node.config.stash.get(GPU_TESTS, frozenset())
    node.config.stash[GPU_TESTS] = known | set(output.get("gpu_tests", ()))
    RECORD.extend(Row(*values) for values in output.get("golden", ()))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The golden fixtures' errors; what tests recorded as their ``summary``; how many tests marked
    `gpu` were skipped, and why."""
    write_worst_errors(terminalreporter)
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(str(text))
    # By name, not by keyword: the folder tests/gpu is a keyword of every test in it.
    marked = config.stash.get(GPU_TESTS, frozenset())
    skipped = [r for r in terminalreporter.getreports("skipped") if r.nodeid in marked]
    reason = "" if torch.cuda.is_available() else ": no CUDA GPU here"
    terminalreporter.write_line(f"{len(skipped)} GPU tests were skipped{reason}")
