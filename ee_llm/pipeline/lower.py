"""Add sends and receives to a plan and prove that it can be executed. Pure Python.

The proof has three parts (docs/explanation/pipeline.md): every action that the visits require is
present once; between any two ranks messages are sent in the order in which they are received; and
the lists run to their end even if every send blocks until its receive is posted.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Action, Op, Plan, step_grid
from ee_llm.pipeline.simulate import Duration, nominal_duration, timeline

_SEND = {Op.FORWARD: Op.SEND_FORWARD, Op.BACKWARD: Op.SEND_BACKWARD}
_RECEIVE = {Op.FORWARD: Op.RECV_FORWARD, Op.BACKWARD: Op.RECV_BACKWARD}
_COMPUTES = {op: compute for table in (_SEND, _RECEIVE) for compute, op in table.items()}

Place = tuple[int, int]  # (rank, step)


@dataclass(frozen=True)
class LoweredPlan(Plan):
    """A plan with communication, proved to be executable on construction.

    Raises:
        PlanError: The plan cannot be executed.
    """

    def __post_init__(self) -> None:
        verify(self)


def lower(plan: Plan) -> LoweredPlan:
    """Return the plan with communication, proved to be executable.

    A send directly follows its F or B. A receive is posted before the first action of its rank that
    ends later than the send's action in the timeline of nominal costs, so that it precedes the
    action during which the message arrives. Both ends of every message are placed from one sequence
    of actions, so that the ranks agree on the order of all messages, whatever the plan is.

    Raises:
        PlanError: The plan is already lowered, lacks or repeats an action, or deadlocks. The
            message marks the place in the grid.
    """
    if isinstance(plan, LoweredPlan):
        raise PlanError("the plan already has communication. Pass the plan before lowering.")
    _check_actions(plan, plan.work)
    spans = [span for spans in timeline(plan, _balanced_durations(plan)).ranks for span in spans]
    # Every action takes time, so sorting keeps the order within a rank. Among actions that end
    # together B comes first: of two messages that cross, the gradient's receive is then posted one
    # action ahead.
    priority = (Op.BACKWARD, Op.FORWARD, Op.WEIGHT).index
    spans.sort(key=lambda span: (span.end, priority(span.action.op), span.action))
    ranks: list[list[Action]] = [[] for _ in plan.ranks]
    for span in spans:
        for action in (span.action, *_messages(plan, span.action)):
            ranks[plan.stage_ranks[action.stage]].append(action)
    lists = tuple(map(tuple, ranks))
    return LoweredPlan(
        lists,
        plan.stage_ranks,
        plan.visits,
        plan.splits_backward,
        plan.splits_exits,
        plan.local_backwards,
        plan.distills,
    )


def _balanced_durations(plan: Plan) -> Callable[[Action], Duration]:
    """Return nominal durations with which no stage runs far ahead of the next one.

    With local backwards, a stage without one would run ahead at its nominal costs, and its
    neighbour would post a receive, with its buffer, for each of its messages.
    """
    nominal = nominal_duration(plan)

    def duration(action: Action) -> Duration:
        early, late = nominal(action)
        if plan.local_backwards and not plan.has_backward(action):
            late += nominal(action._replace(op=Op.BACKWARD)).late
        return Duration(early, late)

    return duration


def verify(plan: Plan) -> None:
    """Prove that a plan with communication can be executed.

    Raises:
        PlanError: It cannot. The message marks the place in the grid.
    """
    messages = (_messages(plan, action) for action in plan.work)
    _check_actions(plan, plan.work.union(*messages))
    _check_order(plan)
    _dry_run(plan)


def counterpart(action: Action) -> Action:
    """Return the receive that matches a send, or the send that matches a receive."""
    match action.op:
        case Op.SEND_FORWARD:
            return Action(action.stage + 1, Op.RECV_FORWARD, action.microbatch)
        case Op.RECV_FORWARD:
            return Action(action.stage - 1, Op.SEND_FORWARD, action.microbatch)
        case Op.SEND_BACKWARD:
            return Action(action.stage - 1, Op.RECV_BACKWARD, action.microbatch)
        case Op.RECV_BACKWARD:
            return Action(action.stage + 1, Op.SEND_BACKWARD, action.microbatch)
    raise AssertionError(f"{action} is not a communication action")


def _messages(plan: Plan, action: Action) -> tuple[Action, ...]:
    """Return the send and the receive of the result of an F or B, if it goes to another rank."""
    target = plan.target(action)
    if target is None or not plan.crosses_ranks(action, target):
        return ()
    return action._replace(op=_SEND[action.op]), target._replace(op=_RECEIVE[action.op])


def _check_actions(plan: Plan, expected: frozenset[Action]) -> None:
    if not all(0 <= rank < plan.num_ranks for rank in plan.stage_ranks):
        raise PlanError(
            f"stage_ranks {plan.stage_ranks} name ranks outside 0..{plan.num_ranks - 1}"
        )
    for microbatch, visit in enumerate(plan.visits):
        if not 0 <= visit.first_backward <= visit.depth <= plan.num_stages or visit.depth == 0:
            raise PlanError(
                f"microbatch {microbatch}: {visit} is not valid for {plan.num_stages} stages"
            )
    places: dict[Action, list[Place]] = defaultdict(list)
    for rank, actions in enumerate(plan.ranks):
        for step, action in enumerate(actions):
            places[action].append((rank, step))
    for action, found_at in places.items():
        if action not in expected:
            raise _error(plan, f"{action} is not required by any visit", found_at)
        if len(found_at) > 1:
            raise _error(plan, f"{action} appears {len(found_at)} times", found_at)
        if found_at[0][0] != plan.stage_ranks[action.stage]:
            owner = plan.stage_ranks[action.stage]
            raise _error(
                plan,
                f"{action} is on rank {found_at[0][0]}, but its stage is on rank {owner}",
                found_at,
            )
    for action in sorted(expected - places.keys()):
        owner = plan.stage_ranks[action.stage]
        raise _error(
            plan, f"{action} is missing from rank {owner}", [(owner, len(plan.ranks[owner]))]
        )


def _check_order(plan: Plan) -> None:
    # NCCL matches the messages between two ranks only by their order, because it has no tags.
    sent: dict[tuple[int, int, Op], list[Place]] = defaultdict(list)
    received: dict[tuple[int, int, Op], list[Place]] = defaultdict(list)
    for rank, actions in enumerate(plan.ranks):
        for step, action in enumerate(actions):
            if action.op.computes:
                continue
            peer = plan.stage_ranks[counterpart(action).stage]
            if action.op in _SEND.values():
                sent[rank, peer, _COMPUTES[action.op]].append((rank, step))
            else:
                received[peer, rank, _COMPUTES[action.op]].append((rank, step))
    for key, sends in sent.items():
        for nth, (send, receive) in enumerate(zip(sends, received[key], strict=True)):
            sent_by, received_by = _at(plan, send), _at(plan, receive)
            if counterpart(sent_by) != received_by:
                raise _error(
                    plan,
                    f"message {nth} from rank {key[0]} to rank {key[1]} is sent by {sent_by} but "
                    f"received by {received_by}: sends and receives must have the same order",
                    [send, receive],
                )


def _dry_run(plan: Plan) -> None:
    # A message moves only when both of its ranks have reached it. No backend is stricter: a plan
    # that runs this way also runs with buffers and threads.
    position = [0] * plan.num_ranks
    done: set[Action] = set()

    def head(rank: int) -> Action | None:
        queue = plan.ranks[rank]
        return queue[position[rank]] if position[rank] < len(queue) else None

    def is_ready(action: Action) -> bool:
        if action.op.computes:
            return all(need in done for need in _local_dependencies(plan, action))
        other = counterpart(action)
        is_send = action.op in _SEND.values()
        send = action if is_send else other
        produced = send._replace(op=_COMPUTES[send.op]) in done
        return produced and head(plan.stage_ranks[other.stage]) == other

    moved = True
    while moved:
        moved = False
        for rank in range(plan.num_ranks):
            while (action := head(rank)) is not None and is_ready(action):
                done.add(action)
                position[rank] += 1
                if not action.op.computes:
                    other = counterpart(action)
                    done.add(other)
                    position[plan.stage_ranks[other.stage]] += 1
                moved = True
    stuck = [(rank, at) for rank, at in enumerate(position) if at < len(plan.ranks[rank])]
    if stuck:
        waits = ", ".join(f"rank {rank} at {_at(plan, (rank, at))}" for rank, at in stuck)
        raise _error(plan, f"the plan deadlocks: {waits}", stuck)


def _local_dependencies(plan: Plan, action: Action) -> list[Action]:
    """Return the dependencies on the action's own rank: a receive for the result of a peer."""
    return [
        action._replace(op=_RECEIVE[action.op]) if plan.crosses_ranks(need, action) else need
        for need in plan.dependencies(action)
    ]


def _at(plan: Plan, place: Place) -> Action:
    rank, step = place
    return plan.ranks[rank][step]


def _error(plan: Plan, message: str, places: list[Place]) -> PlanError:
    return PlanError(f"{message}\n{step_grid(plan.ranks, places)}")
