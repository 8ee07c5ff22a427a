"""Two sets of rows, case by case: what became slower, larger or less exact.

    gen3r-engine bench --compare old.jsonl new.jsonl

A time or peak memory is worse when its median rose by more than the threshold and the two p20..p80
intervals do not overlap, so that a noisy case does not raise an alarm. An error is worse when it
rose by more than `ERROR_FACTOR`. Rates follow from times and are not compared; compile times are
shown and never count as worse, for they depend on what the machine has cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.harness import LOWER_IS_BETTER, BadInput, Row, identity, phase

THRESHOLD = 0.05
ERROR_FACTOR = 1.5
ERROR_FLOOR = 1e-6  # below float32's own rounding errors mean nothing


@dataclass(frozen=True)
class Change:
    """One figure before and after; verdict: "same", "better", "WORSE" or "shown"."""

    name: str
    metric: str
    before: float
    after: float
    unit: str
    verdict: str

    @property
    def ratio(self) -> float:
        """after / before - 1."""
        return self.after / self.before - 1 if self.before else 0.0


@dataclass(frozen=True)
class Comparison:
    """All figures that both sets hold, and the names that only one of them holds."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]


def compare(
    before: Sequence[Row], after: Sequence[Row], threshold: float = THRESHOLD
) -> Comparison:
    """Match rows by what they measure (suite, case, shape, dtype, provider, metric, GPU).

    Where each set comes from one GPU only, the two may differ.

    Raises
    ------
    BadInput : a threshold below 0, or sets that have no row in common.
    """
    if threshold < 0:
        raise BadInput(f"threshold {threshold} is negative; give a share such as 0.05")
    old, new = _by_name(before), _by_name(after)
    shared = [name for name in old if name in new]
    if not shared:
        raise BadInput("the two sets have no row in common; compare runs of the same suite")
    changes = [c for name in shared for c in _changes(name, old[name], new[name], threshold)]
    return Comparison(changes, _missing(old, new), _missing(new, old))


def _by_name(rows: Sequence[Row]) -> dict[tuple[str, ...], Row]:
    many = len({row["gpu"] for row in rows}) > 1
    return {
        (*identity(row), row["gpu"] if many else ""): row
        for row in rows
        if row["metric"] in LOWER_IS_BETTER and row["case"] != "ceiling"
    }


def _missing(have: Iterable[tuple[str, ...]], other: Iterable[tuple[str, ...]]) -> list[str]:
    there = set(other)
    return [_text(name) for name in have if name not in there]


def _text(name: tuple[str, ...]) -> str:
    suite, case, shape, dtype, provider, metric, stage, gpu = name
    what = metric if stage == "run" else stage
    return " ".join(part for part in (suite, case, shape, dtype, provider, what, gpu) if part)


def _changes(name: tuple[str, ...], old: Row, new: Row, threshold: float) -> list[Change]:
    label = _text((*name[:5], "", "run", name[-1]))
    compiling = phase(new) == "compile"
    if compiling:
        verdict = "shown"
    elif new["p20"] > old["p80"] and new["p50"] > old["p50"] * (1 + threshold):
        verdict = "WORSE"
    elif new["p80"] < old["p20"] and new["p50"] * (1 + threshold) < old["p50"]:
        verdict = "better"
    else:
        verdict = "same"
    metric = "compile" if compiling else new["metric"]
    found = [Change(label, metric, old["p50"], new["p50"], new["unit"], verdict)]
    errors = old["rel_error"], new["rel_error"]
    if metric == "time" and None not in errors:
        worse = errors[1] > ERROR_FACTOR * max(errors[0], ERROR_FLOOR)
        better = errors[0] > ERROR_FACTOR * max(errors[1], ERROR_FLOOR)
        verdict = "WORSE" if worse else "better" if better else "same"
        found.append(Change(label, "error", *errors, "", verdict))
    return found


def table(comparison: Comparison) -> str:
    """A markdown table of everything but unchanged errors, and the rows without a counterpart."""
    lines = ["| case | metric | before | after | change | verdict |", "|---|---|---|---|---|---|"]
    for c in comparison.changes:
        if c.metric == "error" and c.verdict == "same":
            continue
        figures = f"{c.before:.4g} {c.unit} | {c.after:.4g} {c.unit} | {c.ratio:+.1%}"
        lines.append(f"| {c.name} | {c.metric} | {figures} | {c.verdict} |")
    for title, names in (
        ("only before", comparison.only_before),
        ("only after", comparison.only_after),
    ):
        lines += [f"{title}: {name}" for name in names]
    return "\n".join(lines)
