"""Decode with several candidates in turns, and time them."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ee_llm.errors import DataError, RunError
from ee_llm.evaluation.sweep.candidates import Candidate
from ee_llm.evaluation.sweep.deferrals import CandidateDeferrals
from ee_llm.inference.llm import LLM
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.text.prompt_encoder import EncodedPrompt

BASELINE_EVERY = 4
"""Runs of other candidates for each run of the full model."""

_WARM_UP_TOKENS = 16


class Speedup(NamedTuple):
    """A ratio of median speeds, with the quartiles of the ratios of single rounds.

    The quartiles are widened to include the ratio of medians.
    """

    value: float
    low: float
    high: float


@dataclass
class Timing:
    """The runs of one candidate.

    Attributes:
        outputs: The first output for each prompt, by the prompt's number.
        speeds: Tokens per second of each run that could be timed.
        full_speeds: Tokens per second of the full model next to each of these runs.
    """

    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    full_speeds: list[float] = field(default_factory=list)

    def add(self, speed: float | None, full_speed: float) -> None:
        """Add a run; without a speed, nothing followed its first step, and it does not count."""
        if speed is not None:
            self.speeds.append(speed)
            self.full_speeds.append(full_speed)

    @property
    def tokens_per_second(self) -> float | None:
        """Median speed; None if no run could be timed."""
        return statistics.median(self.speeds) if self.speeds else None

    def speedup(self) -> Speedup | None:
        """Return the speed relative to that of the full model; None if no run could be timed."""
        if not self.speeds:
            return None
        value = statistics.median(self.speeds) / statistics.median(self.full_speeds)
        rounds = [own / full for own, full in zip(self.speeds, self.full_speeds, strict=True)]
        if len(rounds) == 1:
            return Speedup(value, value, value)
        low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return Speedup(value, min(low, value), max(high, value))


class Rounds:
    """Runs of candidates on prompts; each round has its own prompts if there are enough."""

    def __init__(
        self,
        llm: LLM,
        candidates: Sequence[Candidate],
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
        batch_size: int,
        num_rounds: int,
    ) -> None:
        """Prepare the runs. The first candidate is the full model."""
        self._llm, self._candidates, self._prompts = llm, candidates, prompts
        self._params, self._batch_size, self._num_rounds = params, batch_size, num_rounds
        self._timings = [Timing() for _ in candidates]
        self._deferrals = CandidateDeferrals(llm.engine)

    @property
    def num_runs(self) -> int:
        """Number of runs that `run` makes, without those that warm up."""
        num_others = len(self._candidates) - 1
        return self._num_rounds * (num_others + -(-num_others // BASELINE_EVERY))

    def run(self, on_run: Callable[[], None]) -> list[Timing]:
        """Return the timings of all candidates.

        The order of the candidates alternates, and the full model runs before every few of them, so
        that a machine whose speed changes favours none.

        Args:
            on_run: Called after each run.

        Raises:
            DataError: The full model cannot be timed, because nothing follows its first step.
            RunError: A request failed.
        """
        self._warm_up(range(len(self._candidates)))
        others = range(1, len(self._candidates))
        for number in range(self._num_rounds):
            order = others if number % 2 == 0 else others[::-1]
            prompts = self._prompts_of(number)
            for start in range(0, len(order), BASELINE_EVERY):
                full = self._timed_full(prompts)
                self._timings[0].add(full, full)
                on_run()
                for index in order[start : start + BASELINE_EVERY]:
                    self._timings[index].add(self._timed(index, prompts), full)
                    on_run()
        return self._timings

    def pairs(self, index: int, count: int, on_run: Callable[[], None]) -> list[float]:
        """Return speed-ups of one candidate, each from a run and one of the full model next to it.

        Which of the two runs first alternates. Pairs in which nothing follows the candidate's first
        step are left out.

        Args:
            index: Number of the candidate.
            count: Number of pairs.
            on_run: Called after each run.

        Raises:
            DataError: The full model cannot be timed, because nothing follows its first step.
            RunError: A request failed.
        """
        self._warm_up((0, index))
        found = []
        for number in range(count):
            prompts = self._prompts_of(number)
            speeds: dict[int, float | None] = {}
            for one in (0, index) if number % 2 == 0 else (index, 0):
                speeds[one] = self._timed_full(prompts) if one == 0 else self._timed(one, prompts)
                on_run()
            own, full = speeds[index], speeds[0]
            if own is not None and full is not None:
                found.append(own / full)
        return found

    def _warm_up(self, indices: Iterable[int]) -> None:
        """Run candidates once, since first runs allocate and compile."""
        params = replace(
            self._params,
            max_tokens=min(_WARM_UP_TOKENS, self._params.max_tokens),
            ignore_eos=True,
        )
        batch = self._prompts_of(0)[: self._batch_size]
        for index in indices:
            with self._deferrals.of(index):
                self._decode([self._request(index, number, params) for number in batch])
        self._deferrals.reset()

    def _prompts_of(self, round_number: int) -> list[int]:
        """Return the numbers of the prompts of a round: whole batches, and all in all rounds."""
        share = -(-len(self._prompts) // self._num_rounds)
        count = self._batch_size * -(-share // self._batch_size)
        start = round_number * count
        return [number % len(self._prompts) for number in range(start, start + count)]

    def _timed_full(self, prompts: Sequence[int]) -> float:
        speed = self._timed(0, prompts)
        if speed is None:
            raise DataError(
                "full: nothing follows the first step of any generation of a round, so there is"
                " nothing to time. Use ignore_eos (--ignore-eos), or other prompts."
            )
        return speed

    def _timed(self, index: int, prompts: Sequence[int]) -> float | None:
        """Run a candidate, keep its outputs and return its tokens per second.

        Return None if nothing follows the first step, in which all prompts have a token.
        """
        timing = self._timings[index]
        num_tokens, seconds = 0, 0.0
        with self._deferrals.of(index):
            for batch in _batches(prompts, self._batch_size):
                requests = [self._request(index, number, self._params) for number in batch]
                outputs, count, taken = self._decode(requests)
                num_tokens, seconds = num_tokens + count, seconds + taken
                for number, output in zip(batch, outputs, strict=True):
                    timing.outputs.setdefault(number, output)
        return num_tokens / seconds if num_tokens else None

    def _request(self, index: int, number: int, params: SamplingParams) -> Request:
        candidate = self._candidates[index]
        return self._llm.make_request(
            self._prompts[number], params, exits=candidate.policy, strategy=candidate.strategy
        )

    def _decode(self, requests: Sequence[Request]) -> tuple[list[RequestOutput], int, float]:
        """Return the outputs, and the tokens and seconds after all requests have a token."""
        engine = self._llm.engine
        for request in requests:
            engine.add(request)
        waiting = {request.id for request in requests}
        finished: dict[str, RequestOutput] = {}
        start = end = 0.0
        num_tokens = 0
        while engine.has_work:
            steps = engine.step()
            now = time.perf_counter()
            for step in steps:
                if step.request_output is not None:
                    finished[step.request_id] = step.request_output
            if waiting:
                waiting -= {step.request_id for step in steps}
                start = end = now
            else:
                num_tokens += sum(len(step.tokens) for step in steps)
                end = now
        outputs = [finished[request.id] for request in requests]
        for output in outputs:
            if output.error is not None:
                raise RunError(f"a generation of the sweep failed: {output.error}")
        return outputs, num_tokens, end - start


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
