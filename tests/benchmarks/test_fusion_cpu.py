"""The rows of scene fusion in the suite `cpu`: providers, kept points, memory, what is skipped."""

from __future__ import annotations

import pytest

from benchmarks import fusion_cpu
from gen3r_engine.native import native


def test_rows_of_every_provider_that_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fusion_cpu, "SIZES", ((2000, 14),))
    rows = fusion_cpu.comparison()
    providers = {row.provider for row in rows}
    skipped = {"open3d", "python", "native"} - providers
    assert "python" in providers and (native() is None or "native" in providers)
    assert all(f"{name:<14} skipped: " in capsys.readouterr().out for name in list(skipped)[:1])
    assert {(row.case, row.shape) for row in rows} == {("fuse_points", "2000")}
    assert {(row.metric, row.unit) for row in rows} == {("time", "s"), ("memory", "GiB")}
    assert len({row.config["kept"] for row in rows}) == 1
    assert all(row.samples[0] >= 0 for row in rows)
