"""How many sequences a deeper pass should wait for: from what passes cost and how often rows go on.

A pass reads its layers' weights once, however few rows it has. Where that dominates, rows that
declined an exit are better held until several can go deeper together; where the rows themselves
dominate, holding only makes them late. No torch.
"""

from bisect import bisect_left
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

# Share by which holding must be better than not to be worth the latency: rows held are late, and a
# batch that ends together waits for the last of them.
_WORTH = 1.1
# Weight of what was seen before a verdict: rates follow the last fifty or so.
_MEMORY = 0.98
# A pass that the machine held up counts as this many times what was expected, at most.
_MOST_SLOWNESS = 4.0


@dataclass(frozen=True)
class LatencyProfile:
    """What something takes. rows: increasing row counts. seconds[s][i]: segment s, rows[i] rows."""

    rows: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def time(self, segment: int, num_rows: float) -> float:
        """Return the seconds for `num_rows`, by lines between and beyond those measured."""
        rows, seconds = self.rows, self.seconds[segment]
        if len(rows) == 1 or num_rows <= rows[0]:
            return seconds[0]
        right = min(max(1, bisect_left(rows, num_rows)), len(rows) - 1)
        share = (num_rows - rows[right - 1]) / (rows[right] - rows[right - 1])
        return seconds[right - 1] + share * (seconds[right] - seconds[right - 1])


@dataclass
class Deferral:
    """Follows how often rows go on at each exit, and says what each segment waits for.

    passes: what the segments take, without heads; heads: what the exits at their ends do. Both are
    of rows without a context: what passes really take corrects them as they come (`took`).
    """

    passes: LatencyProfile
    heads: LatencyProfile
    max_deferred_steps: int
    _arrived: list[float] = field(default_factory=list)
    _judged: list[float] = field(default_factory=list)
    _declined: list[float] = field(default_factory=list)
    _timed: list[float] = field(default_factory=list)
    _slowness: list[float] = field(default_factory=list)  # sums, as the others

    def __post_init__(self) -> None:
        num_segments = len(self.passes.seconds)
        for counts, start in ((self._arrived, 1.0), (self._judged, 1.0), (self._declined, 0.5)):
            counts += [start] * (num_segments - 1)
        self._timed += [1.0] * num_segments
        self._slowness += [1.0] * num_segments

    def observe(self, segment: int, left: Iterable[bool], num_unasked: int = 0) -> None:
        """Take note of which frontiers left at the end of `segment` (not the last one).

        num_unasked: frontiers that went on without a question, as where the exit is off.
        """
        results = [(1.0, not has_left) for has_left in left] + [(0.0, True)] * num_unasked
        for is_judged, has_declined in results:
            self._arrived[segment] = _MEMORY * self._arrived[segment] + 1.0
            self._judged[segment] = _MEMORY * self._judged[segment] + is_judged
            self._declined[segment] = _MEMORY * self._declined[segment] + has_declined

    def took(self, rows: Items[tuple[int, int]], num_heads: int, seconds: float) -> None:
        """Take note of what a pass took; rows: its segments in order, and the rows of each."""
        first, last = rows[0][0], rows[-1][0]
        expected = sum(self.passes.time(*part) for part in rows)
        expected += self.heads.time(last, num_heads) if num_heads else 0.0
        ratio = min(seconds / max(expected, 1e-9), _MOST_SLOWNESS)
        self._timed[first] = _MEMORY * self._timed[first] + 1.0
        self._slowness[first] = _MEMORY * self._slowness[first] + ratio

    @property
    def rates(self) -> list[float]:
        """Return the share of frontiers that go on beyond each exit, of those that get there."""
        return [d / n for d, n in zip(self._declined, self._arrived, strict=True)]

    def deferral_targets(self, num_sequences: int) -> list[int]:
        """Return for each segment how many of `num_sequences` to wait for before it runs."""
        return [1] + [
            self._hold(segment, num_sequences) for segment in range(1, len(self.passes.seconds))
        ]

    def rate(self, segment: int, num_sequences: int, passes: int) -> float:
        """Return tokens per second if `segment` runs after every `passes` passes before it.

        Of n sequences, n (1-q)^i are ready for pass i if a share q of the rows goes on to
        `segment`. Each gets a token, there or in the deeper pass, through which the rows of all of
        them go, so S(k) = sum_i r_i / (sum_i a(r_i) + d(sum_i r_i)), r_i = n (1-q)^i for i < k,
        with a(r) and d(r) the times of the segments before and from `segment` on, heads included.
        """
        reach = _reach(self.rates)
        q = reach[segment]
        ready = [num_sequences * (1.0 - q) ** i for i in range(passes)]
        held = num_sequences * (1.0 - (1.0 - q) ** passes)
        shallow, deep = 0.0, 0.0
        for s in range(segment):
            shallow += sum(self._time(s, reach[s] * n, reach[s] * n) for n in ready)
        for s in range(segment, len(reach)):
            share = reach[s] / max(q, 1e-9)
            deep += self._time(s, share * sum(ready), share * held)
        slow = [total / count for total, count in zip(self._slowness, self._timed, strict=True)]
        return sum(ready) / (slow[0] * shallow + slow[segment] * deep)

    def _time(self, segment: int, num_rows: float, num_frontiers: float) -> float:
        is_final = segment == len(self._judged)
        asked = 1.0 if is_final else self._judged[segment] / self._arrived[segment]
        head = asked * self.heads.time(segment, num_frontiers)
        return self.passes.time(segment, num_rows) + head

    def _hold(self, segment: int, num_sequences: int) -> int:
        tokens_per_second = [
            self.rate(segment, num_sequences, passes)
            for passes in range(1, self.max_deferred_steps + 1)
        ]
        best = max(range(self.max_deferred_steps), key=tokens_per_second.__getitem__)
        if tokens_per_second[best] < _WORTH * tokens_per_second[0]:
            return 1
        reach = _reach(self.rates)[segment]
        return max(1, round(num_sequences * (1.0 - (1.0 - reach) ** (best + 1))))


def _reach(rates: Items[float]) -> list[float]:
    """Return the share of rows that goes through each segment before its token is decided."""
    reach = [1.0]
    for declining in rates:
        reach.append(reach[-1] * declining)
    return reach
