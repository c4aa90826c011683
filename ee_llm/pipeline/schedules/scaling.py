"""Factors that keep gradients unbiased with filled bubbles (docs/explanation/pipeline.md)."""

from dataclasses import dataclass

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Plan, Visit


@dataclass(frozen=True)
class Scaling:
    """Factors of losses and gradients, all 1 without filled bubbles.

    The unscaled loss is the mean over all microbatches of the plan.

    Attributes:
        losses: `losses[stage][microbatch]` multiplies the loss of the exits of the stage.
        gradients: `gradients[stage]` multiplies the complete gradient of the stage's parameters,
            before the copies of a tied weight are summed.
    """

    losses: tuple[tuple[float, ...], ...]
    gradients: tuple[float, ...]


def unbiased_scaling(plan: Plan) -> Scaling:
    """Return the factors with which every stage's expected gradient is the unscaled one.

    Of N microbatches from the same distribution, M are ordinary. The loss of stage l has the factor
    N / (M + W_l) for microbatches that run backward to the first stage, where W_l is the number of
    filling ones among them that visit l, and N / M for those whose backward ends earlier. The
    gradient of stage j has the factor M / (M + C_j), where C_j is the number of microbatches whose
    backward ends early but includes j. With one bubble filled these are the factors of EE-LLM,
    C.2; both together are derived in docs/explanation/pipeline.md.
    """
    num_all, num_full = len(plan.visits), plan.visits.count(plan.full_visit)
    if num_full == 0:
        raise PlanError("no microbatch of the plan visits all stages forward and backward")

    def loss_factor(stage: int, visit: Visit) -> float:
        if visit.first_backward > 0:
            return num_all / num_full
        return num_all / sum(v.first_backward == 0 and stage < v.depth for v in plan.visits)

    stages = range(plan.num_stages)
    return Scaling(
        losses=tuple(tuple(loss_factor(stage, v) for v in plan.visits) for stage in stages),
        gradients=tuple(
            num_full / (num_full + sum(0 < v.first_backward <= stage for v in plan.visits))
            for stage in stages
        ),
    )
