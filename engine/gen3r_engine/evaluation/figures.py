"""One figure of a suite: its value in every scene, the mean with an interval, the bar to reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap_interval(
    values: Sequence[float],  # one a scene
    seed: int = 0,
) -> tuple[float, float]:
    """The 95 % interval of the mean: percentiles of means of `RESAMPLES` draws with replacement.

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979. NaN without values.
    """
    known = np.asarray(values, dtype=np.float64)
    if known.size == 0 or not np.isfinite(known).all():
        return math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(known.size, size=(RESAMPLES, known.size))
    low, high = np.quantile(known[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Figure:
    """One figure.

    Parameters
    ----------
    part, name, unit : what was measured; the unit is empty for a share or a ratio.
    values : one a scene, or a single one that speaks of all scenes.
    bar, at_least : the mean must be at least (or at most) the bar; None: for information.
    baselines : the same figure of trivial answers, a value a scene.
    note : why there are no values, or what the reader must know.
    """

    part: str
    name: str
    unit: str
    values: tuple[float, ...]
    bar: float | None = None
    at_least: bool = True
    baselines: dict[str, tuple[float, ...]] = field(default_factory=dict)
    note: str = ""

    @property
    def mean(self) -> float:
        """Over the scenes; NaN where nothing was measured."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def holds(self) -> bool | None:
        """Whether the bar is reached; None without a bar or without values."""
        if self.bar is None or not self.values:
            return None
        return self.mean >= self.bar if self.at_least else self.mean <= self.bar

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinity become null."""
        low, high = bootstrap_interval(self.values)
        return {
            "part": self.part,
            "name": self.name,
            "unit": self.unit,
            "mean": plain(self.mean),
            "low": plain(low),
            "high": plain(high),
            "scenes": len(self.values),
            "bar": self.bar,
            "at_least": self.at_least,
            "holds": self.holds,
            "baselines": {
                name: plain(float(np.mean(values))) for name, values in self.baselines.items()
            },
            "values": [plain(value) for value in self.values],
            "note": self.note,
        }


def plain(value: float | None) -> float | None:
    """Six digits, or None for what JSON cannot hold."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")
