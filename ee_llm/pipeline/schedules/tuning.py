"""EE-Tuning's schedule: the model runs forward, exits run backward where they are."""

from collections.abc import Collection
from dataclasses import replace

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Op, Plan, forward_only


def tuning_plan(num_stages: int, num_microbatches: int, exit_stages: Collection[int]) -> Plan:
    """Return the plan in which stages of exits follow each forward by the exits' own backward.

    The model is frozen, so that no gradient travels between stages (EE-Tuning, arXiv 2402.00518):
    a stage hands its output on before its exits are computed, keeps one microbatch at a time, and
    after the pipeline has filled nobody waits, up to unequal stages. A stage without exits only
    runs forward.

    Raises PlanError unless there is an exit, and every one is on a stage.
    """
    base = forward_only(num_stages, num_microbatches)
    if not exit_stages or not set(exit_stages) <= set(range(num_stages)):
        raise PlanError(
            f"exits on stages {sorted(exit_stages)}: expected at least one, on stages 0 to "
            f"{num_stages - 1}"
        )
    ranks = []
    for stage, forwards in enumerate(base.ranks):
        ops = (Op.FORWARD, Op.BACKWARD) if stage in exit_stages else (Op.FORWARD,)
        ranks.append(tuple(action._replace(op=op) for action in forwards for op in ops))
    return replace(base, ranks=tuple(ranks), local_backwards=tuple(sorted(set(exit_stages))))
