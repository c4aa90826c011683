"""Lowering: the messages that it adds, its proof, and its errors."""

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ee_llm.errors import PlanError
from ee_llm.pipeline import Action, Op, Plan, Visit, forward_only, lower, one_f_one_b, verify
from ee_llm.pipeline.lower import counterpart
from ee_llm.pipeline.runtime import Runtime
from ee_llm.pipeline.schedules.interleaved import interleaved
from ee_llm.pipeline.schedules.zero_bubble import zero_bubble_h1

sizes = st.integers(1, 8)
SENDS = (Op.SEND_FORWARD, Op.SEND_BACKWARD)


def plan_of(*ranks, stage_ranks=None, visits=None):
    """Return a plan from lines of actions, by default with one stage per rank and full visits."""
    lists = tuple(tuple(Action.parse(text) for text in line.split()) for line in ranks)
    stage_ranks = stage_ranks or tuple(range(len(lists)))
    count = 1 + max(action.microbatch for actions in lists for action in actions)
    return Plan(lists, stage_ranks, visits or (Visit(len(stage_ranks), 0),) * count)


def edited(plan, rank, edit):
    """Return the plan after `edit` has changed the list of one rank in place."""
    ranks = [list(actions) for actions in plan.ranks]
    edit(ranks[rank])
    return Plan(tuple(tuple(actions) for actions in ranks), plan.stage_ranks, plan.visits)


@st.composite
def ragged_plans(draw):
    """Draw plans with different visits, and stages assigned to ranks at random."""
    stages = draw(st.integers(1, 6))
    num_ranks = draw(st.integers(1, stages))
    stage_ranks = tuple(draw(st.integers(0, num_ranks - 1)) for _ in range(stages))
    visits, order = [], []
    for microbatch in range(draw(st.integers(1, 5))):
        depth = draw(st.integers(1, stages))
        first = draw(st.integers(0, depth))
        visits.append(Visit(depth, first))
        journey = [Action(s, Op.FORWARD, microbatch) for s in range(depth)]
        journey += [Action(s, Op.BACKWARD, microbatch) for s in range(depth - 1, first - 1, -1)]
        order.append(journey)
    ranks = [[] for _ in range(num_ranks)]
    while any(order):  # any interleaving of the visits is a valid plan
        journey = draw(st.sampled_from([j for j in order if j]))
        action = journey.pop(0)
        ranks[stage_ranks[action.stage]].append(action)
    return Plan(tuple(map(tuple, ranks)), stage_ranks, tuple(visits))


def check_lowered(plan, lowered):
    assert lowered.without_communication() == plan
    posted = defaultdict(list)
    for rank, actions in enumerate(lowered.ranks):
        for step, action in enumerate(actions):
            if action.op.computes:
                continue
            peer = plan.stage_ranks[counterpart(action).stage]
            assert peer != rank
            message = action if action.op in SENDS else counterpart(action)
            posted[rank, peer].append(str(message))
            if action.op in SENDS:
                # only communication comes between a result and its send
                before = [a for a in actions[:step] if a.op.computes][-1]
                assert str(before) == str(action).replace("S", "")
            else:
                assert Action.parse(str(action).replace("R", "")) in actions[step + 1 :]
    for (rank, peer), messages in posted.items():
        # stronger than per direction: both lists have all common messages in the same order
        assert messages == posted[peer, rank]
    return sum(map(len, posted.values())) // 2


@given(sizes, sizes)
def test_lowering_one_f_one_b_is_sound(stages, microbatches):
    plan = one_f_one_b(stages, microbatches)
    assert check_lowered(plan, lower(plan)) == 2 * (stages - 1) * microbatches
    plan = forward_only(stages, microbatches)
    assert check_lowered(plan, lower(plan)) == (stages - 1) * microbatches


@given(ragged_plans())
def test_lowering_any_valid_plan_is_sound(plan):
    check_lowered(plan, lower(plan))


