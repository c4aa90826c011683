"""What a configuration's pipeline plan is predicted to do: its plan, its times, its memory."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from ee_llm.config import Config, stage_layers
from ee_llm.pipeline.chosen import chosen_plan
from ee_llm.pipeline.costs import Pieces
from ee_llm.pipeline.lower import lower
from ee_llm.pipeline.plan import Action, Op, Plan, Visit
from ee_llm.pipeline.simulate import Costs, Simulation, Span, exits_begin_in, simulate


@dataclass(frozen=True)
class Prediction:
    """A plan and its simulation; times are in the unit of the pieces' costs."""

    config: Config
    num_microbatches: int
    """Ordinary ones; those that fill bubbles come on top."""
    pieces: Pieces
    plan: Plan
    costs: Costs
    simulation: Simulation
    exit_time: float
    """What early exits add to the makespan of the same plan."""

    @property
    def time_per_microbatch(self) -> float:
        """Return the makespan over the number of ordinary microbatches."""
        return self.simulation.makespan / self.num_microbatches

    @cached_property
    def bubble_share(self) -> float:
        """The part of all ranks' time that is idle."""
        shares = self.simulation.bubble_share
        return math.fsum(shares) / len(shares)

    @cached_property
    def filling(self) -> frozenset[int]:
        """The microbatches that fill bubbles."""
        return filling_microbatches(self.plan)

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages on a rank."""
        return [stage for stage, owner in enumerate(self.plan.stage_ranks) if owner == rank]

    def computes_exits(self, action: Action) -> bool:
        """Return whether the exits of the action's stage start within it."""
        has_exits = bool(self.costs.stages[action.stage].exits)
        return has_exits and exits_begin_in(self.plan, action, self.config.exits.deferred)

    def exit_part(self, span: Span) -> tuple[float, float] | None:
        """Return when within `span` the exits are computed, the final one among them, if at all."""
        exits = self.costs.stages[span.action.stage].exits
        forward = math.fsum(cost.forward for cost in exits)
        backward = math.fsum(cost.backward for cost in exits)
        if span.action.op is Op.BACKWARD:
            length = forward + backward if self.config.exits.deferred else backward
            return (span.start, span.start + length) if length else None
        if self.computes_exits(span.action) and forward:
            return span.end - forward, span.end
        return None


def predict(config: Config, num_microbatches: int, pieces: Pieces) -> Prediction:
    """Return what a step of `config` does with pieces of these costs; its plan is proved sound."""
    plan = chosen_plan(config, num_microbatches)
    lower(plan)
    costs = pieces.costs(config)
    deferred = config.exits.deferred
    found = simulate(plan, costs, deferred=deferred)
    bare = simulate(plan, _without_early_exits(costs), deferred=deferred)
    exit_time = found.makespan - bare.makespan
    return Prediction(config, num_microbatches, pieces, plan, costs, found, exit_time)


def rank_memory(prediction: Prediction, logits: float = 1.0) -> tuple[float, ...]:
    """Return each rank's peak memory, in activations of one layer for one microbatch.

    `logits` is what one exit's logits take in that unit. A rank's stages are counted together, at
    the worst moment.
    """
    plan, costs = prediction.plan, prediction.costs
    layers = [len(stage_layers(prediction.config, stage)) for stage in range(plan.num_stages)]
    last = Op.WEIGHT if plan.splits_backward else Op.BACKWARD
    peaks = []
    for spans in prediction.simulation.timeline.ranks:
        live = held = peak = 0.0
        for span in spans:
            action, trains = span.action, plan.has_backward(span.action)
            deferred = prediction.config.exits.deferred
            keeps = 0 if deferred or not trains else len(costs.stages[action.stage].exits)
            if action.op is Op.FORWARD:
                live += layers[action.stage]
                held += keeps
            at_once = 1 if prediction.computes_exits(action) and not keeps else 0
            peak = max(peak, live + logits * (held + at_once))
            if action.op is last or not trains:
                live -= layers[action.stage]
            if action.op is Op.BACKWARD:
                held -= keeps
        peaks.append(peak)
    return tuple(peaks)


def filling_microbatches(plan: Plan) -> frozenset[int]:
    """Return the microbatches that see less of the model than others do, forward and back."""
    full = Visit(depth=plan.num_stages, first_backward=0)
    if full not in plan.visits:
        return frozenset()
    return frozenset(m for m, visit in enumerate(plan.visits) if visit != full)


def _without_early_exits(costs: Costs) -> Costs:
    *rest, last = costs.stages
    bare = [replace(stage, exits=()) for stage in rest]
    return replace(costs, stages=(*bare, replace(last, exits=last.exits[-1:])))
