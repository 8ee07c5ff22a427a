"""Random numbers of one clip: drawn in blocks, since thousands of clips are described in python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BLOCK = 256


class Draws:
    """A stream of random values that is a pure function of its key of whole numbers."""

    def __init__(self, *key: int) -> None:
        self._generator = np.random.default_rng(key)
        self._values: list[float] = []

    def share(self) -> float:
        """Uniform in [0, 1)."""
        if not self._values:
            self._values = self._generator.random(_BLOCK).tolist()
        return self._values.pop()

    def uniform(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * self.share()

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.share() < probability

    def sign(self) -> float:
        """-1 or 1."""
        return 1.0 if self.share() < 0.5 else -1.0

    def integer(self, low: int, high: int) -> int:
        """Uniform in low .. high, both included."""
        return low + int(self.share() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, all equally likely."""
        return items[int(self.share() * len(items))]

    def weighted(self, weights: dict[T, float]) -> T:
        """One of the keys, as likely as its weight; the weights need not sum to 1."""
        left = self.share() * sum(weights.values())
        for item, weight in weights.items():
            left -= weight
            if left < 0:
                return item
        return item