def test_the_lowered_list_of_a_small_plan():
    lowered = lower(one_f_one_b(2, 2))
    assert [" ".join(map(str, actions)) for actions in lowered.ranks] == [
        "0F0 0SF0 0F1 0SF1 0RB0 0B0 0RB1 0B1",
        "1RF0 1RF1 1F0 1B0 1SB0 1F1 1B1 1SB1",
    ]


def num_ahead(plan):
    """Return the number of receives posted before an earlier action than their own, and of all."""
    ahead = total = 0
    for actions in lower(plan).ranks:
        for step, action in enumerate(actions):
            if action.op in (Op.RECV_FORWARD, Op.RECV_BACKWARD):
                after = next(a for a in actions[step:] if a.op.computes)
                ahead += str(after) != str(action).replace("R", "")
                total += 1
    return ahead, total


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (one_f_one_b(4, 16), (45, 96)),
        (interleaved(4, 2, 16), (180, 224)),
        (zero_bubble_h1(4, 16), (87, 96)),
    ],
    ids=["1f1b", "interleaved", "zero bubble"],
)
def test_receives_are_posted_before_the_action_during_which_they_arrive(plan, expected):
    """Of two messages that cross, only one is posted ahead, or each would wait for the other."""
    assert num_ahead(plan) == expected


def test_stages_on_one_rank_need_no_messages():
    plan = plan_of("0F0 1F0 1B0 0B0", stage_ranks=(0, 0))
    assert lower(plan).ranks == plan.ranks


def test_error_shows_a_deadlock_in_the_grid():
    plan = plan_of("0B0 0F0", "1F0 1B0")
    with pytest.raises(PlanError) as caught:
        lower(plan)
    assert str(caught.value) == "\n".join(
        [
            "the plan deadlocks: rank 0 at 0B0 waits for 0F0, 1B0; rank 1 at 1F0 waits for 0F0",
            " step    0    1",
            "rank 0 >0B0< 0F0",
            "rank 1 >1F0< 1B0",
        ]
    )


def test_error_shows_a_repeated_action_in_the_grid():
    plan = edited(one_f_one_b(2, 2), 1, lambda actions: actions.insert(2, actions[1]))
    with pytest.raises(PlanError, match=r"(?s)1B0 appears 2 times.*rank 1 1F0 >1B0< >1B0< 1F1"):
        lower(plan)


def all_actions(plan):
    return [(rank, at) for rank, line in enumerate(plan.ranks) for at in range(len(line))]


@pytest.mark.parametrize("place", all_actions(one_f_one_b(3, 4)), ids=str)
def test_every_missing_action_is_an_error(place):
    """Covers the ends of the visits: without 0B3, or 2F3 and 2B3, the rest is consistent."""
    rank, at = place
    plan = one_f_one_b(3, 4)
    missing = plan.ranks[rank][at]
    with pytest.raises(PlanError, match=rf"(?s){missing} is missing from rank {rank}.*>end<"):
        lower(edited(plan, rank, lambda actions: actions.pop(at)))


def test_actions_beyond_the_visits_are_errors():
    with pytest.raises(PlanError, match=r"(?s)0F2 is not required.*>0F2<"):
        lower(edited(one_f_one_b(2, 2), 0, lambda a: a.append(Action.parse("0F2"))))
    with pytest.raises(PlanError, match="1B0 is not required"):
        lower(plan_of("0F0", "1F0 1B0", visits=(Visit(2, 2),)))
    with pytest.raises(PlanError, match="1F0 is on rank 0, but its stage is on rank 1"):
        lower(plan_of("0F0 1F0 1B0 0B0", "", stage_ranks=(0, 1)))


def test_impossible_visits_and_ranks_are_errors():
    for visit in (Visit(3, 0), Visit(1, 2), Visit(0, 0), Visit(2, -1)):
        with pytest.raises(PlanError, match="microbatch 0: Visit"):
            lower(plan_of("0F0", "1F0", visits=(visit,)))
    with pytest.raises(PlanError, match=r"stage_ranks \(0, 2\)"):
        lower(plan_of("0F0", "1F0", stage_ranks=(0, 2)))


