"""What an engine did while it decoded: its passes, when tokens came, which rows waited and why.

Nothing is counted in the engine: its passes are watched from outside, at two calls in each.
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
    """One pass: its plan, what the exit said about the judged rows, when it began and ended."""

    scheduler_output: SchedulerOutput
    results: tuple[ExitResult, ...]
    start: float
    end: float


@dataclass(frozen=True)
class Arrival:
    """Tokens that came to one request at once: when, and the boundaries they left at."""

    time: float
    id: str
    exits: tuple[int, ...]
    is_last: bool


@dataclass(frozen=True)
class Trace:
    """One batch decoded from `start` to `end`, all requests there from the start."""

    generations: list[RequestOutput]
    arrivals: list[Arrival]
    passes: list[Pass]
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Return how long the whole batch took, prompts included."""
        return self.end - self.start

    @property
    def num_tokens(self) -> int:
        """Return the number of new tokens."""
        return sum(len(arrival.exits) for arrival in self.arrivals)

    @property
    def heads_per_token(self) -> float:
        """Return how many rows the exits judged for each new token, the final exit's included."""
        judged = sum(
            len(token_range)
            for one in self.passes
            for token_range in one.scheduler_output.logit_rows
        )
        return judged / self.num_tokens

    @property
    def first_token_seconds(self) -> list[float]:
        """Return the time to the first token of each request."""
        first: dict[str, float] = {}
        for arrival in self.arrivals:
            first.setdefault(arrival.id, arrival.time - self.start)
        return list(first.values())

    @property
    def gaps(self) -> list[float]:
        """Return the seconds between a request's neighbouring tokens; 0 where they come at once."""
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
    """The part of a trace in which all sequences decode and no prompt is under way.

    exits: where its tokens left. share: of all new tokens.
    """

    seconds: float
    exits: tuple[int, ...]
    share: float

    @property
    def seconds_per_token(self) -> float:
        """Return the seconds for each token of all sequences together."""
        return self.seconds / len(self.exits)


def decode(engine: Engine, requests: Sequence[Request]) -> Trace:
    """Return what the engine did with requests that all arrive at once."""
    arrivals: list[Arrival] = []

    def note(output: StepOutput) -> None:
        exits = tuple(token_output.exit for token_output in output.tokens)
        is_last = output.request_output is not None
        arrivals.append(Arrival(time.perf_counter(), output.request_id, exits, is_last))

    with watching(engine) as passes:
        start = time.perf_counter()
        generations = engine.generate(requests, note)
        end = time.perf_counter()
    return Trace(generations, arrivals, passes, start, end)


@contextmanager
def watching(engine: Engine) -> Iterator[list[Pass]]:
    """Note every pass of the engine in the list that this gives."""
    run, apply = engine.runner.run, engine.scheduler.apply
    passes: list[Pass] = []
    start = 0.0

    def noted_run(scheduler_output: SchedulerOutput) -> Any:
        nonlocal start
        start = time.perf_counter()
        return run(scheduler_output)

    def noted_apply(scheduler_output: SchedulerOutput, results: Sequence[ExitResult]) -> Any:
        passes.append(Pass(scheduler_output, tuple(results), start, time.perf_counter()))
        return apply(scheduler_output, results)

    engine.runner.run = noted_run  # type: ignore[method-assign]
    engine.scheduler.apply = noted_apply  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        del engine.runner.run, engine.scheduler.apply


def steady(trace: Trace) -> Steady:
    """Return the passes after the last prompt's end, up to the one that ends the first sequence.

    A prompt's end is when its rows are through all segments: with exits that may be long after
    its first token. Where no pass lies between, it is the whole trace.
    """
    num_prompt = len(trace.generations[0].prompt_token_ids)
    last = max(one.scheduler_output.last_segment for one in trace.passes)
    ends: dict[int, int] = {}  # slot: number of the pass
    for number, one in enumerate(trace.passes):
        for step in one.scheduler_output.steps:
            for token_range in step.ranges:
                if step.segment == last and token_range.stop >= num_prompt:
                    ends.setdefault(token_range.slot, number)
    starts = [one.start for one in trace.passes] + [trace.end]
    # Tokens of a pass come before the next one starts.
    finish = min(arrival.time for arrival in trace.arrivals if arrival.is_last)
    end = next(start for start in starts if start >= finish)
    begin = starts[max(ends.values()) + 1] if len(ends) == len(trace.generations) else end
    inside = [a for a in trace.arrivals if begin < a.time <= end]
    if not inside:
        begin, end, inside = trace.start, trace.end, trace.arrivals
    exits = tuple(exit for arrival in inside for exit in arrival.exits)
    return Steady(end - begin, exits, len(exits) / trace.num_tokens)


@dataclass(frozen=True)
class Holds:
    """Rows that declined an exit: how many passes ran before they went on, and for how long."""

    steps: list[int]
    seconds: list[float]


def deferred(passes: Sequence[Pass]) -> Holds:
    """Return how long each row waited at an exit that it had declined, until it went deeper."""
    waiting: dict[tuple[int, int], tuple[int, ExitResult, float]] = {}  # (slot, segment)
    found = Holds([], [])
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

    They run so that later rows find their keys and values there. A row counts once for each
    segment; those of prompts that decide no token are left out. Not for `self-speculative`, which
    judges every row that it takes deeper.
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
