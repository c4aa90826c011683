"""Zero-bubble 1F1B, which computes weight gradients while a rank would otherwise wait."""

from ee_llm.pipeline.plan import Action, Op, Plan, one_f_one_b


def zero_bubble_h1(num_stages: int, num_microbatches: int, split_exits: bool = False) -> Plan:
    """Return ZB-H1 (Qi et al., arXiv 2401.10241, section 2.3).

    This is 1F1B with a split backward: B sends the gradient of the input as early as possible, and
    W follows later, on rank r by r microbatches. No rank keeps more than P microbatches alive, the
    peak of 1F1B's first rank. With f = b = w the bubble is (P-1)(f + b - w), a third of 1F1B's.
    With `split_exits`, W also computes the gradients of the exits' weights. Rank r then keeps the
    gradients of the logits of r + 1 microbatches.
    """
    base = one_f_one_b(num_stages, num_microbatches)
    ranks = tuple(_with_weights(actions, delay=rank) for rank, actions in enumerate(base.ranks))
    return Plan(ranks, base.stage_ranks, base.visits, True, split_exits)


def _with_weights(actions: tuple[Action, ...], delay: int) -> tuple[Action, ...]:
    result: list[Action] = []
    waiting: list[Action] = []
    for action in actions:
        result.append(action)
        if action.op is Op.BACKWARD:
            waiting.append(action._replace(op=Op.WEIGHT))
            if len(waiting) > delay:
                result.append(waiting.pop(0))
    return (*result, *waiting)
