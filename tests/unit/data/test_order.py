"""Orders: permutations and blends that depend only on seed and position."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_llm.data.order import MAX_PERIOD, BlendPattern, integer_weights, shuffled


@settings(deadline=None, max_examples=100)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_permutation(size: int, seed: int, epoch: int):
    assert sorted(shuffled(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_permutation_of_a_large_set():
    """Positions of a set that is too large to enumerate map to distinct elements."""
    size = 3 * 10**12
    elements = {shuffled(i, size, 1, 0) for i in range(0, size, size // 10_000)}
    assert len(elements) == 10_001 - (size % (size // 10_000) == 0)
    assert all(0 <= place < size for place in elements)


def test_order_depends_on_seed_epoch_and_stream():
    orders = {
        tuple(shuffled(i, 50, seed, epoch, stream) for i in range(50))
        for seed in range(3)
        for epoch in range(3)
        for stream in range(3)
    }
    assert len(orders) == 27


def test_order_never_changes():
    """A run that resumes with a later version must continue with the same samples."""
    assert [shuffled(i, 10, 1234, 0) for i in range(10)] == [2, 3, 9, 0, 4, 7, 5, 8, 1, 6]
    assert [shuffled(i, 10**9, 1234, 5, 2) for i in range(3)] == [
        314796210,
        784712946,
        852996314,
    ]


@pytest.mark.parametrize("size", [2, 3, 5, 8, 100])
def test_elements_are_uniformly_distributed(size: int):
    """Chi-square test over epochs for the first and last element, with fixed seeds.

    The limit is 5 standard deviations of a chi-square with size - 1 degrees of freedom.
    """
    num = 200 * size
    for index in (0, size - 1):
        counts = Counter(shuffled(index, size, 7, epoch) for epoch in range(num))
        chi_square = sum((counts[place] - 200) ** 2 / 200 for place in range(size))
        assert chi_square < size - 1 + 5 * (2 * (size - 1)) ** 0.5


def test_adjacent_samples_are_separated():
    """Samples that are adjacent in the data must not be adjacent in the order."""
    size = 1000
    order = [shuffled(i, size, 3, 0) for i in range(size)]
    steps = Counter((b - a) % size for a, b in pairwise(order))
    assert max(steps.values()) <= 8  # Poisson with mean 1: about 0.001 steps above 8 are expected.
    assert abs(np.corrcoef(order, range(size))[0, 1]) < 0.15  # 5 standard deviations


counts = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@settings(deadline=None, max_examples=150)
@given(counts=counts)
def test_blend_deviates_by_less_than_one_sample(counts: list[int]):
    pattern = BlendPattern(counts)
    total = sum(counts)
    taken = [0] * len(counts)
    for position in range(2 * total + 1):
        source, before = pattern.locate(position)
        assert before == taken[source]
        assert pattern.position(source, before) == position
        taken[source] += 1
        for i, count in enumerate(counts):
            assert abs(taken[i] - Fraction((position + 1) * count, total)) < 1


def test_blend_is_periodic():
    pattern = BlendPattern(integer_weights([0.3, 0.7]))
    assert [pattern.locate(10**15 + i) for i in range(10)] == [
        (source, before + (3 if source == 0 else 7) * 10**14)
        for source, before in [pattern.locate(i) for i in range(10)]
    ]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.3, 0.7], (3, 7)),
        ([1, 1, 1], (1, 1, 1)),
        ([0.1, 0.2], (1, 2)),
        ([2.5e-3, 1], (1, 400)),
        ([600, 400], (3, 2)),
        ([5.0], (1,)),
        ([1e-12, 1], (1, MAX_PERIOD - 1)),
    ],
)
def test_integer_weights(weights: list[float], expected: tuple[int, ...]):
    assert integer_weights(weights) == expected


@settings(deadline=None, max_examples=100)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_rounded_weights_are_close(weights: list[float]):
    counts = integer_weights(weights)
    assert sum(counts) <= MAX_PERIOD
    for count, weight in zip(counts, weights, strict=True):
        share = count / sum(counts)
        assert share == pytest.approx(weight / sum(weights), abs=len(weights) / MAX_PERIOD)


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_invalid_weights(weight: float):
    with pytest.raises(ValueError, match=r"data\.weights = .* must be finite numbers above 0"):
        integer_weights([1, weight])
