"""Rows: keys, percentiles, files; every committed result keeps the schema."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import KEYS, UNITS, BadInput, Measurement, percentiles
from tests.benchmarks.rows import row


def test_keys_are_those_that_were_promised() -> None:
    promised = (
        "suite, case, provider, shape, dtype, metric, unit, p20, p50, p80, share_of_ceiling, "
        "rel_error, gpu, capability, driver, torch, triton, commit, utc, config"
    )
    assert ", ".join(KEYS) == promised
    assert tuple(row()) == KEYS


def test_percentiles() -> None:
    assert percentiles([7.0]) == (7.0, 7.0, 7.0)
    assert percentiles([float(n) for n in range(101)]) == (20.0, 50.0, 80.0)
    assert percentiles([3.0, 1.0, 2.0]) == (1.4, 2.0, 2.6)  # linear between the sorted samples
    assert percentiles([1.23456789]) == (1.2346, 1.2346, 1.2346)


def test_a_measurement_names_its_metric_and_unit() -> None:
    with pytest.raises(ValueError, match="metric 'time' in 'furlongs' is unknown; known: time in"):
        Measurement("a", "b", "1", "float32", "time", "furlongs", [1.0])
    with pytest.raises(ValueError, match="a/b: no samples"):
        Measurement("a", "b", "1", "float32", "time", "ms", [])


def test_every_committed_row_keeps_the_schema() -> None:
    files = sorted(harness.RESULTS.rglob("*.jsonl"))
    assert files
    for path in files:
        for found in harness.read_rows([path]):
            assert tuple(found) == KEYS
            assert found["unit"] in UNITS[found["metric"]]
            assert found["suite"] == path.stem
            assert harness.slug(found["gpu"]) == path.parent.name
            if found["metric"] in harness.LOWER_IS_BETTER or found["case"] == "ceiling":
                assert 0 < found["p20"] <= found["p50"] <= found["p80"]
            datetime.strptime(found["utc"], "%Y-%m-%dT%H:%M:%SZ")
        names = [harness.identity(found) for found in harness.read_rows([path])]
        assert len(names) == len(set(names)), path


def measured(case: str, provider: str, value: float) -> Measurement:
    return Measurement(case, provider, "2x3", "float32", "time", "ms", [value])


def test_writing_replaces_and_merging_keeps(tmp_path: Path) -> None:
    first = [measured("a", "eager", 1.0), measured("a", "gen3r", 2.0), measured("b", "eager", 3.0)]
    path = harness.write_rows(first, "kernels", tmp_path, "abc")
    assert path.parent.name == harness.slug(harness.device_name())
    again = [measured("a", "gen3r", 2.5), measured("c", "eager", 4.0)]
    assert harness.write_rows(again, "kernels", tmp_path, "def", merge=True) == path
    rows = harness.read_rows([tmp_path])
    found = [(r["case"], r["provider"], r["p50"], r["commit"]) for r in rows]
    assert found == [
        ("a", "eager", 1.0, "abc"),
        ("a", "gen3r", 2.5, "def"),
        ("b", "eager", 3.0, "abc"),
        ("c", "eager", 4.0, "def"),
    ]
    harness.write_rows(again, "kernels", tmp_path, "def")
    assert len(harness.read_rows([path])) == 2
    assert [p.name for p in path.parent.iterdir()] == ["kernels.jsonl"]


def test_the_environment_is_recorded(tmp_path: Path) -> None:
    (found,) = harness.read_rows([harness.write_rows([measured("a", "b", 1.0)], "x", tmp_path)])
    assert found["torch"] and found["gpu"] == harness.device_name()
    assert len(found["commit"].rstrip("+")) == 12 or found["commit"] == "unknown"
    assert found["config"]["repeats"] == 1


def test_files_that_hold_no_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        harness.read_rows([tmp_path / "none.jsonl"])
    with pytest.raises(BadInput, match="no rows found"):
        harness.read_rows([tmp_path])
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{\n")
    with pytest.raises(BadInput, match=r"bad.jsonl:1: not JSON"):
        harness.read_rows([bad])
    bad.write_text(json.dumps({**row(), "speed": 1}) + "\n")
    with pytest.raises(BadInput, match=r"missing or unknown: \['speed'\]"):
        harness.read_rows([bad])
