"""Decide how many sequences a deeper pass waits for, from pass latencies and exit rates.

A pass reads its layers' weights once, however few rows it has. Where that dominates, deferring rows
that declined an exit until several can go deeper together saves time; where the cost of the rows
themselves dominates, deferral only delays them. This module does not import torch.
"""

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

# Minimum predicted speed-up that justifies deferring rows: deferred rows are late, and a batch that
# ends together waits for the last of them.
_MIN_SPEEDUP = 1.1
# Weight of earlier observations at each new one: averages cover about the last fifty.
_DECAY = 0.98
# Greatest ratio of measured to expected latency that counts, so that a pass which the machine
# delayed does not outweigh the others.
_MAX_SLOWNESS = 4.0


@dataclass(frozen=True)
class LatencyProfile:
    """Measured latency per segment and row count.

    Attributes:
        rows: Row counts, increasing.
        seconds: seconds[s][i] is the latency of segment s with rows[i] rows.
    """

    rows: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def time(self, segment: int, num_rows: float) -> float:
        """Return the seconds for `num_rows` rows, interpolated linearly, and extrapolated above.

        Below the least measured count, the latency is that of the least count.
        """
        rows, seconds = self.rows, self.seconds[segment]
        if len(rows) == 1 or num_rows <= rows[0]:
            return seconds[0]
        right = min(max(1, bisect_left(rows, num_rows)), len(rows) - 1)
        share = (num_rows - rows[right - 1]) / (rows[right] - rows[right - 1])
        return seconds[right - 1] + share * (seconds[right] - seconds[right - 1])


@dataclass
class Deferral:
    """Tracks how often rows decline each exit, and computes how many each segment waits for.

    Attributes:
        passes: Latency of the segments without heads, for rows without a context;
            `record_latency` corrects it with the latency of real passes.
        heads: Latency of the exits at the ends of the segments, corrected likewise.
        max_deferred_steps: Greatest number of steps that a row waits.
    """

    passes: LatencyProfile
    heads: LatencyProfile
    max_deferred_steps: int
    _arrived: list[float] = field(default_factory=list)
    _evaluated: list[float] = field(default_factory=list)
    _declined: list[float] = field(default_factory=list)
    _timed: list[float] = field(default_factory=list)
    _slowness: list[float] = field(default_factory=list)  # decayed sums, as the others are

    def __post_init__(self) -> None:
        num_segments = len(self.passes.seconds)
        for sums, start in ((self._arrived, 1.0), (self._evaluated, 1.0), (self._declined, 0.5)):
            sums += [start] * (num_segments - 1)
        self._timed += [1.0] * num_segments
        self._slowness += [1.0] * num_segments

    def observe(self, segment: int, exited: Iterable[bool], num_skipped: int = 0) -> None:
        """Record the decisions of the exit at the end of `segment` (not the last one).

        Args:
            segment: The segment.
            exited: Whether each evaluated frontier exited.
            num_skipped: Number of frontiers that continued without an evaluation, for example
                because the exit is off for them.
        """
        results = [(1.0, not has_exited) for has_exited in exited] + [(0.0, True)] * num_skipped
        for is_evaluated, has_declined in results:
            self._arrived[segment] = _DECAY * self._arrived[segment] + 1.0
            self._evaluated[segment] = _DECAY * self._evaluated[segment] + is_evaluated
            self._declined[segment] = _DECAY * self._declined[segment] + has_declined

    def record_latency(self, rows: Items[tuple[int, int]], num_heads: int, seconds: float) -> None:
        """Record the latency of a pass.

        Args:
            rows: The segments of the pass in order, each with its number of rows.
            num_heads: Number of rows that the exit at the end evaluated.
            seconds: The latency.
        """
        first, last = rows[0][0], rows[-1][0]
        expected = sum(self.passes.time(*step) for step in rows)
        expected += self.heads.time(last, num_heads) if num_heads else 0.0
        ratio = min(seconds / max(expected, 1e-9), _MAX_SLOWNESS)
        self._timed[first] = _DECAY * self._timed[first] + 1.0
        self._slowness[first] = _DECAY * self._slowness[first] + ratio

    @property
    def rates(self) -> list[float]:
        """Share of the frontiers reaching each exit that continue beyond it."""
        return [d / n for d, n in zip(self._declined, self._arrived, strict=True)]

    def targets(self, num_sequences: int) -> list[int]:
        """Return how many of `num_sequences` each segment waits for before it runs."""
        return [1] + [
            self._target(segment, num_sequences) for segment in range(1, len(self.passes.seconds))
        ]

    def rate(self, segment: int, num_sequences: int, passes: int) -> float:
        """Return the predicted tokens per second if `segment` runs once in `passes` shallow passes.

        If a share q of the rows continues to `segment`, n (1-q)^i of n sequences are ready for
        shallow pass i. Each of them gets a token, there or in the deep pass, which the rows of all
        of them go through. Thus S(k) = sum_i r_i / (sum_i a(r_i) + d(sum_i r_i)) with r_i = n
        (1-q)^i for i < k, where a(r) and d(r) are the latencies, heads included, of the segments
        before `segment` and from it on.
        """
        reach = _reach(self.rates)
        q = reach[segment]
        ready = [num_sequences * (1.0 - q) ** i for i in range(passes)]
        num_deferred = num_sequences * (1.0 - (1.0 - q) ** passes)
        shallow, deep = 0.0, 0.0
        for s in range(segment):
            shallow += sum(self._time(s, reach[s] * n, reach[s] * n) for n in ready)
        for s in range(segment, len(reach)):
            share = reach[s] / max(q, 1e-9)
            deep += self._time(s, share * sum(ready), share * num_deferred)
        slow = [total / count for total, count in zip(self._slowness, self._timed, strict=True)]
        return sum(ready) / (slow[0] * shallow + slow[segment] * deep)

    def _time(self, segment: int, num_rows: float, num_frontiers: float) -> float:
        is_final = segment == len(self._evaluated)
        evaluated = 1.0 if is_final else self._evaluated[segment] / self._arrived[segment]
        head = evaluated * self.heads.time(segment, num_frontiers)
        return self.passes.time(segment, num_rows) + head

    def _target(self, segment: int, num_sequences: int) -> int:
        tokens_per_second = [
            self.rate(segment, num_sequences, passes)
            for passes in range(1, self.max_deferred_steps + 1)
        ]
        best = max(range(self.max_deferred_steps), key=tokens_per_second.__getitem__)
        if tokens_per_second[best] < _MIN_SPEEDUP * tokens_per_second[0]:
            return 1
        reach = _reach(self.rates)[segment]
        return max(1, round(num_sequences * (1.0 - (1.0 - reach) ** (best + 1))))


def _reach(rates: Items[float]) -> list[float]:
    """Return the share of tokens that need each segment before they are decided."""
    reach = [1.0]
    for declining in rates:
        reach.append(reach[-1] * declining)
    return reach
