"""`export --check` against a model that gives the entry's graph again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gen3r_export import selftest
from gen3r_export.export import Model
from gen3r_export.graph import DimRange
from gen3r_export.selftest import FAILED, PASSED, Row, check_folder
from tests.export.made import double_graph, made_entry, made_folder


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Checks an entry; its graph made anew takes 9 scenes at best, as with more working memory."""
    model: Any = Model(None, {"vggt": "w" * 32}, "made")  # type: ignore[arg-type]
    graph = replace(double_graph(), dims={"batch": DimRange(1, 9, 9)})
    monkeypatch.setattr(selftest, "load_model", lambda *a: model)
    monkeypatch.setattr(selftest, "graphs", lambda *a: iter([graph]))
    monkeypatch.setattr(selftest, "_tensorrt_here", lambda entry: "there is no GPU")

    def run(factor: float = 2.0, **changes: Any) -> Row:
        folder = made_folder(tmp_path, made_entry(tmp_path, factor, **changes))
        return check_folder(folder, None, lambda line: None)[0]

    return run


def test_an_entry_is_run_at_its_own_lengths(check: Any) -> None:
    row = check()
    assert (row.verdict, row.error) == (PASSED, 0.0)


def test_what_fails(check: Any) -> None:
    wrong, infinite = check(2.1), check(float("inf"))
    assert wrong.verdict == FAILED and wrong.text == "the bound is 1.0e-04"
    assert infinite.verdict == FAILED and infinite.text == "it gives numbers that are not finite"
    edited = check(precision="fp99")
    assert edited.verdict == FAILED and edited.text.startswith("plans.json: precision 'fp99' is")
    unknown = check(part="nose")
    assert unknown.verdict == FAILED and "parts nose are unknown" in unknown.text
