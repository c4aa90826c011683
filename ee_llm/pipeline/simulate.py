"""Timing and memory of a plan for given costs, worked out without running it. Pure Python."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ee_llm.pipeline.plan import Action, Op, Plan, PlanError, step_grid


class ExitCost(NamedTuple):
    """Seconds that one exit takes for one microbatch, its projection and loss included."""

    forward: float
    backward: float


@dataclass(frozen=True)
class StageCost:
    """Seconds that one stage takes for one microbatch.

    forward and backward are those of the layers, on the first stage with the embedding; exits are
    the heads that live there, in order. The final head is the last stage's last exit. weight is the
    part of backward that makes the weights' gradients, which some plans do apart (W).
    """

    forward: float
    backward: float
    exits: tuple[ExitCost, ...] = ()
    weight: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Costs of each stage, and the seconds a message travels between two ranks."""

    stages: tuple[StageCost, ...]
    communication: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for a negative or infinite cost, or a part above its whole."""
        for index, stage in enumerate(self.stages):
            exits = (x for cost in stage.exits for x in cost)
            for value in (stage.forward, stage.backward, stage.weight, *exits):
                _check_cost(f"a cost of stage {index}", value)
            if stage.weight > stage.backward:
                raise ValueError(
                    f"stage {index}: weight {stage.weight} is a part of backward {stage.backward} "
                    "and cannot be above it"
                )
        _check_cost("communication", self.communication)


class Duration(NamedTuple):
    """How long an action takes: `early` of it can be done before its neighbour's result is there.

    A deferred exit is early work: it needs its own stage's hidden state and not the gradient that
    comes from the next stage, so it runs while the rank would otherwise wait for that gradient.
    """

    early: float
    late: float


class Span(NamedTuple):
    """One action on its rank's clock; `end` excludes the journey of its result."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Per rank, its F, B and W actions in order with their times."""

    ranks: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """Return the time from the first action's start (0) to the last one's end."""
        return max((spans[-1].end for spans in self.ranks if spans), default=0.0)


@dataclass(frozen=True)
class Simulation:
    """What a plan would cost.

    makespan in the costs' unit; bubble_share per rank, the part of the makespan it is idle;
    peak_activations per stage, in microbatches whose forward has begun and whose backward, the
    weights' part included, has not ended; peak_exit_logits per stage, in logits of one exit for one
    microbatch ([s, b, v]).
    """

    makespan: float
    bubble_share: tuple[float, ...]
    peak_activations: tuple[int, ...]
    peak_exit_logits: tuple[int, ...]
    timeline: Timeline


def nominal(plan: Plan) -> Callable[[Action], Duration]:
    """Return the usual proportions: a forward takes 1, a backward 2 (or 1 and its W 1)."""
    backward = 1.0 if plan.splits_backward else 2.0
    return lambda action: Duration(0.0, backward if action.op is Op.BACKWARD else 1.0)


def timeline(
    plan: Plan,
    duration: Callable[[Action], Duration] | None = None,
    communication: float = 0.0,
) -> Timeline:
    """Return when each F, B and W runs if every rank starts its next action as soon as it can.

    duration is `nominal(plan)` unless given. Messages do not occupy their sender. Raises PlanError,
    with the places marked in the grid, if the ranks come to wait for each other for ever.
    """
    duration = duration or nominal(plan)
    queues = plan.without_communication().ranks
    position = [0] * len(queues)
    ranks: list[list[Span]] = [[] for _ in queues]
    ended: dict[Action, float] = {}

    def arrival(need: Action, action: Action) -> float:
        return ended[need] + (communication if plan.crosses_ranks(need, action) else 0.0)

    moved = True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            while position[rank] < len(queue):
                action = queue[position[rank]]
                needs = plan.needs(action)
                if not all(need in ended for need in needs):
                    break
                early, late = duration(action)
                free = ranks[rank][-1].end if ranks[rank] else 0.0
                ready = max((arrival(need, action) for need in needs), default=0.0)
                # The early part may run ahead of what is awaited, but not of this rank's clock.
                start = max(free, ready - early)
                ended[action] = start + early + late
                ranks[rank].append(Span(action, start, ended[action]))
                position[rank] += 1
                moved = True
    stuck = [(rank, at) for rank, at in enumerate(position) if at < len(queues[rank])]
    if stuck:
        waits = "; ".join(
            f"rank {rank} at {queues[rank][at]} waits for "
            + ", ".join(str(n) for n in plan.needs(queues[rank][at]) if n not in ended)
            for rank, at in stuck
        )
        raise PlanError(f"the plan deadlocks: {waits}\n{step_grid(queues, stuck)}")
    return Timeline(tuple(tuple(spans) for spans in ranks))