def test_lowering_twice_is_an_error():
    with pytest.raises(PlanError, match="already has communication"):
        lower(lower(one_f_one_b(2, 2)))


@pytest.mark.parametrize("place", all_actions(lower(one_f_one_b(3, 2))), ids=str)
def test_verify_finds_every_missing_and_repeated_action(place):
    rank, at = place
    lowered = lower(one_f_one_b(3, 2))
    action = lowered.ranks[rank][at]
    with pytest.raises(PlanError, match=f"{action} is missing from rank {rank}"):
        verify(edited(lowered, rank, lambda actions: actions.pop(at)))
    with pytest.raises(PlanError, match=f"{action} appears 2 times"):
        verify(edited(lowered, rank, lambda actions: actions.append(action)))


def test_lowered_plan_cannot_be_unsound():
    """The runtime checks only the type."""
    lowered = lower(one_f_one_b(2, 2))
    for ranks in (lowered.ranks[::-1], one_f_one_b(2, 2).ranks):
        with pytest.raises(PlanError):
            replace(lowered, ranks=ranks)


def test_plan_is_proved_once(monkeypatch):
    """With many microbatches the proof takes seconds, on every rank."""
    proofs = []
    monkeypatch.setitem(lower.__globals__, "verify", proofs.append)
    plan = lower(one_f_one_b(1, 2))
    Runtime(plan, 0, {0: None}, None, None)
    assert proofs == [plan]


def test_verify_rejects_a_plan_without_communication():
    with pytest.raises(PlanError, match="0RB0 is missing from rank 0"):
        verify(one_f_one_b(2, 1))


def swap(first, second):
    def edit(actions):
        i, j = (actions.index(Action.parse(text)) for text in (first, second))
        actions[i], actions[j] = actions[j], actions[i]

    return edit


def test_receives_in_another_order_than_sends_are_errors():
    lowered = edited(lower(one_f_one_b(2, 2)), 1, swap("1RF0", "1RF1"))
    with pytest.raises(
        PlanError,
        match=r"(?s)message 0 from rank 0 to rank 1 is sent by 0SF0 but received by 1RF1"
        r".*>0SF0<.*>1RF1<",
    ):
        verify(lowered)


@pytest.mark.parametrize(
    ("rank", "first", "second"),
    [(0, "0F0", "0SF0"), (1, "1RF1", "1F1"), (1, "1B1", "1SB1"), (0, "0RB0", "0B0")],
)
def test_message_on_the_wrong_side_of_its_action_deadlocks(rank, first, second):
    with pytest.raises(PlanError, match=r"(?s)the plan deadlocks.*>"):
        verify(edited(lower(one_f_one_b(2, 2)), rank, swap(first, second)))


def test_receives_posted_only_when_needed_would_deadlock_a_blocking_backend():
    """The usual placement: rank 0 sends 0F1 before it receives 1B0's gradient, rank 1 the reverse.

    It runs if sends are buffered, on which the dry run must not rely.
    """
    late = plan_of("0F0 0SF0 0F1 0SF1 0RB0 0B0 0RB1 0B1", "1RF0 1F0 1B0 1SB0 1RF1 1F1 1B1 1SB1")
    with pytest.raises(PlanError, match="deadlocks: rank 0 at 0SF1, rank 1 at 1SB0"):
        verify(late)


def test_two_stages_on_each_of_two_ranks_share_one_order_of_messages():
    """Both directions use the same two peers, between which NCCL matches messages by order only."""
    plan = plan_of(
        "0F0 0F1 2F0 2F1 2B0 0B0 2B1 0B1",
        "1F0 1F1 3F0 3B0 1B0 3F1 3B1 1B1",
        stage_ranks=(0, 1, 0, 1),
    )
    assert check_lowered(plan, lower(plan)) == 12
