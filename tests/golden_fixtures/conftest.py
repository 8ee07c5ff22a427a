"""`golden`: one fixture file per folder for the kind that a test module names in `KIND`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import golden_folders
from tests.golden_fixtures.golden import RECORD, Golden


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" not in metafunc.fixturenames:
        return
    kind = metafunc.module.KIND
    found = [g for f in golden_folders(metafunc.config) if (g := Golden(f, kind)).path.is_file()]
    metafunc.parametrize(
        "golden", found, ids=[f"{g.folder.name}-{kind}" for g in found], indirect=True
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    fixture: Golden = request.param
    fixture.failures.clear()
    yield fixture
    if fixture.failures:
        pytest.fail("\n".join(fixture.failures))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RECORD:
        return
    worst: dict[tuple[str, str], list] = {}
    for row in RECORD:
        worst.setdefault((row.folder, row.kind), []).append(row)
    terminalreporter.section("worst relative error per golden fixture")
    write = terminalreporter.write_line
    columns = "{:<20} {:>7} {:>12} {:>10}  {:4}  {}"
    write(columns.format("fixture", "tensors", "worst error", "tolerance", "", "worst tensor"))
    folder = None
    for (path, kind), rows in sorted(worst.items()):
        if path != folder:
            folder = path
            write(path)
        # NaN counts as worst; otherwise the row that comes nearest to its own bound.
        top = max(
            rows,
            key=lambda r: float("inf") if r.error != r.error else r.error / max(r.tolerance, 1e-12),
        )
        verdict = "ok" if all(r.ok for r in rows) else "FAIL"
        error, tolerance = f"{top.error:.2e}", f"{top.tolerance:.0e}"
        write(columns.format(kind, len(rows), error, tolerance, verdict, top.name))
