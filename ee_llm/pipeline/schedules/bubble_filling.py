"""1F1B with further microbatches in its bubbles that visit a part of the stages (EE-LLM, C.2).

Indices: stages and ranks 0 .. P-1; microbatches i = 1 .. K that fill warm-up or cool-down.
"""

import math
from collections.abc import Collection, Sequence

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Action, Op, Plan, Visit, one_f_one_b


def max_fills(num_stages: int, forward_over_backward: float) -> int:
    """Return the number K of microbatches that fit into the bubble of the warm-up or the cool-down.

    K = floor((P-1) / (f/b + 1)), where f/b is a stage's forward time over its backward time
    (EE-LLM, C.2).
    """
    _check_ratio(forward_over_backward)
    return math.floor((num_stages - 1) / (forward_over_backward + 1) + 1e-9)


def warmup_visits(
    num_stages: int, num_fills: int, forward_over_backward: float, exit_stages: Collection[int]
) -> tuple[Visit, ...]:
    """Return the visits of the microbatches that fill the wait for the first gradient.

    The i-th visits the first K+1-i stages forward and backward, but none beyond the last stage with
    an early exit.

    Args:
        num_stages: Number of stages P.
        num_fills: Number of filling microbatches.
        forward_over_backward: A stage's forward time over its backward time.
        exit_stages: The stages that have the loss of an early exit.

    Raises:
        PlanError: `num_fills` exceeds the number that fits or that reaches an exit.
    """
    limit = max_fills(num_stages, forward_over_backward)
    useful = max_useful_warmup_fills(num_stages, forward_over_backward, exit_stages)
    reason = ""
    if useful < limit:
        first = f"the first is on stage {min(exit_stages)}" if exit_stages else "there is none"
        reason = (
            f" on the first {limit} or fewer stages, and each must reach an early exit: {first}"
        )
    _check_fills(num_fills, useful, num_stages, forward_over_backward, reason)
    return tuple(
        Visit(max(stage for stage in exit_stages if stage <= limit - number) + 1, 0)
        for number in range(1, num_fills + 1)
    )


def max_useful_warmup_fills(
    num_stages: int, forward_over_backward: float, exit_stages: Collection[int]
) -> int:
    """Return the number of microbatches that fit into the warm-up's bubble and reach an exit."""
    if not exit_stages:
        return 0
    return max(0, max_fills(num_stages, forward_over_backward) - min(exit_stages))


def cooldown_visits(
    num_stages: int, num_fills: int, forward_over_backward: float
) -> tuple[Visit, ...]:
    """Return the visits of the microbatches that fill the drain of the pipeline.

    The i-th runs forward on all stages and backward on the last floor(P - i (f/b + 1)) stages.
    """
    limit = max_fills(num_stages, forward_over_backward)
    _check_fills(num_fills, limit, num_stages, forward_over_backward)
    step = forward_over_backward + 1
    return tuple(
        Visit(num_stages, num_stages - math.floor(num_stages - number * step + 1e-9))
        for number in range(1, num_fills + 1)
    )


def filled_1f1b(
    num_stages: int, num_microbatches: int, warmup: Sequence[Visit], cooldown: Sequence[Visit]
) -> Plan:
    """Return 1F1B with further microbatches in its bubbles.

    Microbatches 0 .. M-1 are those of 1F1B, followed by those of `warmup` and those of `cooldown`.
    The warm-up's run before the first backward of each stage, the cool-down's after the last
    ordinary microbatch. The first stage keeps the activations of `len(warmup)` more microbatches
    than with plain 1F1B.
    """
    # The cool-down's microbatches continue 1F1B but do not run backward on all stages.
    base = one_f_one_b(num_stages, num_microbatches + len(cooldown))
    first_warmup, first_cooldown = num_microbatches, num_microbatches + len(warmup)
    visits = (*base.visits[:num_microbatches], *warmup, *cooldown)
    ranks = []
    for stage, actions in enumerate(base.ranks):
        ordered = [
            a
            if a.microbatch < num_microbatches
            else a._replace(microbatch=a.microbatch + len(warmup))
            for a in actions
        ]
        ordered = [
            a for a in ordered if a.op is Op.FORWARD or stage >= visits[a.microbatch].first_backward
        ]
        here = [m for m in range(first_warmup, first_cooldown) if stage < visits[m].depth]
        fill = [Action(stage, Op.FORWARD, m) for m in here]
        # The last one runs backward first: it visits the fewest stages.
        fill += [Action(stage, Op.BACKWARD, m) for m in reversed(here)]
        first_backward = next(
            (at for at, a in enumerate(ordered) if a.op is Op.BACKWARD), len(ordered)
        )
        ranks.append((*ordered[:first_backward], *fill, *ordered[first_backward:]))
    return Plan(tuple(ranks), base.stage_ranks, visits)


def _check_ratio(forward_over_backward: float) -> None:
    if not 0 < forward_over_backward < math.inf:
        raise PlanError(
            f"forward_over_backward = {forward_over_backward} is not valid. Give a finite number "
            "above 0."
        )


def _check_fills(
    fills: int, useful: int, num_stages: int, forward_over_backward: float, reason: str = ""
) -> None:
    if not 0 <= fills <= useful:
        raise PlanError(
            f"the largest useful number is {useful}, not {fills}: the bubble of {num_stages} "
            f"stages at forward / backward = {forward_over_backward:g} fits "
            f"{max_fills(num_stages, forward_over_backward)}{reason}"
        )
