"""Factors that keep gradients with filled bubbles unbiased (docs/explanation/pipeline.md)."""

from dataclasses import dataclass

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Plan, Visit


@dataclass(frozen=True)
class Scaling:
    """By what losses and gradients are multiplied; all 1 where nothing fills bubbles.

    The plain loss is the mean over all microbatches of the plan. `losses[stage][microbatch]`
    multiplies the loss of the exits there, `gradients[stage]` the finished gradient of the stage's
    parameters, before the copies of a tied weight are added up.
    """

    losses: tuple[tuple[float, ...], ...]
    gradients: tuple[float, ...]


def unbiased_scaling(plan: Plan) -> Scaling:
    """Return the factors with which every stage's expected gradient is the plain one.

    Of N microbatches that are drawn alike, M are ordinary. Stage l's loss counts N / (M + W_l) for
    those that go back to the first stage, W_l being the filling ones among them that see l, and
    N / M for those that turn back early. Stage j's gradient counts M / (M + C_j), C_j being those
    that turn back early, but not before j. With one part filled these are the factors of EE-LLM,
    C.2; both together are derived in docs/explanation/pipeline.md.
    """
    num_all, num_whole = len(plan.visits), plan.visits.count(plan.whole_visit)
    if num_whole == 0:
        raise PlanError("no microbatch of the plan sees all stages forward and backward")

    def loss_factor(stage: int, visit: Visit) -> float:
        if visit.first_backward > 0:
            return num_all / num_whole
        return num_all / sum(v.first_backward == 0 and stage < v.depth for v in plan.visits)

    stages = range(plan.num_stages)
    return Scaling(
        losses=tuple(tuple(loss_factor(stage, v) for v in plan.visits) for stage in stages),
        gradients=tuple(
            num_whole / (num_whole + sum(0 < v.first_backward <= stage for v in plan.visits))
            for stage in stages
        ),
    )
