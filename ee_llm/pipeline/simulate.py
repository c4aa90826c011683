"""Timing and memory of a plan for given costs, worked out without running it. Pure Python."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Action, Op, Plan, step_grid


class PieceCost(NamedTuple):
    """Seconds that a layer, the embedding or an exit with its loss takes for one microbatch.

    weight is the part of backward that makes the weights' gradients, which some plans do apart (W).
    """

    forward: float
    backward: float
    weight: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StageCost:
    """Seconds that one stage takes for one microbatch.

    forward, backward and weight, which is a part of backward, are those of the layers, on the first
    stage with the embedding; exits are the heads that live there, in order. The final head is the
    last stage's last exit.
    """

    forward: float
    backward: float
    exits: tuple[PieceCost, ...] = ()
    weight: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Costs of each stage, and the seconds a message travels between two ranks."""

    stages: tuple[StageCost, ...]
    communication: float = 0.0

    def __post_init__(self) -> None:
        """Raise PlanError for a negative or infinite cost, or a part above its whole."""
        for index, stage in enumerate(self.stages):
            layers = PieceCost(stage.forward, stage.backward, stage.weight)
            for cost in (layers, *stage.exits):
                for value in cost:
                    _check_cost(f"a cost of stage {index}", value)
                if cost.weight > cost.backward:
                    raise PlanError(
                        f"stage {index}: weight {cost.weight} is a part of backward "
                        f"{cost.backward} and cannot be above it"
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
    """One action on its rank's clock; `end` excludes the journey of its result.

    `exits` is how long it began with exits, where that was measured.
    """

    action: Action
    start: float
    end: float
    exits: float = 0.0


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
    peak_activations and peak_exit_logits per stage, in microbatches and in logits of one exit for
    one microbatch ([s, b, v]), as `Kept` counts them.
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
    forward, their logits alive until its backward. Raises PlanError if costs and plan differ in
    their number of stages, PlanError if the plan deadlocks.
    """
    if len(costs.stages) != plan.num_stages:
        raise PlanError(f"costs of {len(costs.stages)} stages, but {plan.num_stages} in the plan")
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


def time_of_exits(plan: Plan, costs: Costs, action: Action, deferred: bool) -> float:
    """Return the part of an action's time that the exits of its stage take."""
    exits = costs.stages[action.stage].exits
    begins = exits_begin_in(plan, action, deferred)
    forward = math.fsum(cost.forward for cost in exits) if begins else 0.0
    weight = math.fsum(cost.weight for cost in exits) if plan.splits_exits else 0.0
    match action.op:
        case Op.BACKWARD:
            return forward + math.fsum(cost.backward for cost in exits) - weight
        case Op.WEIGHT:
            return weight
    return forward


class Kept(NamedTuple):
    """What a stage keeps in memory while its rank is at an action.

    microbatches: those whose forward has begun and whose backward, the weights' part included, has
    not ended. logits: those of exits, or their gradient, that are computed or still needed.
    """

    microbatches: int
    logits: int


def kept(
    plan: Plan, costs: Costs, spans: Sequence[Span], deferred: bool
) -> Iterator[dict[int, Kept]]:
    """Yield, for one rank's actions in turn, what each of its stages keeps meanwhile."""
    stages = {span.action.stage: Kept(0, 0) for span in spans}
    last = Op.WEIGHT if plan.splits_backward else Op.BACKWARD
    exits_end = Op.WEIGHT if plan.splits_exits else Op.BACKWARD
    for action in (span.action for span in spans):
        trains = plan.has_backward(action)
        begin = exits_begin_in(plan, action, deferred)
        end = action.op is exits_end if trains else begin
        exits = len(costs.stages[action.stage].exits)
        if begin and end:
            exits = min(1, exits)  # one after the other
        live, logits = stages[action.stage]
        live, logits = live + (action.op is Op.FORWARD), logits + exits * begin
        stages[action.stage] = Kept(live, logits)
        yield dict(stages)
        live -= action.op is last or not trains
        stages[action.stage] = Kept(live, logits - exits * end)


def _duration(plan: Plan, costs: Costs, action: Action, deferred: bool) -> Duration:
    stage = costs.stages[action.stage]
    exits = time_of_exits(plan, costs, action, deferred)
    match action.op:
        case Op.FORWARD:
            return Duration(0.0, stage.forward + exits)
        case Op.WEIGHT:
            return Duration(0.0, stage.weight + exits)
    layers = stage.backward - (stage.weight if plan.splits_backward else 0.0)
    return Duration(exits, layers) if deferred else Duration(0.0, exits + layers)


def _peaks(
    plan: Plan, costs: Costs, line: Timeline, deferred: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    peaks = [Kept(0, 0)] * plan.num_stages
    for spans in line.ranks:
        for moment in kept(plan, costs, spans, deferred):
            for stage, now in moment.items():
                peaks[stage] = Kept(*map(max, peaks[stage], now))
    return tuple(peak.microbatches for peak in peaks), tuple(peak.logits for peak in peaks)


def _check_cost(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise PlanError(f"{name} is {value}: expected seconds, finite and not negative")
