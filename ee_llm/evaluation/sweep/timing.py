"""Decode with several candidates in turns, and time them."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ee_llm.errors import DataError, RunError
from ee_llm.evaluation.sweep.candidates import Candidate
from ee_llm.inference.engine import Engine
from ee_llm.inference.llm import LLM
from ee_llm.inference.outputs import RequestOutput
from ee_llm.inference.request import Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.deferral import Deferral
from ee_llm.inference.text.prompt_encoder import EncodedPrompt

BASELINE_EVERY = 4
"""Runs of other candidates for each run of the full model."""

_WARM_UP_TOKENS = 8


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
        speeds: Tokens per second of each run.
        full_speeds: Tokens per second of the full model next to each run.
    """

    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    speeds: list[float] = field(default_factory=list)
    full_speeds: list[float] = field(default_factory=list)

    def speedup(self) -> Speedup:
        """Return the speed relative to that of the full model."""
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
        self._deferrals: dict[int, Deferral] = {}

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
            DataError: No generation has more than one token.
            RunError: A request failed.
        """
        self._warm_up()
        others = range(1, len(self._candidates))
        for number in range(self._num_rounds):
            order = others if number % 2 == 0 else others[::-1]
            prompts = self._prompts_of(number)
            for start in range(0, len(order), BASELINE_EVERY):
                full = self._timed(0, prompts)
                self._timings[0].full_speeds.append(full)
                on_run()
                for index in order[start : start + BASELINE_EVERY]:
                    self._timed(index, prompts)
                    self._timings[index].full_speeds.append(full)
                    on_run()
        return self._timings

    def _warm_up(self) -> None:
        """Run the first candidate of each family once, since first runs allocate and compile."""
        params = SamplingParams(max_tokens=min(_WARM_UP_TOKENS, self._params.max_tokens))
        batch = self._prompts_of(0)[: self._batch_size]
        for family in dict.fromkeys(candidate.family for candidate in self._candidates):
            index = [candidate.family for candidate in self._candidates].index(family)
            self._decode([self._request(index, number, params) for number in batch])

    def _prompts_of(self, round_number: int) -> list[int]:
        """Return the numbers of the prompts of a round: whole batches, and all in all rounds."""
        share = -(-len(self._prompts) // self._num_rounds)
        count = self._batch_size * -(-share // self._batch_size)
        start = round_number * count
        return [number % len(self._prompts) for number in range(start, start + count)]

    def _timed(self, index: int, prompts: Sequence[int]) -> float:
        """Run a candidate, keep its outputs and return its tokens per second."""
        timing = self._timings[index]
        num_tokens, seconds = 0, 0.0
        with_deferral = self._own_deferral(index)
        for batch in _batches(prompts, self._batch_size):
            requests = [self._request(index, number, self._params) for number in batch]
            outputs, count, taken = self._decode(requests)
            num_tokens, seconds = num_tokens + count, seconds + taken
            for number, output in zip(batch, outputs, strict=True):
                timing.outputs.setdefault(number, output)
        if with_deferral is not None:
            self._deferrals[index] = with_deferral
        if num_tokens == 0:
            raise DataError(
                f"{self._candidates[index].name}: all generations of a round end at their first"
                " token, so there is nothing to time. Use ignore_eos (--ignore-eos), or other"
                " prompts."
            )
        timing.speeds.append(num_tokens / seconds)
        return timing.speeds[-1]

    def _own_deferral(self, index: int) -> Deferral | None:
        """Let the engine defer rows by the exit rates of this candidate only."""
        engine = self._llm.engine
        if not isinstance(engine, Engine) or engine.deferral is None:
            return None
        if not self._deferrals:
            self._deferrals[-1] = copy.deepcopy(engine.deferral)
        engine.deferral = self._deferrals.get(index) or copy.deepcopy(self._deferrals[-1])
        return engine.deferral

    def _request(self, index: int, number: int, params: SamplingParams) -> Request:
        candidate = self._candidates[index]
        is_full = candidate.family in ("full", "self-speculative")
        return self._llm.make_request(
            self._prompts[number],
            params,
            exits=None if is_full else candidate.policy,
            strategy=candidate.strategy,
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
