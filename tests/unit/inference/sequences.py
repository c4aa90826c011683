"""Create sequences and exit results for a scheduler without a model."""

from collections.abc import Collection
from dataclasses import fields, replace

from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.request import ExitResult, Request
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.output import SchedulerOutput
from ee_llm.inference.scheduling.scheduler import Scheduler
from ee_llm.inference.sequence import Sequence
from ee_llm.inference.strategies import SelfSpeculation, Strategy

BOUNDARIES = (1, 2, 4)
GREEDY = SamplingParams()
PARAM_NAMES = {field.name for field in fields(SamplingParams)}

# Rows as (slot, start, stop).
Rows = list[tuple[int, int, int]]


def make_scheduler(**scheduler_config: int) -> Scheduler:
    sizes = {"max_num_seqs": 4, "num_blocks": 33, "block_size": 4, "max_pending": 8}
    config = SchedulerConfig(**(sizes | scheduler_config))
    return Scheduler(len(BOUNDARIES), config)


def make_sequence(
    id: str = "a",
    num_prompt: int = 3,
    thresholds: tuple[float | None, ...] = (0.5, 0.5),
    strategy: Strategy = "exact",
    draft: SelfSpeculation | None = None,
    prompt: tuple[int, ...] = (),
    sampling: SamplingParams = GREEDY,
    **options: object,
) -> Sequence:
    params = {"max_tokens": 8} | {name: options.pop(name) for name in PARAM_NAMES & {*options}}
    request = Request(
        id,
        prompt or tuple(range(num_prompt)),
        make_exit_policy(BOUNDARIES[:-1], thresholds),
        replace(sampling, **params),
        strategy,
        draft,
        **options,
    )
    return Sequence(request, BOUNDARIES, max_length=64, vocab_size=200)


def token_at(position: int) -> int:
    """Return the token that every exit samples for `position` unless it is in `wrong`."""
    return 100 + position


def apply_results(
    scheduler: Scheduler,
    scheduler_output: SchedulerOutput,
    exiting: Collection[int] | None = None,
    wrong: Collection[int] = (),
) -> list[Sequence]:
    """Apply the results of a pass and return the sequences that it finished.

    Args:
        scheduler: The scheduler.
        scheduler_output: The pass.
        exiting: Slots whose evaluated rows exit; None for all. The final exit always exits.
        wrong: Positions that get another token than `token_at`, drafted or not.
    """
    is_final = scheduler_output.last_segment == scheduler.num_segments - 1
    results = []
    for token_range in scheduler_output.logit_rows:
        for position in range(token_range.start, token_range.stop):
            exited = is_final or exiting is None or token_range.slot in exiting
            token = token_at(position + 1) + (position + 1 in wrong)
            results.append(
                ExitResult(token_range.slot, position, exited, token if exited else -1, 0.6, -0.5)
            )
    finished = scheduler.apply(scheduler_output, results)
    scheduler.check_integrity()
    return finished


def next_pass(scheduler: Scheduler) -> SchedulerOutput:
    scheduler_output = scheduler.schedule()
    assert scheduler_output is not None, "there is nothing to do"
    scheduler.check_integrity()
    return scheduler_output


def steps(scheduler_output: SchedulerOutput) -> list[tuple[int, Rows]]:
    return [(step.segment, _rows(step.ranges)) for step in scheduler_output.steps]


def logit_rows(scheduler_output: SchedulerOutput) -> Rows:
    return _rows(scheduler_output.logit_rows)


def finish(scheduler: Scheduler, exiting: Collection[int] | None = None) -> list[SchedulerOutput]:
    """Run until there is no more work, and return the passes."""
    scheduler_outputs: list[SchedulerOutput] = []
    while scheduler.has_work:
        scheduler_outputs.append(next_pass(scheduler))
        apply_results(scheduler, scheduler_outputs[-1], exiting)
        assert len(scheduler_outputs) < 1000, "the scheduler does not finish"
    return scheduler_outputs


def _rows(ranges) -> Rows:
    return [(token_range.slot, token_range.start, token_range.stop) for token_range in ranges]
