"""Sequences for a scheduler that runs without a model, and verdicts as a model would give them."""

from collections.abc import Collection

from ee_llm.inference.blocks import BlockManager
from ee_llm.inference.policy import make_policy
from ee_llm.inference.request import Draft, Request, Sequence, Strategy, Verdict
from ee_llm.inference.sampling import Sampling
from ee_llm.inference.scheduler import Limits, Plan, Scheduler

BOUNDARIES = (1, 2, 4)
GREEDY = Sampling()

# A plan in short: (segment, rows as (slot, start, stop)) of its parts, then the judged rows.
Rows = list[tuple[int, int, int]]


def make_scheduler(**limits: int) -> Scheduler:
    sizes = {"max_sequences": 4, "num_blocks": 33, "block_size": 4, "max_pending": 8}
    chosen = Limits(**(sizes | limits))
    return Scheduler(len(BOUNDARIES), chosen, BlockManager(chosen.num_blocks, chosen.block_size))


def make_sequence(
    id: str = "a",
    num_prompt: int = 3,
    thresholds: tuple[float | None, ...] = (0.5, 0.5),
    strategy: Strategy = "exact",
    draft: Draft | None = None,
    prompt: tuple[int, ...] = (),
    sampling: Sampling = GREEDY,
    **options: object,
) -> Sequence:
    request = Request(
        id,
        prompt or tuple(range(num_prompt)),
        make_policy(BOUNDARIES[:-1], thresholds),
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
    plan: Plan,
    leaving: Collection[int] | None = None,
    wrong: Collection[int] = (),
) -> list[Sequence]:
    """Apply a plan; return what is finished by it.

    leaving: slots whose judged rows leave at an exit (None: all). wrong: positions whose token is
    another one, drafted or not.
    """
    is_final = plan.last_segment == scheduler.num_segments - 1
    verdicts = []
    for span in plan.heads:
        for position in range(span.start, span.stop):
            leaves = is_final or leaving is None or span.slot in leaving
            token = token_at(position + 1) + (position + 1 in wrong)
            verdicts.append(
                Verdict(span.slot, position, leaves, token if leaves else -1, 0.6, -0.5)
            )
    finished = scheduler.apply(plan, verdicts)
    scheduler.check_integrity()
    return finished


def next_plan(scheduler: Scheduler) -> Plan:
    plan = scheduler.schedule()
    assert plan is not None, "there is nothing to do"
    scheduler.check_integrity()
    return plan


def parts(plan: Plan) -> list[tuple[int, Rows]]:
    return [(part.segment, _rows(part.spans)) for part in plan.parts]


def heads(plan: Plan) -> Rows:
    return _rows(plan.heads)


def finish(scheduler: Scheduler, leaving: Collection[int] | None = None) -> list[Plan]:
    """Run until nothing is left to do; return the plans."""
    plans: list[Plan] = []
    while scheduler.has_work:
        plans.append(next_plan(scheduler))
        answer(scheduler, plans[-1], leaving)
        assert len(plans) < 1000, "the scheduler does not come to an end"
    return plans


def _rows(spans) -> Rows:
    return [(span.slot, span.start, span.stop) for span in spans]
