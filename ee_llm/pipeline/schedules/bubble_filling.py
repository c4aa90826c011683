"""1F1B whose bubbles do more: further microbatches that visit part of the stages (EE-LLM, C.2).

Indices: stages and ranks 0 .. P-1; filling microbatches of one part i = 1 .. K.
"""

import math
from collections.abc import Collection, Sequence

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Action, Op, Plan, Visit, one_f_one_b


def most_fills(num_stages: int, forward_over_backward: float) -> int:
    """Return how many filling microbatches fit into one part's bubble: K of EE-LLM, C.2.

    floor((P-1) / (f/b + 1)), f/b being a stage's forward time over its backward time.
    """
    _check_ratio(forward_over_backward)
    return math.floor((num_stages - 1) / (forward_over_backward + 1) + 1e-9)


def warmup_visits(
    num_stages: int, num_fills: int, forward_over_backward: float, exit_stages: Collection[int]
) -> tuple[Visit, ...]:
    """Return what the microbatches see that fill the wait for the first gradient.

    The i-th runs forward on the first K+1-i stages, not beyond the last stage of `exit_stages`
    (those that have a loss of an early exit), and backward on all of them.

    Raises PlanError for more fills than are useful: than fit, or than meet an exit.
    """
    limit = most_fills(num_stages, forward_over_backward)
    useful = most_useful_warmup_fills(num_stages, forward_over_backward, exit_stages)
    why = ""
    if useful < limit:
        first = f"the first lies on stage {min(exit_stages)}" if exit_stages else "there is none"
        why = f", on the first {limit} or fewer, and each has to meet an early exit: {first}"
    _check_fills(num_fills, useful, num_stages, forward_over_backward, why)
    return tuple(
        Visit(max(stage for stage in exit_stages if stage <= limit - number) + 1, 0)
        for number in range(1, num_fills + 1)
    )


def most_useful_warmup_fills(
    num_stages: int, forward_over_backward: float, exit_stages: Collection[int]
) -> int:
    """Return how many microbatches fit into the warm-up's bubble and meet an early exit there."""
    if not exit_stages:
        return 0
    return max(0, most_fills(num_stages, forward_over_backward) - min(exit_stages))


def cooldown_visits(
    num_stages: int, num_fills: int, forward_over_backward: float
) -> tuple[Visit, ...]:
    """Return what the microbatches see that fill the drain of the pipeline.

    The i-th runs forward on all stages and backward on the last floor(P - i (f/b + 1)).
    """
    limit = most_fills(num_stages, forward_over_backward)
    _check_fills(num_fills, limit, num_stages, forward_over_backward)
    step = forward_over_backward + 1
    return tuple(
        Visit(num_stages, num_stages - math.floor(num_stages - number * step + 1e-9))
        for number in range(1, num_fills + 1)
    )


def filled_1f1b(
    num_stages: int, num_microbatches: int, warmup: Sequence[Visit], cooldown: Sequence[Visit]
) -> Plan:
    """Return 1F1B with further microbatches in its bubbles, the warm-up's first.

    Microbatches 0 .. M-1 are those of 1F1B; then come those of `warmup`, then those of
    `cooldown`. Those of the warm-up run before the first backward of each stage, those of the
    cool-down behind the last microbatch. The first stage holds the activations of as many more
    microbatches as fill the warm-up.
    """
    # The cool-down's microbatches are 1F1B's next ones, which do not go back all the way.
    base = one_f_one_b(num_stages, num_microbatches + len(cooldown))
    first_warmup, first_cooldown = num_microbatches, num_microbatches + len(warmup)
    visits = (*base.visits[:num_microbatches], *warmup, *cooldown)
    ranks = []
    for stage, actions in enumerate(base.ranks):
        ours = [
            a
            if a.microbatch < num_microbatches
            else a._replace(microbatch=a.microbatch + len(warmup))
            for a in actions
        ]
        ours = [
            a for a in ours if a.op is Op.FORWARD or stage >= visits[a.microbatch].first_backward
        ]
        here = [m for m in range(first_warmup, first_cooldown) if stage < visits[m].depth]
        fill = [Action(stage, Op.FORWARD, m) for m in here]
        # The last one turns back first: it went least deep.
        fill += [Action(stage, Op.BACKWARD, m) for m in reversed(here)]
        wait = next((at for at, a in enumerate(ours) if a.op is Op.BACKWARD), len(ours))
        ranks.append((*ours[:wait], *fill, *ours[wait:]))
    return Plan(tuple(ranks), base.stage_ranks, visits)


def _check_ratio(forward_over_backward: float) -> None:
    if not 0 < forward_over_backward < math.inf:
        raise PlanError(
            f"forward time over backward time is {forward_over_backward}: expected a number above 0"
        )


def _check_fills(
    fills: int, useful: int, num_stages: int, forward_over_backward: float, why: str = ""
) -> None:
    if not 0 <= fills <= useful:
        raise PlanError(
            f"the largest useful number is {useful}, not {fills}: the bubble of {num_stages} "
            f"stages at forward / backward = {forward_over_backward:g} has room for "
            f"{most_fills(num_stages, forward_over_backward)}{why}"
        )
