"""Makespan, bubbles and peak memory of plans, and the printed grid."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ee_llm.pipeline import (
    Action,
    Costs,
    Op,
    PieceCost,
    Plan,
    StageCost,
    Visit,
    forward_only,
    grid,
    lower,
    one_f_one_b,
    simulate,
)

sizes = st.integers(1, 9)
seconds = st.integers(0, 20).map(lambda quarter: quarter / 4)  # exact in binary


def uniform(stages, forward=1.0, backward=2.0, **more):
    return Costs((StageCost(forward, backward),) * stages, **more)


def test_golden_grid_of_one_f_one_b():
    """P=4, M=8, backward = 2 forwards: the schedule at the top of arXiv 2104.04473, Figure 4."""
    golden = [
        "rank 0  0F0 0F1 0F2 0F3 .   .   .   .   .   .   0B0---- 0F4 0B1---- 0F5 0B2---- 0F6 "
        "0B3---- 0F7 0B4---- .   0B5---- .   0B6---- .   0B7----",
        "rank 1  .   1F0 1F1 1F2 .   .   .   .   1B0---- 1F3 1B1---- 1F4 1B2---- 1F5 1B3---- 1F6 "
        "1B4---- 1F7 1B5---- .   1B6---- .   1B7---- .   .",
        "rank 2  .   .   2F0 2F1 .   .   2B0---- 2F2 2B1---- 2F3 2B2---- 2F4 2B3---- 2F5 2B4---- "
        "2F6 2B5---- 2F7 2B6---- .   2B7---- .   .   .   .",
        "rank 3  .   .   .   3F0 3B0---- 3F1 3B1---- 3F2 3B2---- 3F3 3B3---- 3F4 3B4---- 3F5 "
        "3B5---- 3F6 3B6---- 3F7 3B7---- .   .   .   .   .   .",
    ]
    assert grid(one_f_one_b(4, 8)).split("\n") == golden
    assert grid(lower(one_f_one_b(4, 8))).split("\n") == golden


def test_grid_of_uneven_costs_shows_durations():
    costs = Costs((StageCost(1, 2), StageCost(2, 4)))
    line = simulate(one_f_one_b(2, 1), costs).timeline
    assert grid(line) == "\n".join(
        [
            "rank 0  0F0 .   .   .   .   .   .   0B0----",
            "rank 1  .   1F0---- 1B0------------ .   .",
        ]
    )


def test_grid_shows_fractions_of_a_column():
    line = simulate(one_f_one_b(2, 1), uniform(2, 1.0, 1.25)).timeline
    assert grid(line).split("\n") == [
        "rank 0  0F0 .   .    0B0-",
        "rank 1  .   1F0 1B0-    .",
    ]


def test_grid_of_zero_costs_has_one_column():
    assert grid(simulate(one_f_one_b(1, 1), uniform(1, 0, 0)).timeline) == "rank 0  0B0"


@given(sizes, sizes, seconds, seconds)
def test_makespan_of_one_f_one_b_is_the_closed_form(stages, microbatches, forward, backward):
    found = simulate(one_f_one_b(stages, microbatches), uniform(stages, forward, backward))
    assert found.makespan == (stages - 1 + microbatches) * (forward + backward)
    if found.makespan:
        assert found.bubble_share == pytest.approx(
            [(stages - 1) / (stages - 1 + microbatches)] * stages
        )


@given(sizes, sizes, st.booleans())
def test_one_f_one_b_keeps_at_most_p_minus_i_activations(stages, microbatches, deferred):
    found = simulate(one_f_one_b(stages, microbatches), uniform(stages), deferred=deferred)
    assert found.peak_activations == tuple(min(stages - i, microbatches) for i in range(stages))
    assert found.peak_exit_logits == (0,) * stages


@given(sizes, sizes, st.data())
def test_deferral_keeps_one_exit_alive_instead_of_one_per_microbatch(stages, microbatches, data):
    counts = [data.draw(st.integers(0, 3)) for _ in range(stages)]
    costs = Costs(tuple(StageCost(1, 2, (PieceCost(1, 1),) * count) for count in counts))
    plan = one_f_one_b(stages, microbatches)
    assert simulate(plan, costs).peak_exit_logits == tuple(min(1, count) for count in counts)
    assert simulate(plan, costs, deferred=False).peak_exit_logits == tuple(
        count * min(stages - i, microbatches) for i, count in enumerate(counts)
    )


@given(sizes, sizes, st.booleans(), st.data())
def test_time_of_exits_is_within_the_published_bound(stages, microbatches, deferred, data):
    """EE-LLM (arXiv 2312.04916), A.3.1, with the final exit and the embedding."""
    draw = data.draw
    f_bb, b_bb, f_ee, b_ee, f_in, b_in, f_fe, b_fe = (draw(seconds) for _ in range(8))
    exits = [draw(st.integers(0, 2)) for _ in range(stages)]
    costs = []
    for stage, count in enumerate(exits):
        heads = [PieceCost(f_ee, b_ee)] * count
        if stage == stages - 1:
            heads.append(PieceCost(f_fe, b_fe))
        first = stage == 0
        costs.append(StageCost(f_bb + first * f_in, b_bb + first * b_in, tuple(heads)))
    slowest = max(
        math.fsum([c.forward, c.backward, *(x for e in c.exits for x in e)]) for c in costs
    )
    bound = f_in + b_in + (stages - 1) * (f_bb + b_bb)
    bound += sum(exits[:-1]) * (f_ee + b_ee) + microbatches * slowest
    found = simulate(one_f_one_b(stages, microbatches), Costs(tuple(costs)), deferred=deferred)
    assert found.makespan <= bound + 1e-9


def with_middle_exits(deferred):
    head = (PieceCost(0.25, 0.5),)
    costs = Costs(
        (StageCost(1, 2), StageCost(1, 2, head), StageCost(1, 2, head), StageCost(1, 2, head))
    )
    return simulate(one_f_one_b(4, 8), costs, deferred=deferred).makespan


def test_deferred_exits_run_while_a_rank_waits_for_its_gradient():
    """Two middle exits that cost as much as the final exit take no time if they are deferred."""
    head = StageCost(1, 2, (PieceCost(0.25, 0.5),))
    plain = Costs((*uniform(3).stages, head))
    without = simulate(one_f_one_b(4, 8), plain).makespan
    assert with_middle_exits(deferred=True) == without
    assert with_middle_exits(deferred=False) > without


@given(sizes, seconds, seconds, seconds)
def test_messages_take_time_in_both_directions(stages, forward, backward, communication):
    costs = uniform(stages, forward, backward, communication=communication)
    found = simulate(one_f_one_b(stages, 1), costs)
    assert found.makespan == stages * (forward + backward) + 2 * (stages - 1) * communication


def test_stages_on_one_rank_exchange_no_messages():
    order = ["0F0", "1F0", "1B0", "0B0"]
    plan = Plan((tuple(map(Action.parse, order)),), (0, 0), (Visit(2, 0),))
    assert simulate(plan, uniform(2, communication=100.0)).makespan == 6.0


def test_forward_only_computes_exits_at_once_and_keeps_nothing():
    costs = Costs((StageCost(1, 2, (PieceCost(1, 5), PieceCost(1, 5))), StageCost(1, 2)))
    for deferred in (True, False):
        found = simulate(forward_only(2, 3), costs, deferred=deferred)
        assert found.makespan == 3 * 3 + 1
        assert found.peak_activations == (1, 1)
        assert found.peak_exit_logits == (1, 0)


def test_short_visit_counts_on_its_stages():
    ranks = [["0F0", "0F1", "0B1", "0B0"], ["1F0", "1B0"]]
    plan = Plan(
        tuple(tuple(map(Action.parse, line)) for line in ranks), (0, 1), (Visit(2, 0), Visit(1, 0))
    )
    found = simulate(plan, uniform(2))
    assert found.peak_activations == (2, 1)
    assert [span.start for span in found.timeline.ranks[0]] == [0, 1, 2, 4]
    assert all(span.action.op in (Op.FORWARD, Op.BACKWARD) for span in found.timeline.ranks[1])


@pytest.mark.parametrize("bad", [-1.0, math.inf, math.nan])
def test_impossible_costs_are_errors(bad):
    with pytest.raises(ValueError, match="a cost of stage 1 ="):
        Costs((StageCost(1, 1), StageCost(1, bad)))
    with pytest.raises(ValueError, match="a cost of stage 0 ="):
        Costs((StageCost(1, 1, (PieceCost(bad, 1),)),))
    with pytest.raises(ValueError, match="communication ="):
        Costs((StageCost(1, 1),), communication=bad)
    with pytest.raises(ValueError, match="costs have 2 stages, but the plan has 3"):
        simulate(one_f_one_b(3, 1), uniform(2))
