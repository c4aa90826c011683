"""The test that a point is faster than the full model, in pairs of runs made for this purpose.

The fastest of many points is also the luckiest, so the runs that found it do not show that it is
faster. Runs after the choice do: without a difference, each pair is a coin toss (sign test).
"""

from collections.abc import Sequence
from math import comb

MIN_ROUNDS = 4
"""Rounds from which a point is worth a test."""

MIN_PAIRS = 10
"""Least number of pairs of a test."""

MAX_TRIES = 3
"""Points that are tested at most."""

LEVEL = 0.05
"""Greatest probability that a point passes, if none is faster than the full model."""


def needed_wins(num_pairs: int) -> int | None:
    """Return in how many pairs a point must be faster; None if no number of them is enough.

    Each point that may be tested gets its part of `LEVEL` (Bonferroni).
    """
    chance = 0.0
    needed = None
    for wins in range(num_pairs, -1, -1):
        chance += comb(num_pairs, wins) / 2**num_pairs
        if chance > LEVEL / MAX_TRIES:
            break
        needed = wins
    return needed


def num_wins(speedups: Sequence[float]) -> int:
    """Return the number of pairs in which the point was faster."""
    return sum(one > 1.0 for one in speedups)


def is_faster(speedups: Sequence[float]) -> bool:
    """Return whether the speed-ups of pairs show that a point is faster."""
    needed = needed_wins(len(speedups))
    return needed is not None and num_wins(speedups) >= needed
