"""Zero-bubble 1F1B: the weights' part of a backward pass fills the time of waiting."""

from ee_llm.pipeline.plan import Action, Op, Plan, one_f_one_b


def zero_bubble_h1(num_stages: int, num_microbatches: int, split_exits: bool = False) -> Plan:
    """Return ZB-H1 (Qi et al., arXiv 2401.10241, section 2.3).

    1F1B whose backward is split: B hands the gradient on as early as it can, W follows later, on
    rank r by r microbatches. So no rank keeps more microbatches alive than 1F1B's first rank does,
    P, and with f = b = w the bubble is (P-1)(f + b - w), a third of 1F1B's. `split_exits` leaves
    the gradients of exits' weights to W as well; of their logits' gradients rank r then keeps those
    of r + 1 microbatches.
    """
    base = one_f_one_b(num_stages, num_microbatches)
    ranks = tuple(_with_weights(actions, behind=rank) for rank, actions in enumerate(base.ranks))
    return Plan(ranks, base.stage_ranks, base.visits, True, split_exits)


def _with_weights(actions: tuple[Action, ...], behind: int) -> tuple[Action, ...]:
    result: list[Action] = []
    waiting: list[Action] = []
    for action in actions:
        result.append(action)
        if action.op is Op.BACKWARD:
            waiting.append(action._replace(op=Op.WEIGHT))
            if len(waiting) > behind:
                result.append(waiting.pop(0))
    return (*result, *waiting)
