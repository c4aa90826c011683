"""Sequences for a scheduler that runs without a model, and verdicts as a model would give them."""

from collections.abc import Collection

from ee_llm.inference.exits.policy import make_exit_policy
from ee_llm.inference.request import ExitResult, Request, Sequence
from ee_llm.inference.sampling.sampler import SamplingParams
from ee_llm.inference.scheduling.block_manager import BlockManager
from ee_llm.inference.scheduling.scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from ee_llm.inference.strategies import SelfSpeculation, Strategy

BOUNDARIES = (1, 2, 4)
GREEDY = SamplingParams()

# A plan in short: (segment, rows as (slot, start, stop)) of its parts, then the judged rows.
Rows = list[tuple[int, int, int]]


def make_scheduler(**scheduler_config: int) -> Scheduler:
    sizes = {"max_num_seqs": 4, "num_blocks": 33, "block_size": 4, "max_pending": 8}
    chosen = SchedulerConfig(**(sizes | scheduler_config))
    return Scheduler(len(BOUNDARIES), chosen, BlockManager(chosen.num_blocks, chosen.block_size))


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
    request = Request(
        id,
        prompt or tuple(range(num_prompt)),
        make_exit_policy(BOUNDARIES[:-1], thresholds),
        sampling,
        strategy,
        draft,
        **({"max_new_tokens": 8} | options),
    )
    return Sequence(request, BOUNDARIES, max_length=64)


def token_at(position: int) -> int:
    """Return the token that every exit draws for `position`, if it is right."""
    return 100 + position


def answer(
    scheduler: Scheduler,
    scheduler_output: SchedulerOutput,
    leaving: Collection[int] | None = None,
    wrong: Collection[int] = (),
) -> list[Sequence]:
    """Apply a plan; return what is finished by it.

    leaving: slots whose judged rows leave at an exit (None: all). wrong: positions whose token is
    another one, drafted or not.
    """
    is_final = scheduler_output.last_segment == scheduler.num_segments - 1
    results = []
    for token_range in scheduler_output.logit_rows:
        for position in range(token_range.start, token_range.stop):
            leaves = is_final or leaving is None or token_range.slot in leaving
            token = token_at(position + 1) + (position + 1 in wrong)
            results.append(
                ExitResult(token_range.slot, position, leaves, token if leaves else -1, 0.6, -0.5)
            )
    finished = scheduler.apply(scheduler_output, results)
    scheduler.check_integrity()
    return finished


def next_plan(scheduler: Scheduler) -> SchedulerOutput:
    scheduler_output = scheduler.schedule()
    assert scheduler_output is not None, "there is nothing to do"
    scheduler.check_integrity()
    return scheduler_output


def steps(scheduler_output: SchedulerOutput) -> list[tuple[int, Rows]]:
    return [(step.segment, _rows(step.ranges)) for step in scheduler_output.steps]


def heads(scheduler_output: SchedulerOutput) -> Rows:
    return _rows(scheduler_output.logit_rows)


def finish(scheduler: Scheduler, leaving: Collection[int] | None = None) -> list[SchedulerOutput]:
    """Run until nothing is left to do; return the plans."""
    scheduler_outputs: list[SchedulerOutput] = []
    while scheduler.has_work:
        scheduler_outputs.append(next_plan(scheduler))
        answer(scheduler, scheduler_outputs[-1], leaving)
        assert len(scheduler_outputs) < 1000, "the scheduler does not come to an end"
    return scheduler_outputs


def _rows(ranges) -> Rows:
    return [(token_range.slot, token_range.start, token_range.stop) for token_range in ranges]