def grid(source: Plan | Timeline, slot: float | None = None) -> str:
    """Return the rank x time grid, one column per `slot` of time.

    A plan is shown at nominal costs (backward = 2 forwards). The slot is the shortest action
    unless given; dashes show how long actions last, to a fraction of a column, dots idle time. An
    action shorter than the slot has its name whole, and may hide what comes before.
    """
    line = timeline(source) if isinstance(source, Plan) else source
    spans = [span for rank in line.ranks for span in rank]
    if slot is None:
        slot = min((s.end - s.start for s in spans if s.end > s.start), default=1.0)
    width = max((len(str(span.action)) for span in spans), default=0) + 1
    total = width * max(1, math.ceil(line.makespan / slot - 1e-9))
    rows = []
    for rank, actions in enumerate(line.ranks):
        row = list(".".ljust(width) * (total // width))
        for span in actions:
            text = str(span.action)
            begin = min(math.floor(width * span.start / slot + 0.5), total - width)
            end = max(math.floor(width * span.end / slot + 0.5) - 1, begin + len(text))
            row[begin:end] = text.ljust(end - begin, "-")
            row[end : end + 1] = " "
            if begin and row[begin - 1] == ".":
                row[begin - 1] = " "
        rows.append(f"rank {rank:>{len(str(len(line.ranks) - 1))}}  {''.join(row)}".rstrip())
    return "\n".join(rows)


def simulate(plan: Plan, costs: Costs, *, deferred: bool = True) -> Simulation:
    """Return time, bubbles and peak memory of a plan (lowered or not) for given costs.

    deferred: exits run inside their microbatch's backward, one at a time; otherwise inside its
    forward, their logits alive until its backward. Raises ValueError if costs and plan differ in
    their number of stages, PlanError if the plan deadlocks.
    """
    if len(costs.stages) != plan.num_stages:
        raise ValueError(f"costs of {len(costs.stages)} stages, but {plan.num_stages} in the plan")
    line = timeline(plan, lambda a: _duration(plan, costs, a, deferred), costs.communication)
    makespan = line.makespan
    idle = tuple(
        max(0.0, 1.0 - math.fsum(s.end - s.start for s in spans) / makespan) if makespan else 0.0
        for spans in line.ranks
    )
    activations, logits = _peaks(plan, costs, line, deferred)
    return Simulation(makespan, idle, activations, logits, line)


def exits_begin_in(plan: Plan, action: Action, deferred: bool) -> bool:
    """Return whether the exits of the action's stage, if it has any, are computed forward in it."""
    if plan.has_backward(action):
        return action.op is (Op.BACKWARD if deferred else Op.FORWARD)
    return action.op is Op.FORWARD and not plan.goes_back(action.microbatch)  # an evaluation


def _duration(plan: Plan, costs: Costs, action: Action, deferred: bool) -> Duration:
    stage = costs.stages[action.stage]
    exits_forward = math.fsum(cost.forward for cost in stage.exits)
    exits_backward = math.fsum(cost.backward for cost in stage.exits)
    if action.op is Op.FORWARD:
        here = exits_begin_in(plan, action, deferred)
        return Duration(0.0, stage.forward + (exits_forward if here else 0.0))
    if action.op is Op.WEIGHT:
        return Duration(0.0, stage.weight)
    layers = stage.backward - (stage.weight if plan.splits_backward else 0.0)
    if deferred:
        return Duration(exits_forward + exits_backward, layers)
    return Duration(0.0, layers + exits_backward)


def _peaks(
    plan: Plan, costs: Costs, line: Timeline, deferred: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # A stage lives on one rank, so the order of that rank's actions is all that matters.
    live = [0] * plan.num_stages
    held = [0] * plan.num_stages
    activations, logits = list(live), list(held)
    for action in (span.action for spans in line.ranks for span in spans):
        stage, trains = action.stage, plan.has_backward(action)
        exits = len(costs.stages[stage].exits)
        keeps = exits if trains and not deferred else 0
        if action.op is Op.FORWARD:
            live[stage] += 1
            held[stage] += keeps
            activations[stage] = max(activations[stage], live[stage])
        one_at_a_time = exits > 0 and keeps == 0 and exits_begin_in(plan, action, deferred)
        logits[stage] = max(logits[stage], held[stage] + one_at_a_time)
        last = Op.WEIGHT if plan.splits_backward else Op.BACKWARD
        if action.op is last or not trains:
            live[stage] -= 1
        if action.op is Op.BACKWARD:
            held[stage] -= keeps
    return tuple(activations), tuple(logits)


def _check_cost(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} is {value}: expected seconds, finite and not negative")
