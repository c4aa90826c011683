"""Record the passes and tokens of an engine while it decodes, and analyse them.

The engine needs no code for this. The recording wraps two methods that each pass calls.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ee_llm.inference.engine import Engine
from ee_llm.inference.outputs import RequestOutput, StepOutput
from ee_llm.inference.request import ExitResult, Request
from ee_llm.inference.scheduling.output import SchedulerOutput


@dataclass(frozen=True)
class Pass:
    """One pass: its schedule, its exit results, and when it started and ended."""

    scheduler_output: SchedulerOutput
    results: tuple[ExitResult, ...]
    start: float
    end: float


@dataclass(frozen=True)
class Arrival:
    """Tokens that one request received at the same time, and the boundaries of their exits."""

    time: float
    id: str
    exits: tuple[int, ...]
    is_last: bool


@dataclass(frozen=True)
class Trace:
    """One batch decoded from `start` to `end`. All requests arrive at the start."""

    generations: list[RequestOutput]
    arrivals: list[Arrival]
    passes: list[Pass]
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Return the duration of the whole batch, including its prompts."""
        return self.end - self.start

    @property
    def num_tokens(self) -> int:
        """Return the number of new tokens."""
        return sum(len(arrival.exits) for arrival in self.arrivals)

    @property
    def heads_per_token(self) -> float:
        """Return the rows that exits evaluated per new token, including the final exit."""
        num_rows = sum(
            len(token_range)
            for one in self.passes
            for token_range in one.scheduler_output.logit_rows
        )
        return num_rows / self.num_tokens

    @property
    def first_token_seconds(self) -> list[float]:
        """Return the time to the first token of each request."""
        first: dict[str, float] = {}
        for arrival in self.arrivals:
            first.setdefault(arrival.id, arrival.time - self.start)
        return list(first.values())

    @property
    def gaps(self) -> list[float]:
        """Return the seconds between consecutive tokens of a request; 0 if they arrive together."""
        last: dict[str, float] = {}
        found: list[float] = []
        for arrival in self.arrivals:
            if arrival.id in last:
                found.append(arrival.time - last[arrival.id])
            found += [0.0] * (len(arrival.exits) - 1)
            last[arrival.id] = arrival.time
        return found


@dataclass(frozen=True)
class Steady:
    """The part of a trace in which all sequences decode and no prompt is being processed.

    Attributes:
        seconds: The duration of this part.
        exits: The boundaries of its tokens' exits.
        share: Its share of all new tokens.
    """

    seconds: float
    exits: tuple[int, ...]
    share: float

    @property
    def seconds_per_token(self) -> float:
        """Return the seconds per token, over all sequences."""
        return self.seconds / len(self.exits)


def decode(engine: Engine, requests: Sequence[Request]) -> Trace:
    """Decode requests that arrive at once, and return the trace."""
    arrivals: list[Arrival] = []

    def record(output: StepOutput) -> None:
        exits = tuple(token_output.exit for token_output in output.tokens)
        is_last = output.request_output is not None
        arrivals.append(Arrival(time.perf_counter(), output.request_id, exits, is_last))

    with recording(engine) as passes:
        start = time.perf_counter()
        generations = engine.generate(requests, record)
        end = time.perf_counter()
    return Trace(generations, arrivals, passes, start, end)


@contextmanager
def recording(engine: Engine) -> Iterator[list[Pass]]:
    """Yield a list to which each pass of the engine is appended."""
    run, apply = engine.runner.run, engine.scheduler.apply
    passes: list[Pass] = []
    start = 0.0

    def recorded_run(scheduler_output: SchedulerOutput) -> Any:
        nonlocal start
        start = time.perf_counter()
        return run(scheduler_output)

    def recorded_apply(scheduler_output: SchedulerOutput, results: Sequence[ExitResult]) -> Any:
        passes.append(Pass(scheduler_output, tuple(results), start, time.perf_counter()))
        return apply(scheduler_output, results)

    engine.runner.run = recorded_run  # type: ignore[method-assign]
    engine.scheduler.apply = recorded_apply  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        del engine.runner.run, engine.scheduler.apply


def steady(trace: Trace) -> Steady:
    """Return the passes from the end of the last prompt to the end of the first sequence.

    A prompt ends when its rows have run through all segments. With exits, this can be long after
    its first token. If there is no pass in between, the result is the whole trace.
    """
    num_prompt = len(trace.generations[0].prompt_token_ids)
    last = max(one.scheduler_output.last_segment for one in trace.passes)
    ends: dict[int, int] = {}  # slot: index of the pass
    for number, one in enumerate(trace.passes):
        for step in one.scheduler_output.steps:
            for token_range in step.ranges:
                if step.segment == last and token_range.stop >= num_prompt:
                    ends.setdefault(token_range.slot, number)
    starts = [one.start for one in trace.passes] + [trace.end]
    # The tokens of a pass arrive before the next pass starts.
    finish = min(arrival.time for arrival in trace.arrivals if arrival.is_last)
    end = next(start for start in starts if start >= finish)
    begin = starts[max(ends.values()) + 1] if len(ends) == len(trace.generations) else end
    inside = [a for a in trace.arrivals if begin < a.time <= end]
    if not inside:
        begin, end, inside = trace.start, trace.end, trace.arrivals
    exits = tuple(exit for arrival in inside for exit in arrival.exits)
    return Steady(end - begin, exits, len(exits) / trace.num_tokens)


@dataclass(frozen=True)
class DeferralTimes:
    """For each row that declined an exit, the passes and seconds until it continued."""

    steps: list[int]
    seconds: list[float]


def deferral_times(passes: Sequence[Pass]) -> DeferralTimes:
    """Return how long each row waited after declining an exit before it ran deeper."""
    waiting: dict[tuple[int, int], tuple[int, ExitResult, float]] = {}  # (slot, segment)
    found = DeferralTimes([], [])
    for number, one in enumerate(passes):
        for step in one.scheduler_output.steps:
            for token_range in step.ranges:
                since = waiting.get((token_range.slot, step.segment))
                if since and token_range.start <= since[1].position < token_range.stop:
                    found.steps.append(number - since[0] - 1)
                    found.seconds.append(one.start - since[2])
                    del waiting[token_range.slot, step.segment]
        for result in one.results:
            if not result.exited:
                next_segment = one.scheduler_output.last_segment + 1
                waiting[result.slot, next_segment] = (number, result, one.end)
    return found


def fill_share(passes: Sequence[Pass], num_prompt: int) -> float:
    """Return the share of rows that ran through a segment after their token was decided.

    These rows run only for the keys and values that later rows need. A row counts once per
    segment. Prompt rows that decide no token do not count. The share is not defined for
    `self-speculative`, which evaluates an exit for every row that runs deeper.
    """
    decided: dict[int, int] = {}  # slot: newest position whose token has been decided
    num_rows = num_fill = 0
    for one in passes:
        for step in one.scheduler_output.steps:
            for token_range in step.ranges:
                start = max(token_range.start, num_prompt - 1)
                num_rows += max(0, token_range.stop - start)
                num_fill += max(
                    0, min(token_range.stop, decided.get(token_range.slot, -1) + 1) - start
                )
        for result in one.results:
            if result.exited:
                decided[result.slot] = result.position
    return num_fill / num_rows if num_rows else 0.0
