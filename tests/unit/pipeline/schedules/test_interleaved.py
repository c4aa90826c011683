"""Interleaved 1F1B as a plan: its grid, its soundness, its bubble."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ee_llm.pipeline import Costs, Op, StageCost, grid, lower, one_f_one_b, simulate
from ee_llm.pipeline.schedules.interleaved import interleaved


def test_two_ranks_with_two_chunks_each():
    assert grid(interleaved(num_ranks=2, num_chunks=2, num_microbatches=4)).split("\n") == [
        "rank 0  0F0 0F1 2F0 2F1 0F2 .   2B0---- 0F3 2B1---- 2F2 0B0---- 2F3 0B1---- .   2B2---- "
        ".   2B3---- 0B2---- 0B3----",
        "rank 1  .   1F0 1F1 3F0 3B0---- 3F1 3B1---- 1F2 1B0---- 1F3 1B1---- 3F2 3B2---- 3F3 "
        "3B3---- 1B2---- 1B3---- .   .",
    ]


sizes = st.integers(1, 5)


@given(sizes, st.integers(1, 4), st.integers(1, 4))
def test_every_size_is_sound_and_has_the_known_bubble(ranks, chunks, groups):
    """Narayanan et al., section 2.2.2: a bubble of (P-1)(f+b) / V, where f and b are of a rank."""
    plan = interleaved(ranks, chunks, groups * ranks)
    lowered = lower(plan)
    assert lowered.without_communication() == plan
    found = simulate(plan, Costs((StageCost(1, 2),) * (ranks * chunks)))
    assert found.makespan == 3 * (groups * ranks * chunks + ranks - 1)


@given(sizes, st.integers(1, 4), st.integers(1, 4))
def test_live_microbatches_stay_within_megatrons_bound(ranks, chunks, groups):
    plan = interleaved(ranks, chunks, groups * ranks)
    for rank, actions in enumerate(plan.ranks):
        live = peak = 0
        for action in actions:
            live += 1 if action.op is Op.FORWARD else -1
            peak = max(peak, live)
        assert peak <= 2 * (ranks - 1 - rank) + (chunks - 1) * ranks + 1


@given(sizes, st.integers(1, 4))
def test_one_chunk_is_1f1b(ranks, groups):
    assert interleaved(ranks, 1, groups * ranks) == one_f_one_b(ranks, groups * ranks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2, 6), "6 microbatches .* multiple of 4"),
        ((4, 2, 2), "2 microbatches .* multiple of 4"),
        ((4, 2, 0), "0 microbatches .* multiple of 4"),
        ((0, 2, 4), "num_ranks = 0"),
        ((4, 0, 4), "num_chunks = 0"),
    ],
)
def test_impossible_sizes_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        interleaved(*arguments)
