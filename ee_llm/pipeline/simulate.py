"""Predict the time and memory of a plan from the costs of its stages. Pure Python."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Action, Op, Plan, step_grid


class PieceCost(NamedTuple):
    """Seconds of a layer, the embedding, or an exit with its loss, for one microbatch.

    `weight` is the part of `backward` that computes the weight gradients, which some plans do in a
    separate action (W).
    """

    forward: float
    backward: float
    weight: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class StageCost:
    """Seconds of one stage for one microbatch.

    `forward`, `backward` and `weight` (a part of `backward`) are the costs of the layers, and on
    the first stage of the embedding. `exits` are the costs of the stage's exits, in order. The
    final exit is the last one of the last stage.
    """

    forward: float
    backward: float
    exits: tuple[PieceCost, ...] = ()
    weight: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Costs of every stage, and the seconds of a message between two ranks."""

    stages: tuple[StageCost, ...]
    communication: float = 0.0

    def __post_init__(self) -> None:
        """Raise PlanError if a cost is negative or infinite, or `weight` exceeds `backward`."""
        for index, stage in enumerate(self.stages):
            layers = PieceCost(stage.forward, stage.backward, stage.weight)
            for cost in (layers, *stage.exits):
                for value in cost:
                    _check_cost(f"a cost of stage {index}", value)
                if cost.weight > cost.backward:
                    raise PlanError(
                        f"stage {index}: weight = {cost.weight} exceeds backward = "
                        f"{cost.backward}, which includes it"
                    )
        _check_cost("communication", self.communication)


class Duration(NamedTuple):
    """The duration of an action. Its `early` part can run before the neighbour's result arrives.

    A deferred exit is early work: it needs the hidden state of its own stage but not the gradient
    from the next stage, so it runs while the rank would otherwise wait for that gradient.
    """

    early: float
    late: float


class Span(NamedTuple):
    """The times of one action on its rank. `end` excludes the transfer of its result.

    `exits` is the time of the exits at the start of the action, if it was measured.
    """

    action: Action
    start: float
    end: float
    exits: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """The F, B and W actions of each rank, in order, with their times."""

    ranks: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """Return the time from the start of the first action (0) to the end of the last one."""
        return max((spans[-1].end for spans in self.ranks if spans), default=0.0)


@dataclass(frozen=True)
class Simulation:
    """The predicted time and memory of a plan.

    Attributes:
        makespan: Time of the plan in the unit of the costs.
        bubble_share: The idle share of the makespan, per rank.
        peak_activations: Peak number of live microbatches, per stage (`StageMemory`).
        peak_exit_logits: Peak number of live exit logits, per stage, each [s, b, v] of one exit
            for one microbatch (`StageMemory`).
        timeline: The times of all actions.
    """

    makespan: float
    bubble_share: tuple[float, ...]
    peak_activations: tuple[int, ...]
    peak_exit_logits: tuple[int, ...]
    timeline: Timeline


def nominal_duration(plan: Plan) -> Callable[[Action], Duration]:
    """Return nominal durations: 1 for a forward, 2 for a backward (or 1, and 1 for its W)."""
    backward = 1.0 if plan.splits_backward else 2.0
    return lambda action: Duration(0.0, backward if action.op is Op.BACKWARD else 1.0)


def timeline(
    plan: Plan,
    duration: Callable[[Action], Duration] | None = None,
    communication: float = 0.0,
) -> Timeline:
    """Return the times of F, B and W if every rank starts each action as early as possible.

    Args:
        plan: The plan, lowered or not.
        duration: Returns the duration of an action. By default `nominal_duration(plan)`.
        communication: Time of a message between two ranks. A message does not block its sender.

    Raises:
        PlanError: The plan deadlocks. The message marks the places in the grid.
    """
    duration = duration or nominal_duration(plan)
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
                needs = plan.dependencies(action)
                if not all(need in ended for need in needs):
                    break
                early, late = duration(action)
                free = ranks[rank][-1].end if ranks[rank] else 0.0
                ready = max((arrival(need, action) for need in needs), default=0.0)
                # The early part does not need the dependencies, but the rank must be free.
                start = max(free, ready - early)
                ended[action] = start + early + late
                ranks[rank].append(Span(action, start, ended[action]))
                position[rank] += 1
                moved = True
    stuck = [(rank, at) for rank, at in enumerate(position) if at < len(queues[rank])]
    if stuck:
        waits = "; ".join(
            f"rank {rank} at {queues[rank][at]} waits for "
            + ", ".join(str(n) for n in plan.dependencies(queues[rank][at]) if n not in ended)
            for rank, at in stuck
        )
        raise PlanError(f"the plan deadlocks: {waits}\n{step_grid(queues, stuck)}")
    return Timeline(tuple(tuple(spans) for spans in ranks))


