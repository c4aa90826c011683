"""Lowering: adds sends and receives to a plan and proves that it can be carried out. Pure Python.

The proof has three parts (docs/explanation/pipeline.md): every action that the visits call for is
there once; between any two ranks messages are sent in the order in which they are received; and the
lists run to their end even if every send blocked until its receive is posted.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from ee_llm.errors import PlanError
from ee_llm.pipeline.plan import Action, Op, Plan, step_grid
from ee_llm.pipeline.simulate import Duration, nominal, timeline

_SEND = {Op.FORWARD: Op.SEND_FORWARD, Op.BACKWARD: Op.SEND_BACKWARD}
_RECEIVE = {Op.FORWARD: Op.RECV_FORWARD, Op.BACKWARD: Op.RECV_BACKWARD}
_COMPUTES = {op: compute for table in (_SEND, _RECEIVE) for compute, op in table.items()}

Place = tuple[int, int]  # (rank, step)


@dataclass(frozen=True)
class LoweredPlan(Plan):
    """A plan with its communication; made only by proving it, so that who has one may trust it.

    Raises PlanError if it cannot be carried out.
    """

    def __post_init__(self) -> None:
        verify(self)


def lower(plan: Plan) -> LoweredPlan:
    """Return the plan with its communication, proved sound.

    A send stands behind its F or B, before the next action. The receive is posted before whatever
    ends later on its own rank, at the nominal costs of the plan's timeline: where the rank computes
    when the message comes, before that action. Both ends of every message take their places from
    one sequence, so the lists agree on the order of all messages, whatever the plan.

    Raises PlanError, with the place marked in the grid, if the plan is already lowered, misses or
    repeats an action, or deadlocks.
    """
    if isinstance(plan, LoweredPlan):
        raise PlanError("the plan already has communication: lower the plan it was made from")
    _check_actions(plan, plan.work)
    spans = [span for spans in timeline(plan, _paced(plan)).ranks for span in spans]
    # A rank keeps its order, because every action takes time. Of what ends together B goes first:
    # of two messages that cross, the gradient's receive is then posted an action ahead.
    first = (Op.BACKWARD, Op.FORWARD, Op.WEIGHT).index
    spans.sort(key=lambda span: (span.end, first(span.action.op), span.action))
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
    )


def _paced(plan: Plan) -> Callable[[Action], Duration]:
    """Return nominal durations with which no stage gets far ahead of the next one.

    With local backwards, a stage that has none would by its nominal costs, and its neighbour would
    post a receive, with its buffer, for all that it sends meanwhile.
    """
    usual = nominal(plan)

    def duration(action: Action) -> Duration:
        early, late = usual(action)
        if plan.local_backwards and not plan.has_backward(action):
            late += usual(action._replace(op=Op.BACKWARD)).late
        return Duration(early, late)

    return duration


def verify(plan: Plan) -> None:
    """Prove that a plan with messages can be carried out; PlanError, its place marked, if not."""
    messages = (_messages(plan, action) for action in plan.work)
    _check_actions(plan, plan.work.union(*messages))
    _check_order(plan)
    _dry_run(plan)


def counterpart(action: Action) -> Action:
    """Return the receive that belongs to a send, and the send that belongs to a receive."""
    match action.op:
        case Op.SEND_FORWARD:
            return Action(action.stage + 1, Op.RECV_FORWARD, action.microbatch)
        case Op.RECV_FORWARD:
            return Action(action.stage - 1, Op.SEND_FORWARD, action.microbatch)
        case Op.SEND_BACKWARD:
            return Action(action.stage - 1, Op.RECV_BACKWARD, action.microbatch)
        case Op.RECV_BACKWARD:
            return Action(action.stage + 1, Op.SEND_BACKWARD, action.microbatch)
    raise AssertionError(f"{action} is no communication")


def _messages(plan: Plan, action: Action) -> tuple[Action, ...]:
    # The send and the receive that carry the result of an F or B to another rank; none if it stays.
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
            raise PlanError(f"microbatch {microbatch}: {visit} with {plan.num_stages} stages")
    places: dict[Action, list[Place]] = defaultdict(list)
    for rank, actions in enumerate(plan.ranks):
        for step, action in enumerate(actions):
            places[action].append((rank, step))
    for action, found in places.items():
        if action not in expected:
            raise _error(plan, f"{action} is not called for by any visit", found)
        if len(found) > 1:
            raise _error(plan, f"{action} stands {len(found)} times", found)
        if found[0][0] != plan.stage_ranks[action.stage]:
            owner = plan.stage_ranks[action.stage]
            raise _error(
                plan, f"{action} stands on rank {found[0][0]}, its stage on {owner}", found
            )
    for action in sorted(expected - places.keys()):
        owner = plan.stage_ranks[action.stage]
        raise _error(
            plan, f"{action} is missing from rank {owner}", [(owner, len(plan.ranks[owner]))]
        )


def _check_order(plan: Plan) -> None:
    # NCCL matches messages between two ranks by order alone: tags do not exist there.
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
            one, other = _at(plan, send), _at(plan, receive)
            if counterpart(one) != other:
                raise _error(
                    plan,
                    f"message {nth} from rank {key[0]} to rank {key[1]} is sent by {one} and taken "
                    f"by {other}: the order of sends must be that of receives",
                    [send, receive],
                )


def _dry_run(plan: Plan) -> None:
    # A message moves only when both of its ranks have come to it. This is the strictest meaning a
    # backend can give to the lists; whatever runs so also runs with buffers and threads.
    position = [0] * plan.num_ranks
    done: set[Action] = set()

    def head(rank: int) -> Action | None:
        queue = plan.ranks[rank]
        return queue[position[rank]] if position[rank] < len(queue) else None

    def is_ready(action: Action) -> bool:
        if action.op.computes:
            return all(need in done for need in _local_needs(plan, action))
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


def _local_needs(plan: Plan, action: Action) -> list[Action]:
    # What must have happened on the action's own rank: a receive stands for the peer's result.
    return [
        action._replace(op=_RECEIVE[action.op]) if plan.crosses_ranks(need, action) else need
        for need in plan.needs(action)
    ]


def _at(plan: Plan, place: Place) -> Action:
    rank, step = place
    return plan.ranks[rank][step]


def _error(plan: Plan, message: str, places: list[Place]) -> PlanError:
    return PlanError(f"{message}\n{step_grid(plan.ranks, places)}")
