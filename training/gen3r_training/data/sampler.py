"""The order of a run's samples: a pure function of (scenes per data set, weights, seed).

`SampleOrder.ticket(g)` names the sample at place g of the endless stream, whatever was asked
before, so a run resumes from its step number alone and ranks share the stream without talking.

A data set's share of an epoch is its weight times its number of scenes: weights of 1 draw every
scene equally often, and every epoch is then a permutation of all scenes; 0.25 shows a quarter of a
data set's scenes in each epoch. Whatever the weights, all scenes of a data set appear, in a fresh
order each time, before one of them repeats; such a pass may span epochs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gen3r_training.data.samples import Ticket, derive_seed

EPOCHS_KEPT = 2  # a run that is resumed or prefetched walks across one boundary at a time


def permutation(count: int, seed: int) -> np.ndarray:  # [count] int64
    """The numbers 0..count-1 in an order of their own for every seed.

    Sorted by a hash (splitmix64 of seed + i); numpy's generators may change between versions.
    """
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(seed)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


class SampleOrder:
    """An endless stream of tickets.

    Parameters
    ----------
    counts : scenes of each data set.
    weights : of each data set, not negative; empty stands for 1 each.
    seed : of the run.

    Raises
    ------
    ValueError : no data sets, one without scenes, another number of weights than of data sets, a
        weight that is negative or not finite, or all of them 0.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.counts = tuple(counts)
        self.weights = tuple(weights) or (1.0,) * len(self.counts)
        self.seed = seed
        self._check()
        shares = [w * n for w, n in zip(self.weights, self.counts, strict=True)]
        # Tickets of each data set in an epoch; one that has any weight gets at least one.
        self._quotas = tuple(max(1, round(share)) if share else 0 for share in shares)
        self.epoch_length = sum(self._quotas)
        self._epoch = lru_cache(maxsize=EPOCHS_KEPT)(self._shuffle_epoch)
        self._scenes = lru_cache(maxsize=EPOCHS_KEPT * len(self.counts))(self._shuffle_scenes)

    def __reduce__(self) -> tuple[type[SampleOrder], tuple[Sequence[int], Sequence[float], int]]:
        return SampleOrder, (self.counts, self.weights, self.seed)

    def ticket(self, g: int) -> Ticket:
        """The sample at place `g`. ValueError when it is negative."""
        if g < 0:
            raise ValueError(f"place {g} in the stream of samples must not be negative")
        epoch, place = divmod(g, self.epoch_length)
        datasets, ranks = self._epoch(epoch)
        dataset = int(datasets[place])
        # The how-manieth ticket of its data set this is, over all epochs.
        turn = epoch * self._quotas[dataset] + int(ranks[place])
        passed, position = divmod(turn, self.counts[dataset])
        scene = int(self._scenes(dataset, passed)[position])
        return Ticket(dataset, scene, derive_seed("sample", self.seed, g), g)

    def _shuffle_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The data set of every place of an epoch, and its rank among that data set's places."""
        labels = np.repeat(np.arange(len(self.counts)), self._quotas)
        datasets = labels[permutation(len(labels), derive_seed("epoch", self.seed, epoch))]
        ranks = np.empty(len(datasets), dtype=np.int64)
        for dataset, quota in enumerate(self._quotas):
            ranks[datasets == dataset] = np.arange(quota)
        return datasets, ranks

    def _shuffle_scenes(self, dataset: int, passed: int) -> np.ndarray:
        seed = derive_seed("scenes", self.seed, dataset, passed)
        return permutation(self.counts[dataset], seed)

    def _check(self) -> None:
        counts, weights = self.counts, self.weights
        if not counts:
            raise ValueError("there are no data sets to sample from; give --data_root")
        if min(counts) < 1:
            raise ValueError(f"data sets of {list(counts)} scenes: each needs at least one")
        if len(weights) != len(counts):
            raise ValueError(
                f"--data_weights: {len(weights)} weights for {len(counts)} data sets; "
                "give one for each --data_root"
            )
        shown = " ".join(f"{w:g}" for w in weights)
        if not all(0 <= w < math.inf for w in weights):
            raise ValueError(f"--data_weights {shown}: weights must be finite and not negative")
        if not any(weights):
            raise ValueError(f"--data_weights {shown}: at least one must be above 0")
