"""The schedules of EE-Tuning: the model runs forward only, exits also run backward."""

from collections.abc import Collection
from dataclasses import replace

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Op, Plan, forward_only, one_f_one_b


def tuning_plan(num_stages: int, num_microbatches: int, exit_stages: Collection[int]) -> Plan:
    """Return the plan in which stages with exits run the exits' backward after each forward.

    The model is frozen, so that no gradient travels between stages (EE-Tuning, arXiv 2402.00518). A
    stage sends its output before it computes its exits and keeps one microbatch at a time. After
    the pipeline is full, no stage waits except for slower stages. A stage without exits only runs
    forward.

    Raises:
        PlanError: There is no exit, or an exit is on a stage that does not exist.
    """
    base = forward_only(num_stages, num_microbatches)
    if not exit_stages or not set(exit_stages) <= set(range(num_stages)):
        raise PlanError(
            f"exit_stages = {sorted(exit_stages)} is not valid. Give at least one stage from 0 to "
            f"{num_stages - 1}."
        )
    ranks = []
    for stage, forwards in enumerate(base.ranks):
        ops = (Op.FORWARD, Op.BACKWARD) if stage in exit_stages else (Op.FORWARD,)
        ranks.append(tuple(action._replace(op=op) for action in forwards for op in ops))
    return replace(base, ranks=tuple(ranks), local_backwards=tuple(sorted(set(exit_stages))))


def distillation_plan(num_stages: int, num_microbatches: int) -> Plan:
    """Return the plan in which the final exit's hidden state reaches the exits of all stages.

    It is 1F1B, whose backward messages carry that hidden state to the previous stage instead of a
    gradient: an exit cannot run before the last stage has run the same microbatch forward. A stage
    keeps the inputs of its exits, without an autograd graph, for at most P-i microbatches.
    """
    return replace(one_f_one_b(num_stages, num_microbatches), distills=True)
