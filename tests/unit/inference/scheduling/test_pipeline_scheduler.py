"""The pipeline scheduler without a pipeline: tokens do not depend on the order of results.

A stage reports the results of its passes in order, but different stages are not synchronized.
"""

import random
from collections import deque

import pytest

from ee_llm.inference.request import ExitResult
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.pipeline_scheduler import (
    PipelineScheduler,
    PipelineSchedulerOutput,
    StageResult,
)
from ee_llm.inference.sequence import Sequence
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.inference.sequences import BOUNDARIES, make_sequence

LAST = len(BOUNDARIES) - 1


def _token(tokens: tuple[int, ...], segment: int) -> int:
    """Return the token that an exit draws; early exits often differ from the final one."""
    mixed = hash((tokens, 7))
    is_same = segment == LAST or hash((tokens, segment)) % 3
    return mixed % 97 if is_same else (mixed + 1) % 97


def _confidence(tokens: tuple[int, ...], segment: int) -> float:
    return 1.0 if segment == LAST else (hash((tokens, segment, 5)) % 100) / 100


def _expected(sequence: Sequence) -> list[int]:
    """Return the new tokens by definition, one row after another."""
    tokens = list(sequence.request.prompt_token_ids)
    policy = sequence.request.policy.under(sequence.request.strategy)
    for _ in range(sequence.request.sampling_params.max_tokens):
        seen = tuple(tokens)
        thresholds = [policy.threshold(b) for b in BOUNDARIES[:-1]]
        early = [s for s, t in enumerate(thresholds) if t is not None and _confidence(seen, s) >= t]
        tokens.append(_token(seen, min(early, default=LAST)))
    return tokens[sequence.num_prompt :]


class Stages:
    """Stages with one exit each, and a cache that stores the tokens of the rows."""

    def __init__(self) -> None:
        self.results: list[deque[tuple[int, list[StageResult]]]] = [deque() for _ in BOUNDARIES]
        self._cache: dict[int, int] = {}
        self._blocks: dict[tuple[int, int], int] = {}

    def _place(self, slot: int, position: int) -> int:
        return self._blocks[slot, position // 4] * 4 + position % 4

    def run(self, scheduler_output: PipelineSchedulerOutput) -> list[StageResult]:
        """Return the results of the first stage, and queue those of the others."""
        for slot, index, block in scheduler_output.new_blocks:
            self._blocks[slot, index] = block
        tokens = iter(scheduler_output.tokens)
        for token_range in scheduler_output.ranges:
            for position in range(token_range.start, token_range.stop):
                self._cache[self._place(token_range.slot, position)] = next(tokens)
        exited: set[int] = set()
        for segment, queue in enumerate(self.results):
            results = []
            for number, frontier in enumerate(scheduler_output.frontiers):
                threshold = frontier.thresholds[segment]
                places = [self._place(frontier.slot, p) for p in range(frontier.position + 1)]
                seen = tuple(self._cache[place] for place in places)
                if number in exited or threshold is None or _confidence(seen, segment) < threshold:
                    continue
                token = _token(seen, segment)
                result = ExitResult(frontier.slot, frontier.position, True, token, 1.0, 0.0)
                results.append(StageResult(number, segment, result))
                if segment == LAST or not frontier.is_draft:
                    exited.add(number)
            queue.append((scheduler_output.id, results))
        return self.results[0].popleft()[1]


@pytest.mark.parametrize("seed", range(60))
def test_tokens_do_not_depend_on_the_order_of_results(seed: int) -> None:
    rng = random.Random(seed)
    scheduler_config = SchedulerConfig(
        rng.randint(1, 4), 40, 4, max_pending=8, max_num_batched_tokens=rng.choice([3, 16])
    )
    scheduler = PipelineScheduler(scheduler_config, len(BOUNDARIES))
    sequences = []
    for number in range(rng.randint(1, 6)):
        strategy = rng.choice(["exact", "full", "self-speculative", "propagate"])
        draft = None
        if strategy == "self-speculative":
            draft = SelfSpeculation(
                rng.choice(BOUNDARIES[:-1]), rng.randint(1, 4), rng.choice([None, 0.5])
            )
        thresholds = tuple(rng.choice([None, 0.3, 0.7]) for _ in BOUNDARIES[:-1])
        sequence = make_sequence(
            str(number),
            rng.randint(1, 11),
            thresholds,
            strategy,
            draft,
            max_tokens=rng.randint(1, 12),
        )
        scheduler.add(sequence)
        sequences.append(sequence)
    stages, num_steps = Stages(), 0
    while scheduler.has_work:
        scheduler_output = scheduler.schedule() if rng.random() < 0.6 else None
        if scheduler_output is not None:
            scheduler.apply(scheduler_output.id, stages.run(scheduler_output))
        ready = [results for results in stages.results if results]
        if ready and (scheduler_output is None or rng.random() < 0.5):
            scheduler.apply(*rng.choice(ready).popleft())
        scheduler.check_integrity()
        for sequence in scheduler.running:
            assert len(sequence.tokens) <= sequence.max_rows + 1
        num_steps += 1
        assert num_steps < 5000, "the scheduler does not finish"
    for sequence in sequences:
        assert sequence.new_tokens == _expected(sequence)
    assert scheduler.blocks.num_available == 39


def test_a_draft_that_arrives_after_the_final_token_is_dropped() -> None:
    scheduler = PipelineScheduler(
        SchedulerConfig(2, 9, 4, max_pending=8, max_num_batched_tokens=8), 3
    )
    sequence = make_sequence(
        thresholds=(None, None),
        strategy="self-speculative",
        draft=SelfSpeculation(2, 3),
        max_tokens=4,
    )
    scheduler.add(sequence)
    scheduler_output = scheduler.schedule()
    (frontier,) = scheduler_output.frontiers
    result = ExitResult(frontier.slot, 2, True, 11, 0.9, -0.1)
    scheduler.apply(scheduler_output.id, [])
    scheduler.apply(scheduler_output.id, [StageResult(0, 2, result)])
    scheduler.apply(scheduler_output.id, [StageResult(0, 1, result)])
    assert sequence.tokens == [0, 1, 2, 11]
