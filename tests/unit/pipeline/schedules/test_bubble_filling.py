"""1F1B with filled bubbles: its grid, its time and memory, and errors."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ee_llm.pipeline import Costs, PieceCost, StageCost, Visit, grid, lower, simulate
from ee_llm.pipeline.schedules.bubble_filling import (
    cooldown_visits,
    filled_1f1b,
    max_fills,
    max_useful_warmup_fills,
    warmup_visits,
)


def filled(stages, microbatches, warmup, cooldown, ratio=0.5, exit_stages=None):
    exits = range(stages) if exit_stages is None else exit_stages
    return filled_1f1b(
        stages,
        microbatches,
        warmup_visits(stages, warmup, ratio, exits),
        cooldown_visits(stages, cooldown, ratio),
    )


def test_four_stages_with_both_bubbles_filled():
    plan = filled(4, 4, 2, 2)
    assert plan.visits[4:] == (Visit(2, 0), Visit(1, 0), Visit(4, 2), Visit(4, 3))
    assert grid(plan).split("\n") == [
        "rank 0  0F0 0F1 0F2 0F3 0F4 0F5 0B5---- 0B4---- 0B0---- 0F6 0B1---- 0F7 0B2---- .   "
        "0B3----",
        "rank 1  .   1F0 1F1 1F2 .   1F4 1B4---- 1B0---- 1F3 1B1---- 1F6 1B2---- 1F7 1B3---- .   .",
        "rank 2  .   .   2F0 2F1 .   .   2B0---- 2F2 2B1---- 2F3 2B2---- 2F6 2B3---- 2F7 2B6---- .",
        "rank 3  .   .   .   3F0 3B0---- 3F1 3B1---- 3F2 3B2---- 3F3 3B3---- 3F6 3B6---- 3F7 "
        "3B7----",
    ]


@pytest.mark.parametrize(
    ("stages", "expected"), [(1, []), (2, []), (4, [2, 1]), (8, [6, 5, 3, 2]), (16, 10)]
)
def test_the_papers_numbers_at_two_backward_per_forward(stages, expected):
    fills = max_fills(stages, 0.5)
    if isinstance(expected, int):
        assert fills == expected
    else:
        visits = cooldown_visits(stages, fills, 0.5)
        assert [stages - visit.first_backward for visit in visits] == expected
        assert [v.depth for v in warmup_visits(stages, fills, 0.5, range(stages))] == list(
            range(fills, 0, -1)
        )


ratios = st.sampled_from([0.25, 1 / 3, 0.5, 0.8, 1.0, 1.7])


@given(st.integers(1, 7), st.integers(1, 19), ratios, st.data())
def test_filling_is_sound_and_free(stages, microbatches, ratio, data):
    """The largest number of fills takes no additional time, regardless of the exits."""
    exits = data.draw(st.sets(st.integers(0, stages - 1)))
    warmup = data.draw(st.integers(0, max_useful_warmup_fills(stages, ratio, exits)))
    cooldown = data.draw(st.integers(0, max_fills(stages, ratio)))
    plan = filled(stages, microbatches, warmup, cooldown, ratio, exits)
    for visit in plan.visits[microbatches:][:warmup]:
        assert visit.depth - 1 in exits
    assert lower(plan).without_communication() == plan
    found = simulate(plan, Costs((StageCost(ratio, 1.0),) * stages))
    assert found.makespan == pytest.approx((microbatches + stages - 1) * (ratio + 1), rel=1e-12)


@given(st.integers(2, 6), st.integers(1, 8), st.data())
def test_every_number_of_microbatches_is_sound_and_its_memory_bounded(stages, microbatches, data):
    fills = st.integers(0, max_fills(stages, 0.5))
    warmup, cooldown = data.draw(fills), data.draw(fills)
    plan = filled(stages, microbatches, warmup, cooldown)
    lower(plan)
    found = simulate(plan, Costs((StageCost(1, 2),) * stages))
    for stage, peak in enumerate(found.peak_activations):
        here = max(0, min(warmup, max_fills(stages, 0.5) - stage))
        assert peak <= min(stages - stage, microbatches + cooldown) + here


@given(st.integers(2, 8), ratios)
def test_one_fill_more_would_cost_time(stages, ratio):
    """K is the largest useful number: with K + 1 fills the step ends later."""
    limit = max_fills(stages, ratio)
    assume((stages - 1) / (ratio + 1) < limit + 0.99)  # excludes rounding
    visits = [Visit(limit + 1 - i, 0) for i in range(limit + 1)]
    assume(limit + 1 <= stages)
    plan = filled_1f1b(stages, 2 * stages, visits, ())
    found = simulate(plan, Costs((StageCost(ratio, 1.0),) * stages))
    assert found.makespan > (3 * stages - 1) * (ratio + 1) + 1e-9


def test_warmup_fills_stop_at_the_last_stage_with_an_exit():
    visits = warmup_visits(8, 4, 0.5, [0, 1, 7])
    assert [visit.depth for visit in visits] == [2, 2, 2, 1]
    head = (PieceCost(0.3, 0.6),)
    costs = Costs(tuple(StageCost(1, 2, head if s in (0, 1, 7) else ()) for s in range(8)))
    plan = filled_1f1b(8, 8, visits, ())
    lower(plan)
    # Two stages with exits delay the microbatches on them; other stages are not affected.
    bare = Costs((StageCost(1, 2),) * 8)
    assert simulate(plan, bare).makespan == 3 * (8 + 7)
    assert simulate(plan, costs).makespan <= 3 * (8 + 7) + 2 * 0.9 + 4 * 0.9 + 8 * 0.9


def test_fewer_warmup_fills_are_as_deep_as_the_bubble_allows():
    assert [visit.depth for visit in warmup_visits(8, 2, 0.5, range(8))] == [4, 3]
    assert [visit.depth for visit in warmup_visits(4, 1, 0.5, [1])] == [2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: warmup_visits(4, 3, 0.5, [0]),
            "is 2, not 3: the bubble of 4 stages at .* 0.5 fits 2",
        ),
        (
            lambda: cooldown_visits(4, 3, 0.5),
            "is 2, not 3: the bubble of 4 stages at .* 0.5 fits 2",
        ),
        (lambda: cooldown_visits(4, -1, 0.5), "number is 2, not -1: the bubble"),
        (lambda: warmup_visits(4, 2, 0.5, []), "is 0, not 2: .* fits 2.* there is none"),
        (
            lambda: warmup_visits(8, 4, 0.5, [2]),
            "is 2, not 4: .* on the first 4 or fewer stages, .* exit: the first is on stage 2",
        ),
        (lambda: max_fills(4, 0.0), "forward_over_backward = 0.0"),
        (lambda: max_fills(4, float("nan")), "forward_over_backward = nan"),
    ],
)
def test_impossible_fills_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
