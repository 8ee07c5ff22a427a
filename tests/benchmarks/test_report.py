"""The markdown table, the roofline picture, and comparisons of two sets of rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import report
from benchmarks.compare import Change, compare, table
from benchmarks.harness import BadInput, Row
from tests.benchmarks.rows import WHERE, kernel_rows, row


def test_one_line_per_provider() -> None:
    text = report.markdown(kernel_rows())
    assert "## NVIDIA Test GPU: kernels" in text
    assert "torch 2.11.0; triton 3.6.0; driver 1.2; commit 0123456789ab" in text
    (line,) = [line for line in text.splitlines() if "| gen3r |" in line]
    for cell in ("1 (0.94 to 1.06)", "2,000 GB/s", "71%", "4.1", "0.002", "0.5", "3.25"):
        assert f"| {cell} |" in line, (cell, line)
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_columns_without_figures_are_left_out() -> None:
    text = report.markdown([row(samples=(5.0,))])
    assert "peak GiB" not in text and "of ceiling" not in text and "time, ms" in text


def test_the_roofline_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = report.write_report(kernel_rows(), tmp_path / "new")
    assert [p.name for p in written] == ["report.md", "roofline-nvidia-test-gpu.png"]
    with Image.open(written[1]) as image:
        assert image.width > 800 and len(image.convert("RGB").getcolors(10**6) or ()) > 20
    assert "roofline-nvidia-test-gpu.png" in written[0].read_text()


def test_rows_without_counted_work_have_no_roofline(tmp_path: Path) -> None:
    written = report.write_report([row()], tmp_path)
    assert [p.name for p in written] == ["report.md"]


def changes(before: Row, after: Row, threshold: float = 0.05) -> list[Change]:
    return compare([before], [after], threshold).changes


@pytest.mark.parametrize(
    ("samples", "verdict"),
    [
        ((1.01, 1.02, 1.03), "same"),  # within the threshold
        ((1.2, 1.21, 1.22), "WORSE"),
        ((0.5, 1.2, 1.9), "same"),  # slower in the median, but the intervals overlap
        ((0.8, 0.81, 0.82), "better"),
    ],
)
def test_times_are_judged_by_threshold_and_spread(samples: tuple[float, ...], verdict: str) -> None:
    (change,) = changes(row(samples=(0.99, 1.0, 1.01)), row(samples=samples))
    assert change.verdict == verdict


def test_memory_and_errors_are_judged_and_compile_time_is_shown() -> None:
    memory = {"metric": "memory", "unit": "GiB"}
    (change,) = changes(row(samples=(1.0,), **memory), row(samples=(1.5,), **memory))
    assert change.verdict == "WORSE"
    _, error = changes(row(rel_error=0.002), row(rel_error=0.004))
    assert (error.metric, error.verdict) == ("error", "WORSE")
    _, error = changes(row(rel_error=1e-9), row(rel_error=9e-7))
    assert error.verdict == "same"
    slow = {"unit": "s", "config": {"phase": "compile"}}
    (change,) = changes(row(samples=(1.0,), **slow), row(samples=(9.0,), **slow))
    assert (change.metric, change.verdict) == ("compile", "shown")


def test_rows_of_one_side_are_named() -> None:
    both = [row(), row(metric="gbps", unit="GB/s", samples=(5.0,))]
    found = compare([*both, row(provider="old")], [*both, row(provider="new")])
    assert len(found.changes) == 1  # rates follow from times
    assert found.only_before == ["kernels unproject 2x3 float32 old time"]
    assert found.only_after == ["kernels unproject 2x3 float32 new time"]
    assert "only before: kernels unproject 2x3 float32 old time" in table(found)
    with pytest.raises(BadInput, match="no row in common"):
        compare([row("a")], [row("b")])
    with pytest.raises(BadInput, match="threshold -1"):
        compare(both, both, -1)


def test_two_gpus_are_compared_only_one_to_one() -> None:
    other = dataclasses.replace(WHERE, gpu="NVIDIA Other GPU")
    (change,) = changes(row(samples=(1.0,)), row(samples=(0.5,), where=other))
    assert change.verdict == "better"
    found = compare([row(), row(where=other)], [row(samples=(2.0,)), row(where=other)])
    assert [c.verdict for c in found.changes] == ["WORSE", "same"]