def grid(source: Plan | Timeline, slot: float | None = None) -> str:
    """Return the rank x time grid, with one column per `slot` of time.

    Dashes show the duration of actions, to a fraction of a column, and dots show idle time. An
    action that is shorter than a slot still shows its full name, and may cover its predecessor.

    Args:
        source: A timeline, or a plan, which is shown at nominal costs (backward = 2 forwards).
        slot: Time of a column. By default the duration of the shortest action.
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
            start = min(math.floor(width * span.start / slot + 0.5), total - width)
            end = max(math.floor(width * span.end / slot + 0.5) - 1, start + len(text))
            row[start:end] = text.ljust(end - start, "-")
            row[end : end + 1] = " "
            if start and row[start - 1] == ".":
                row[start - 1] = " "
        rows.append(f"rank {rank:>{len(str(len(line.ranks) - 1))}}  {''.join(row)}".rstrip())
    return "\n".join(rows)


def simulate(plan: Plan, costs: Costs, *, deferred: bool = True) -> Simulation:
    """Return the time, the bubbles and the peak memory of a plan for the given costs.

    Args:
        plan: The plan, lowered or not.
        costs: The costs of its stages.
        deferred: Whether exits run in their microbatch's backward, one at a time. Otherwise they
            run in its forward, and their logits stay alive until its backward.

    Raises:
        PlanError: The costs have another number of stages than the plan, or the plan deadlocks.
    """
    if len(costs.stages) != plan.num_stages:
        raise PlanError(
            f"the costs have {len(costs.stages)} stages, but the plan has {plan.num_stages}"
        )
    line = timeline(plan, lambda a: _duration(plan, costs, a, deferred), costs.communication)
    makespan = line.makespan
    idle = tuple(
        max(0.0, 1.0 - math.fsum(s.end - s.start for s in spans) / makespan) if makespan else 0.0
        for spans in line.ranks
    )
    activations, logits = _peaks(plan, costs, line, deferred)
    return Simulation(makespan, idle, activations, logits, line)


def computes_exits(plan: Plan, action: Action, deferred: bool) -> bool:
    """Return whether the action runs the forward pass of its stage's exits, if there are any."""
    if plan.has_backward(action):
        return action.op is (Op.BACKWARD if deferred else Op.FORWARD)
    return action.op is Op.FORWARD and not plan.has_any_backward(action.microbatch)  # an evaluation


def exit_duration(plan: Plan, costs: Costs, action: Action, deferred: bool) -> float:
    """Return the part of an action's duration that the exits of its stage take."""
    exits = costs.stages[action.stage].exits
    has_forward = computes_exits(plan, action, deferred)
    forward = math.fsum(cost.forward for cost in exits) if has_forward else 0.0
    weight = math.fsum(cost.weight for cost in exits) if plan.splits_exits else 0.0
    match action.op:
        case Op.BACKWARD:
            return forward + math.fsum(cost.backward for cost in exits) - weight
        case Op.WEIGHT:
            return weight
    return forward


class StageMemory(NamedTuple):
    """The memory of a stage during an action of its rank.

    Attributes:
        microbatches: Number of microbatches whose forward has started and whose backward,
            including W, has not ended.
        logits: Number of exit logits, or their gradients, that exist or are still needed.
    """

    microbatches: int
    logits: int


def stage_memory(
    plan: Plan, costs: Costs, spans: Sequence[Span], deferred: bool
) -> Iterator[dict[int, StageMemory]]:
    """Yield, for each action of a rank, the memory of each of its stages during the action."""
    stages = {span.action.stage: StageMemory(0, 0) for span in spans}
    last = Op.WEIGHT if plan.splits_backward else Op.BACKWARD
    exits_end = Op.WEIGHT if plan.splits_exits else Op.BACKWARD
    for action in (span.action for span in spans):
        trains = plan.has_backward(action)
        start = computes_exits(plan, action, deferred)
        end = action.op is exits_end if trains else start
        exits = len(costs.stages[action.stage].exits)
        if start and end:
            exits = min(1, exits)  # the exits run one after the other
        live, logits = stages[action.stage]
        live, logits = live + (action.op is Op.FORWARD), logits + exits * start
        stages[action.stage] = StageMemory(live, logits)
        yield dict(stages)
        live -= action.op is last or not trains
        stages[action.stage] = StageMemory(live, logits - exits * end)


def _duration(plan: Plan, costs: Costs, action: Action, deferred: bool) -> Duration:
    stage = costs.stages[action.stage]
    exits = exit_duration(plan, costs, action, deferred)
    match action.op:
        case Op.FORWARD:
            return Duration(0.0, stage.forward + exits)
        case Op.WEIGHT:
            return Duration(0.0, stage.weight + exits)
    layers = stage.backward - (stage.weight if plan.splits_backward else 0.0)
    # Exits that distill wait for the final exit's hidden state, as layers wait for their gradient.
    runs_early = deferred and not plan.distills
    return Duration(exits, layers) if runs_early else Duration(0.0, exits + layers)


def _peaks(
    plan: Plan, costs: Costs, line: Timeline, deferred: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    peaks = [StageMemory(0, 0)] * plan.num_stages
    for spans in line.ranks:
        for moment in stage_memory(plan, costs, spans, deferred):
            for stage, now in moment.items():
                peaks[stage] = StageMemory(*map(max, peaks[stage], now))
    return tuple(peak.microbatches for peak in peaks), tuple(peak.logits for peak in peaks)


def _check_cost(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise PlanError(f"{name} = {value} is not valid. Give finite seconds of at least 0.")
