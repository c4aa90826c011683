"""How many sequences a deeper pass should wait for: from what passes cost and how often rows go on.

A pass reads its layers' weights once, however few rows it has. Where that dominates, rows that
declined an exit are better held until several can go deeper together; where the rows themselves
dominate, holding only makes them late. No torch.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# Share by which holding must be better than not to be worth the latency.
_WORTH = 1.02
# Weight of what was seen before a verdict: rates follow the last fifty or so.
_MEMORY = 0.98


@dataclass(frozen=True)
class Profile:
    """What passes take. rows: increasing row counts. seconds[s][i]: segment s with rows[i] rows.

    The times include the head of the exit at the segment's end, for all rows.
    """

    rows: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def time(self, segment: int, num_rows: float) -> float:
        """Return the seconds of a pass, between and beyond the measured row counts by lines."""
        rows, seconds = self.rows, self.seconds[segment]
        if len(rows) == 1 or num_rows <= rows[0]:
            return seconds[0]
        right = min(max(1, bisect_left(rows, num_rows)), len(rows) - 1)
        share = (num_rows - rows[right - 1]) / (rows[right] - rows[right - 1])
        return seconds[right - 1] + share * (seconds[right] - seconds[right - 1])


@dataclass
class Holding:
    """Follows the rates at which rows go on at each exit, and says what each segment waits for."""

    profile: Profile
    max_hold: int
    _judged: list[float] = field(default_factory=list)
    _declined: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        num_exits = len(self.profile.seconds) - 1
        self._judged, self._declined = [1.0] * num_exits, [0.5] * num_exits

    def observe(self, segment: int, left: Iterable[bool]) -> None:
        """Take note of which frontiers left at the end of `segment` (not the last one)."""
        for has_left in left:
            self._judged[segment] = _MEMORY * self._judged[segment] + 1.0
            self._declined[segment] = _MEMORY * self._declined[segment] + (not has_left)

    @property
    def rates(self) -> list[float]:
        """Return the share of frontiers that go on beyond each exit, of those that get there."""
        return [d / j for d, j in zip(self._declined, self._judged, strict=True)]

    def holds(self, num_sequences: int) -> list[int]:
        """Return for each segment how many of `num_sequences` to wait for before it runs."""
        return [1] + [
            self._hold(segment, num_sequences) for segment in range(1, len(self.profile.seconds))
        ]

    def _hold(self, segment: int, num_sequences: int) -> int:
        tokens_per_second = [
            rate(self.profile, self.rates, segment, num_sequences, passes)
            for passes in range(1, self.max_hold + 1)
        ]
        best = max(range(self.max_hold), key=tokens_per_second.__getitem__)
        if tokens_per_second[best] < _WORTH * tokens_per_second[0]:
            return 1
        reach = _reach(self.rates)[segment]
        return max(1, round(num_sequences * (1.0 - (1.0 - reach) ** (best + 1))))


def rate(
    profile: Profile, rates: Sequence[float], segment: int, num_sequences: int, passes: int
) -> float:
    """Return tokens per second if `segment` runs after every `passes` passes of those before it.

    Of n sequences, n (1-q)^i are ready for pass i if a share q of the rows goes on to `segment`.
    Each gets a token, there or in the deeper pass, through which the rows of all of them go, so
    S(k) = sum_i r_i / (sum_i a(r_i) + d(sum_i r_i)), r_i = n (1-q)^i for i < k, with a(r) and
    d(r) the times of the segments before and from `segment` on.
    """
    reach = _reach(rates)
    q = reach[segment]
    ready = [num_sequences * (1.0 - q) ** i for i in range(passes)]
    before = [(s, reach[s]) for s in range(segment)]
    beyond = [(s, reach[s] / max(q, 1e-9)) for s in range(segment, len(reach))]
    shallow = sum(profile.time(s, share * rows) for rows in ready for s, share in before)
    deep = sum(profile.time(s, share * sum(ready)) for s, share in beyond)
    return sum(ready) / (shallow + deep)


def _reach(rates: Sequence[float]) -> list[float]:
    """Return the share of rows that goes through each segment before its token is decided."""
    reach = [1.0]
    for declining in rates:
        reach.append(reach[-1] * declining)
    return reach
