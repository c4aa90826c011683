"""Predict the times and the memory of a configuration's pipeline plan."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from ee_llm.architecture.partition import stage_layers
from ee_llm.config import Config
from ee_llm.pipeline.lower import lower
from ee_llm.pipeline.plan import Op, Plan
from ee_llm.pipeline.planner.costs import Pieces
from ee_llm.pipeline.selection import select_plan
from ee_llm.pipeline.simulate import Costs, Simulation, Span, exit_duration, simulate, stage_memory


@dataclass(frozen=True)
class Prediction:
    """A plan and its simulation; times are in the unit of the pieces' costs."""

    config: Config
    num_microbatches: int
    """Number of ordinary microbatches, without those that fill bubbles."""
    pieces: Pieces
    plan: Plan
    costs: Costs
    simulation: Simulation
    exit_time: float
    """Time that early exits add to the makespan of the same plan."""

    @property
    def time_per_microbatch(self) -> float:
        """Return the makespan divided by the number of ordinary microbatches."""
        return self.simulation.makespan / self.num_microbatches

    @cached_property
    def bubble_share(self) -> float:
        """Return the idle share of the time of all ranks."""
        shares = self.simulation.bubble_share
        return math.fsum(shares) / len(shares)

    @cached_property
    def filling(self) -> frozenset[int]:
        """Return the microbatches that fill bubbles, which do not visit all stages."""
        full = self.plan.full_visit
        return frozenset(m for m, visit in enumerate(self.plan.visits) if visit != full)

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages of a rank."""
        return [stage for stage, owner in enumerate(self.plan.stage_ranks) if owner == rank]

    def exit_part(self, span: Span) -> tuple[float, float] | None:
        """Return when the exits run within `span`, including the final one, None if they do not."""
        length = exit_duration(self.plan, self.costs, span.action, self.config.exits.deferred)
        if not length:
            return None
        if span.action.op is Op.FORWARD:
            return span.end - length, span.end
        return span.start, span.start + length


def predict(config: Config, num_microbatches: int, pieces: Pieces) -> Prediction:
    """Predict a step of `config` with pieces of these costs, and prove its plan executable."""
    plan = select_plan(config, num_microbatches)
    lower(plan)
    costs = pieces.costs(config)
    deferred = config.exits.deferred
    simulation = simulate(plan, costs, deferred=deferred)
    bare = simulate(plan, _without_early_exits(costs), deferred=deferred)
    exit_time = simulation.makespan - bare.makespan
    return Prediction(config, num_microbatches, pieces, plan, costs, simulation, exit_time)


def rank_memory(prediction: Prediction, logits: float = 1.0) -> tuple[float, ...]:
    """Return each rank's peak memory, in activations of one layer for one microbatch.

    `logits` is the memory of one exit's logits in that unit. The peak is that of all stages of a
    rank together.
    """
    plan, config = prediction.plan, prediction.config
    layers = [len(stage_layers(config, stage)) for stage in range(plan.num_stages)]
    return tuple(
        max(
            sum(layers[stage] * now.microbatches + logits * now.logits for stage, now in at.items())
            for at in stage_memory(plan, prediction.costs, spans, config.exits.deferred)
        )
        for spans in prediction.simulation.timeline.ranks
    )


def _without_early_exits(costs: Costs) -> Costs:
    *rest, last = costs.stages
    bare = [replace(stage, exits=()) for stage in rest]
    return replace(costs, stages=(*bare, replace(last, exits=last.exits[-1:])))
