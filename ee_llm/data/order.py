"""In which order samples are read: pure functions of a seed and a position, of nothing else.

Any rank can ask for any position at any time, at the cost of a few integer operations: there are no
index files, and nothing to restore after an interruption but the position.
"""

import hashlib
import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ee_llm.errors import DataError

_NUM_ROUNDS = 8
_MASK64 = (1 << 64) - 1
MAX_PERIOD = 1 << 18
"""Longest pattern of a blend: weights that need more are rounded to multiples of 1/MAX_PERIOD."""


def shuffled(index: int, size: int, seed: int, epoch: int, stream: int = 0) -> int:
    """Return the place of `index` in the permutation of range(size) that belongs to a key.

    The key is (seed, epoch, stream). A Feistel network permutes the smallest power of two that
    holds `size`, and is applied again until the result is below `size` (cycle walking; Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002): less than two times on average.
    """
    assert 0 <= index < size, f"index {index} of {size}"
    num_bits = (size - 1).bit_length()
    keys = _round_keys(seed, epoch, stream)
    while True:
        index = _feistel(index, num_bits, keys)
        if index < size:
            return index


def _feistel(value: int, num_bits: int, keys: Sequence[int]) -> int:
    right_bits = num_bits // 2
    left_bits = num_bits - right_bits
    left, right = value >> right_bits, value & ((1 << right_bits) - 1)
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & ((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return left << right_bits | right


def _mix(value: int) -> int:
    """Return 64 well-mixed bits (the finalizer of splitmix64; Steele, Lea and Flood, 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31


@lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int, stream: int) -> tuple[int, ...]:
    text = f"ee_llm order {seed} {epoch} {stream}".encode()
    digest = hashlib.blake2b(text, digest_size=8 * _NUM_ROUNDS).digest()
    return struct.unpack(f"<{_NUM_ROUNDS}Q", digest)


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest whole numbers in the proportion of `weights`.

    0.3 means three tenths, not the nearest binary fraction. If the sum exceeds MAX_PERIOD, the
    numbers are rounded, none to 0, so that it is MAX_PERIOD. Raises DataError for a weight that
    is not above 0.
    """
    if any(not math.isfinite(weight) or weight <= 0 for weight in weights):
        raise DataError(
            f"data.weights = {list(weights)}: every weight must be a number above 0; leave out the "
            "prefixes that are not wanted"
        )
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    counts = [int(fraction * scale) for fraction in exact]
    divisor = math.gcd(*counts)
    counts = [count // divisor for count in counts]
    total = sum(counts)
    if total > MAX_PERIOD:
        counts = [max(1, count * MAX_PERIOD // total) for count in counts]
        counts[counts.index(max(counts))] += MAX_PERIOD - sum(counts)
    return tuple(counts)


class BlendPattern:
    """Which of several sources each position of a blend is taken from.

    At every position p, source i has been taken floor(w_i p) or ceil(w_i p) times, w_i being its
    share. The pattern repeats after sum(counts) positions; one period is kept.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self.period = sum(counts)
        self._source = _one_period(self.counts)
        # The positions of a source within the period, and the rank of a position among them.
        self._places = [np.flatnonzero(self._source == i) for i in range(len(counts))]
        self._rank = np.zeros(self.period, np.int64)
        for places in self._places:
            self._rank[places] = np.arange(len(places))

    def locate(self, position: int) -> tuple[int, int]:
        """Return (source, how many times that source was taken before) of a position."""
        cycle, place = divmod(position, self.period)
        source = int(self._source[place])
        return source, cycle * self.counts[source] + int(self._rank[place])

    def position(self, source: int, taken: int) -> int:
        """Return the position at which `source` has been taken `taken` times before."""
        cycle, rank = divmod(taken, self.counts[source])
        return cycle * self.period + int(self._places[source][rank])


def _one_period(counts: Sequence[int]) -> NDArray[np.integer[Any]]:
    """Return the source of each position [period].

    The j-th taking of source i may happen from position floor((j - 1) / w_i) on and must have
    happened before position ceil(j / w_i): these bounds are the floor and ceil that BlendPattern
    promises. Unit jobs with whole bounds: serving the earliest deadline first meets all of them if
    that is possible at all, and it is, as taking a part w_i of every source at each position does.
    """
    period = sum(counts)
    taken = [0] * len(counts)
    waiting = [(0, i) for i in range(len(counts))]  # (position from which it may be taken, source)
    ready: list[tuple[int, int]] = []  # (deadline, source)
    sources = np.zeros(period, np.int32)
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            _, i = heappop(waiting)
            heappush(ready, (-(-(taken[i] + 1) * period // counts[i]), i))
        _, i = heappop(ready)
        sources[position] = i
        taken[i] += 1
        if taken[i] < counts[i]:
            heappush(waiting, (taken[i] * period // counts[i], i))
    return sources
