"""The order of samples: a function of the place alone, fair to scenes and weights."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gen3r_training.data import SampleOrder, Ticket, derive_seed
from gen3r_training.data.sampler import permutation
from gen3r_training.data.stream import sample_places

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)
WEIGHTS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=4, max_size=4)
SEEDS = st.integers(0, 2**31)


def tickets(order: SampleOrder, count: int, start: int = 0) -> list[Ticket]:
    return [order.ticket(g) for g in range(start, start + count)]


def weighted(counts: Sequence[int], weights: Sequence[float], seed: int) -> SampleOrder:
    chosen = list(weights[: len(counts)])
    return SampleOrder(counts, chosen if any(chosen) else (), seed)


@given(SIZES, WEIGHTS, SEEDS, st.integers(0, 500))
@settings(max_examples=50, deadline=None)
def test_every_place_is_a_function_of_itself(
    counts: list[int], weights: list[float], seed: int, g: int
) -> None:
    fresh, used = (weighted(counts, weights, seed) for _ in range(2))
    tickets(used, 30)
    ticket = fresh.ticket(g)
    assert ticket == used.ticket(g) == pickle.loads(pickle.dumps(used)).ticket(g)
    assert ticket.index == g and 0 <= ticket.seed < 2**63
    assert 0 <= ticket.scene < counts[ticket.dataset]


@given(SIZES, SEEDS, st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_an_epoch_is_a_permutation(counts: list[int], seed: int, epoch: int) -> None:
    order = SampleOrder(counts, (), seed)
    assert order.epoch_length == sum(counts)
    seen = [(t.dataset, t.scene) for t in tickets(order, sum(counts), epoch * sum(counts))]
    assert sorted(seen) == [(d, s) for d, n in enumerate(counts) for s in range(n)]


@given(SIZES, WEIGHTS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_weights_are_kept_and_scenes_repeat_last(
    counts: list[int], weights: list[float], seed: int
) -> None:
    order = weighted(counts, weights, seed)
    drawn = tickets(order, 3 * order.epoch_length)
    share = Counter(t.dataset for t in drawn)
    for dataset, (count, weight) in enumerate(zip(counts, order.weights, strict=True)):
        quota = max(1, round(weight * count)) if weight else 0
        assert share[dataset] == 3 * quota
        scenes = [t.scene for t in drawn if t.dataset == dataset]
        for start in range(0, len(scenes) - count + 1, count):
            assert len(set(scenes[start : start + count])) == count


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_ranks_share_the_stream(ranks: int, batch: int, accumulation: int, step: int) -> None:
    """Whatever the number of ranks, a step takes the same places, each once."""
    micro_steps = range(step * accumulation, (step + 1) * accumulation)
    taken = [
        g for m in micro_steps for r in range(ranks) for g in sample_places(m, batch, r, ranks)
    ]
    first = step * accumulation * ranks * batch
    assert taken == list(range(first, first + accumulation * ranks * batch))
    alone = [g for m in micro_steps for g in sample_places(m, batch * ranks, 0, 1)]
    assert alone == taken


def test_seeds_and_orders_differ() -> None:
    one, two = SampleOrder([50], (), 1), SampleOrder([50], (), 2)
    first, second = tickets(one, 100), tickets(two, 100)
    assert len({t.seed for t in first + second}) == 200
    scenes = [t.scene for t in first]
    assert scenes[:50] != [t.scene for t in second[:50]]
    assert scenes[:50] != scenes[50:]


def test_values_do_not_change_between_versions() -> None:
    """A resumed run depends on them."""
    assert derive_seed("sample", 42, 0) == 5114584564116034980
    assert derive_seed(1, "2") != derive_seed("1", 2)
    assert permutation(6, 42).tolist() == [4, 1, 2, 3, 0, 5]


@pytest.mark.parametrize(
    ("counts", "weights", "message"),
    [
        ([], (), "no data sets"),
        ([3, 0], (), "at least one"),
        ([3, 4], (1.0,), "1 weights for 2 data sets"),
        ([3, 4], (1.0, -1.0), "1 -1: weights must be finite and not negative"),
        ([3, 4], (1.0, float("nan")), "finite"),
        ([3, 4], (0.0, 0.0), "above 0"),
    ],
)
def test_bad_weights(counts: list[int], weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleOrder(counts, weights, 0)


def test_places_are_not_negative() -> None:
    with pytest.raises(ValueError, match="negative"):
        SampleOrder([3], (), 0).ticket(-1)
