"""The order of samples, computed as a pure function of a seed and a position.

Any rank can compute any position at any time with a few integer operations. There are no index
files, and the position is the only state to restore after an interruption.
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
"""Maximum period of a blend: weights that need more are rounded to multiples of 1/MAX_PERIOD."""


def shuffled(index: int, size: int, seed: int, epoch: int, stream: int = 0) -> int:
    """Return element `index` of the permutation of range(size) with the key (seed, epoch, stream).

    A Feistel network permutes the smallest power of two that is at least `size`, and is applied
    repeatedly until the result is below `size` (cycle walking; Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002): less than twice on average.
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
    """Return 64 mixed bits (the finalizer of splitmix64; Steele, Lea and Flood, 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31


@lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int, stream: int) -> tuple[int, ...]:
    text = f"ee_llm order {seed} {epoch} {stream}".encode()
    digest = hashlib.blake2b(text, digest_size=8 * _NUM_ROUNDS).digest()
    return struct.unpack(f"<{_NUM_ROUNDS}Q", digest)


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest integers proportional to `weights`.

    0.3 is taken as three tenths, not as the nearest binary fraction. If the sum exceeds MAX_PERIOD,
    the integers are rounded, none of them to 0, so that the sum is MAX_PERIOD.

    Raises:
        DataError: A weight is not a finite number above 0.
    """
    if any(not math.isfinite(weight) or weight <= 0 for weight in weights):
        raise DataError(
            f"data.weights = {list(weights)} must be finite numbers above 0. Remove prefixes that "
            "you do not want to use."
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
    """The source of each position of a blend.

    Before position p, source i has been taken floor(w_i p) or ceil(w_i p) times, where w_i is its
    share. The pattern repeats after sum(counts) positions; one period is in memory.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self.period = sum(counts)
        self._source = _one_period(self.counts)
        # The positions of each source in the period, and the rank of each position among them.
        self._positions = [np.flatnonzero(self._source == i) for i in range(len(counts))]
        self._rank = np.zeros(self.period, np.int64)
        for positions in self._positions:
            self._rank[positions] = np.arange(len(positions))

    def locate(self, position: int) -> tuple[int, int]:
        """Return the source of a position and the number of earlier samples from that source."""
        cycle, offset = divmod(position, self.period)
        source = int(self._source[offset])
        return source, cycle * self.counts[source] + int(self._rank[offset])

    def position(self, source: int, taken: int) -> int:
        """Return the position of sample number `taken` (from 0) of `source`."""
        cycle, rank = divmod(taken, self.counts[source])
        return cycle * self.period + int(self._positions[source][rank])


def _one_period(counts: Sequence[int]) -> NDArray[np.integer[Any]]:
    """Return the source of each position [period].

    Sample j of source i may be taken from position floor((j - 1) / w_i) on and must be taken before
    position ceil(j / w_i), which gives the floor and ceil of BlendPattern. These are unit jobs with
    integer release times and deadlines, for which earliest deadline first finds a feasible schedule
    if there is one. There is one, as taking a fraction w_i of every source at each position is a
    feasible fractional schedule.
    """
    period = sum(counts)
    taken = [0] * len(counts)
    waiting = [(0, i) for i in range(len(counts))]  # (release position, source)
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
