"""Measure the costs of passes, and compute the largest speed-ups that exits allow at these costs.

A *level* is one or more consecutive segments that end at an exit in use or at the final exit.
Passes have n rows from n sequences. Their measured times are t_l(n) for level l alone, d_l(n) for
all levels up to l in one pass, and h_l(n) for the head of level l with its exit decisions.

The *ideal* assumes that every pass has n rows, and that each row runs only up to its exit:
    full(n) / sum_e p_e (d_e(n) + sum_{l <= e} h_l(n)), p_e the share of tokens that exit at e.

The *regime ideal* S(k) assumes exact keys and values. Every row runs through all levels at some
time, so exits save passes, not rows. Level l > 0 runs once for every k_l runs of level l - 1, on
the rows deferred for it and on the pending rows before them. Each of the n sequences is deferred
or ready independently of the others. Let q_l be the share of evaluated rows that decline exit l,
and reach_l = q_0 .. q_(l-1). Then
    run(0, a):  E[t_0(N) + h_0(N)], N ~ binomial(n, a); a tokens per sequence; a q_0 decline
    run(l, a):  k_l times run(l - 1, the share that is ready); for the share c that declined there,
                E[t_l(N / reach_l) + h_l(N)], N ~ binomial(n, c); c q_l decline, the rest is ready
    S(k) = full(n) / n * tokens / seconds of run(the last level, 1),
where a run with N = 0 costs nothing. A sequence brings 1 / reach_l rows to level l, the number of
tokens between two of its visits. With two levels, constant t_0 + h_0 = a, t_1 + h_1 = d and
full = a + d, and n so large that some row is always ready, this is
    S(k) = [(1 - (1 - q)^k) / q] (a + d) / (k a + d).
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import comb, prod
from typing import NamedTuple

from ee_llm import distributed
from ee_llm.inference.engine import Engine
from ee_llm.inference.exits.decision import ExitQuery, decide_exits
from ee_llm.inference.exits.policy import ExitPolicy
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.deferral import LatencyProfile
from ee_llm.inference.scheduling.output import SchedulerOutput, SegmentStep, TokenRange

# Runs of a level per run of the next level. More runs are not worth their tail latency.
PASSES = (1, 2, 3, 4, 6, 8)

Timer = Callable[[], float]
_Level = tuple[int, ...]
_Time = Callable[[_Level, int], float]


@dataclass(frozen=True)
class Costs:
    """Seconds by row count: each level, all levels up to it, each head, and the full model."""

    levels: LatencyProfile
    depths: LatencyProfile
    heads: LatencyProfile
    full: LatencyProfile


def levels(policy: ExitPolicy) -> tuple[_Level, ...]:
    """Return the segments of each level under a policy."""
    found: list[_Level] = []
    segments: _Level = ()
    for segment, threshold in enumerate((*policy.thresholds, 1.0)):
        segments = (*segments, segment)
        if threshold is not None:
            found.append(segments)
            segments = ()
    return tuple(found)


def shares(exits: Sequence[int], policy: ExitPolicy, num_layers: int) -> list[float]:
    """Return the share of tokens that exited at the end of each level."""
    used = [b for b in policy.boundaries if policy.threshold(b) is not None]
    return [exits.count(boundary) / len(exits) for boundary in (*used, num_layers)]


def declining(shares: Sequence[float]) -> list[float]:
    """Return the share of evaluated rows that decline each early exit."""
    reach, found = 1.0, []
    for share in shares[:-1]:
        found.append(max(0.0, 1.0 - share / reach) if reach > 0 else 0.0)
        reach -= share
    return found


def ideal(costs: Costs, shares: Sequence[float], num_rows: int) -> float:
    """Return the speed-up over the full model if a token costs only what lies below its exit."""
    heads = expected = 0.0
    for level, share in enumerate(shares):
        heads += costs.heads.time(level, num_rows)
        expected += share * (costs.depths.time(level, num_rows) + heads)
    return costs.full.time(0, num_rows) / expected


class Regime(NamedTuple):
    """The speed-up over the full model, and the runs of each level per run of the next one."""

    speedup: float
    passes: tuple[int, ...]


def best_regime(
    costs: Costs, declining: Sequence[float], num_sequences: int, choices: Sequence[int] = PASSES
) -> Regime:
    """Return the largest S(k), with k from `choices` for every level except the first."""
    return max(
        Regime(regime(costs, declining, num_sequences, passes), passes)
        for passes in product(choices, repeat=len(declining))
    )


class _Run(NamedTuple):
    """Seconds of all sequences; per sequence, its tokens and the shares ready and declined."""

    seconds: float
    tokens: float
    ready: float
    declined: float


def regime(
    costs: Costs, declining: Sequence[float], num_sequences: int, passes: Sequence[int]
) -> float:
    """Return S(k) as defined in the docstring of this module; passes[l - 1] is k_l."""
    rates = (*declining, 0.0)

    def seconds(level: int, share: float) -> float:
        reach = prod(rates[:level])
        counts = range(1, num_sequences + 1)
        return sum(
            _binomial(num_sequences, share, count)
            * (costs.levels.time(level, count / reach) + costs.heads.time(level, count))
            for count in (counts if share > 0 else ())
        )

    def run(level: int, ready: float) -> _Run:
        if level == 0:
            rate = rates[0]
            return _Run(seconds(0, ready), ready, ready * (1 - rate), ready * rate)
        spent = tokens = deferred = 0.0
        for _ in range(passes[level - 1]):
            before = run(level - 1, ready)
            spent, tokens = spent + before.seconds, tokens + before.tokens
            deferred, ready = deferred + before.declined, before.ready
        spent += seconds(level, deferred)
        ready += deferred * (1 - rates[level])
        return _Run(spent, tokens, ready, deferred * rates[level])

    total = run(len(declining), 1.0)
    return costs.full.time(0, num_sequences) * total.tokens / total.seconds


def measure_costs(
    engine: Engine, policy: ExitPolicy, num_sequences: int, context: int, num_rounds: int
) -> Costs:
    """Return the median times of an idle engine's passes, with `context` tokens per sequence.

    In passes of up to `num_sequences` rows, each row is from a different sequence. Larger passes
    have several rows per sequence.
    """
    own = levels(policy)
    depths = [sum(own[: index + 1], ()) for index in range(len(own))]
    most = num_sequences * min(4, engine.scheduler_config.max_pending)
    powers = [2**power for power in range(most.bit_length())]
    rows = sorted({num_sequences, *(power for power in powers if power <= most)})
    single = [count for count in rows if count <= num_sequences]  # one row per sequence
    with _pass_timers(engine, num_sequences, context) as timer:
        bare = {(level, n): timer(level, n, False) for level in own for n in rows}
        bare |= {(level, n): timer(level, n, False) for level in depths for n in single}
        headed = {(level, n): timer(level, n, True) for level in (*own, depths[-1]) for n in single}
        samples: dict[Timer, list[float]] = {t: [] for t in (*bare.values(), *headed.values())}
        for number in range(-1, num_rounds):
            for one, seconds in samples.items():
                one()  # brings the weights into the caches, as in a series of such passes
                sample = one()
                if number >= 0:  # the first round allocates
                    seconds.append(sample)

    def profile(counts: Sequence[int], of: Sequence[_Level], time: _Time) -> LatencyProfile:
        return LatencyProfile(tuple(counts), tuple(tuple(time(lv, n) for n in counts) for lv in of))

    def head(level: _Level, count: int) -> float:
        pairs = zip(samples[headed[level, count]], samples[bare[level, count]], strict=True)
        return max(0.0, statistics.median(a - b for a, b in pairs))

    return Costs(
        profile(rows, own, lambda *key: statistics.median(samples[bare[key]])),
        profile(single, depths, lambda *key: statistics.median(samples[bare[key]])),
        profile(single, own, head),
        profile(single, depths[-1:], lambda *key: statistics.median(samples[headed[key]])),
    )


@contextmanager
def _pass_timers(
    engine: Engine, num_sequences: int, context: int
) -> Iterator[Callable[[_Level, int, bool], Timer]]:
    """Yield a function that returns a timer of passes, given segments, rows and `with_head`."""
    assert not engine.has_work, "costs are measured on an idle engine"
    manager = engine.scheduler.blocks
    count = manager.num_needed(context)
    blocks = [[manager.allocate() for _ in range(count)] for _ in range(num_sequences)]
    tables = tuple(
        (slot, index, block) for slot, own in enumerate(blocks) for index, block in enumerate(own)
    )
    ranges = tuple(TokenRange(slot, context - 1, context) for slot in range(num_sequences))
    engine.runner.run(SchedulerOutput((SegmentStep(0, ranges),), (0,) * num_sequences, (), tables))

    def timer(segments: _Level, num_rows: int, with_head: bool) -> Timer:
        share, rest = divmod(num_rows, min(num_rows, num_sequences))
        lengths = [share + (slot < rest) for slot in range(min(num_rows, num_sequences))]
        ranges = tuple(TokenRange(slot, context - n, context) for slot, n in enumerate(lengths))
        tokens = (0,) * num_rows if segments[0] == 0 else ()
        heads = ranges if with_head else ()
        scheduler_output = SchedulerOutput(
            tuple(SegmentStep(s, ranges) for s in segments), tokens, heads, ()
        )
        queries = [
            ExitQuery(token_range.slot, context - 1, 0.0, "max_probability", SamplingParams())
            for token_range in heads
        ]

        def seconds() -> float:
            distributed.synchronize()
            start = time.perf_counter()
            logits, _ = engine.runner.run(scheduler_output)
            decide_exits(logits, queries)
            distributed.synchronize()
            return time.perf_counter() - start

        return seconds

    yield timer
    for own in blocks:
        manager.free(own)


def _binomial(count: int, share: float, successes: int) -> float:
    share = min(1.0, share)
    return comb(count, successes) * share**successes * (1 - share) ** (count - successes)
