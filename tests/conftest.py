"""Options and golden-fixture selection shared by the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
FULL_GOLDEN = REPOSITORY.parent / "shared" / "reference" / "golden"
SLIM_GOLDEN = REPOSITORY / "tests" / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        action="append",
        type=Path,
        metavar="DIR",
        help="folder of golden fixtures (repeatable); default: the full reference set where it lies "
        "beside the checkout, else the slim set in tests/golden",
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much was not tested for want of a GPU."""
    skipped = [r for r in terminalreporter.getreports("skipped") if "gpu" in r.keywords]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} GPU tests were skipped: no CUDA GPU here")
