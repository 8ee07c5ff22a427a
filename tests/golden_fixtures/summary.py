"""What the golden fixtures measured, at the end of a run of the tests."""

from __future__ import annotations

import pytest

from tests.golden_fixtures.golden import RECORD


def write_worst_errors(terminalreporter: pytest.TerminalReporter) -> None:
    """A table of the worst relative error per fixture, where any was compared."""
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
