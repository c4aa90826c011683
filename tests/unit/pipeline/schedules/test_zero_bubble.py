"""ZB-H1: its grid, its soundness, its bubble and its memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ee_llm.pipeline import (
    Action,
    Costs,
    Op,
    PieceCost,
    StageCost,
    grid,
    lower,
    one_f_one_b,
    simulate,
)
from ee_llm.pipeline.schedules.zero_bubble import zero_bubble_h1


def test_four_stages():
    assert grid(zero_bubble_h1(num_stages=4, num_microbatches=5)).split("\n") == [
        "rank 0  0F0 0F1 0F2 0F3 .   .   .   0B0 0W0 0F4 0B1 0W1 0B2 0W2 0B3 0W3 0B4 0W4",
        "rank 1  .   1F0 1F1 1F2 .   .   1B0 1F3 1B1 1W0 1F4 1B2 1W1 1B3 1W2 1B4 1W3 1W4",
        "rank 2  .   .   2F0 2F1 .   2B0 2F2 2B1 2F3 2B2 2W0 2F4 2B3 2W1 2B4 2W2 2W3 2W4",
        "rank 3  .   .   .   3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3 3W0 3F4 3B4 3W1 3W2 3W3 3W4",
    ]


@given(st.integers(1, 8), st.integers(1, 20))
def test_every_size_is_sound_and_does_the_work_of_1f1b(stages, microbatches):
    plan = zero_bubble_h1(stages, microbatches)
    assert lower(plan).without_communication() == plan
    for ours, theirs in zip(plan.ranks, one_f_one_b(stages, microbatches).ranks, strict=True):
        assert tuple(a for a in ours if a.op is not Op.WEIGHT) == theirs


@given(st.integers(1, 8), st.integers(0, 12))
def test_bubble_is_a_third_and_memory_equal_to_1f1b(stages, more):
    """Qi et al., table 2: (P-1)(f + b - w) and at most P microbatches alive."""
    cost = StageCost(forward=1, backward=2, weight=1)
    plan = zero_bubble_h1(stages, stages + more)
    found = simulate(plan, Costs((cost,) * stages))
    assert found.makespan == 3 * (stages + more) + stages - 1
    assert max(found.peak_activations) == stages


@given(st.integers(1, 8), st.integers(0, 12), st.integers(1, 4))
def test_split_exits_trade_memory_for_time(stages, more, head):
    """With fewer layers on the last rank, to balance its head, the gain is P times the weight part.

    A head takes as long as `head` of a rank's 5 layers. On rank r the gradients of the logits of
    r + 1 microbatches are alive, twice as many with two exits.
    """
    microbatches = stages + more
    final = StageCost(5 - head, 2 * (5 - head), (PieceCost(head, 2 * head, head),), 5 - head)
    costs = Costs((StageCost(5, 10, weight=5),) * (stages - 1) + (final,))
    found = {
        split: simulate(zero_bubble_h1(stages, microbatches, split), costs)
        for split in (False, True)
    }
    assert found[True].makespan == 15 * microbatches + 5 * (stages - 1)
    gain = stages * head if stages > 1 else 0
    assert found[False].makespan == found[True].makespan + gain
    assert found[False].peak_exit_logits == (0,) * (stages - 1) + (1,)
    assert found[True].peak_exit_logits == (0,) * (stages - 1) + (stages,)
    everywhere = Costs((StageCost(5, 10, (PieceCost(1, 2, 1),) * 2, 5),) * stages)
    plan = zero_bubble_h1(stages, microbatches, True)
    peaks = simulate(plan, everywhere).peak_exit_logits
    assert peaks == tuple(2 * (rank + 1) for rank in range(stages))


def test_time_of_split_exits_counts_in_their_actions():
    costs = Costs((StageCost(1, 2, (PieceCost(4, 10, 3), PieceCost(4, 10, 3)), 1),))
    for deferred, lengths in ((True, [1, 23, 7]), (False, [9, 15, 7])):
        found = simulate(zero_bubble_h1(1, 1, split_exits=True), costs, deferred=deferred)
        [spans] = found.timeline.ranks
        assert [span.end - span.start for span in spans] == lengths
        assert found.peak_exit_logits == (2,)


def test_missing_weight_action_is_an_error():
    plan = zero_bubble_h1(2, 2)
    ranks = (tuple(a for a in plan.ranks[0] if str(a) != "0W1"), plan.ranks[1])
    with pytest.raises(ValueError, match="0W1 is missing from rank 0"):
        lower(type(plan)(ranks, plan.stage_ranks, plan.visits, splits_backward=True))
    with pytest.raises(ValueError, match="0W0 is not required"):
        lower(type(plan)(plan.ranks, plan.stage_ranks, plan.visits))


def test_weight_action_cannot_precede_its_backward():
    plan = zero_bubble_h1(1, 1)
    early = tuple(map(Action.parse, ("0F0", "0W0", "0B0")))
    with pytest.raises(ValueError, match="deadlocks: rank 0 at 0W0 waits for 0B0"):
        lower(type(plan)((early,), plan.stage_ranks, plan.visits, splits_backward=True))


def test_weight_above_backward_is_an_error():
    with pytest.raises(ValueError, match="weight = 3 exceeds backward = 2"):
        Costs((StageCost(1, 2, weight=3),))
    with pytest.raises(ValueError, match="weight = 3 exceeds backward = 2"):
        Costs((StageCost(1, 2, (PieceCost(1, 2, 3),)),))
