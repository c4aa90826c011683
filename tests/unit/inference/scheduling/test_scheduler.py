"""Which rows run next: passes, watermarks, holding, riding along, budgets of rows."""

import pytest

from ee_llm.inference.scheduling.scheduler import SchedulerConfig
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.inference.sequences import (
    answer,
    finish,
    heads,
    make_scheduler,
    make_sequence,
    next_plan,
    steps,
    token_at,
)


def test_without_sequences_there_is_no_pass() -> None:
    scheduler = make_scheduler()
    assert scheduler.schedule() is None
    assert not scheduler.has_work


def test_a_sequence_without_exits_goes_through_all_segments_at_once() -> None:
    scheduler, one = make_scheduler(), make_sequence(strategy="full")
    scheduler.add(one)
    scheduler_output = next_plan(scheduler)
    assert steps(scheduler_output) == [(0, [(0, 0, 3)]), (1, [(0, 0, 3)]), (2, [(0, 0, 3)])]
    assert scheduler_output.tokens == (0, 1, 2)
    assert heads(scheduler_output) == [(0, 2, 3)], "the newest row alone is judged"
    answer(scheduler, scheduler_output)
    assert (one.new_tokens, one.exits, one.watermarks) == ([103], [4], [3, 3, 3])
    scheduler_output = next_plan(scheduler)
    assert steps(scheduler_output) == [(segment, [(0, 3, 4)]) for segment in range(3)]
    assert scheduler_output.tokens == (103,)


def test_rows_that_left_wait_at_the_exit_and_go_along_when_one_declines() -> None:
    scheduler, one = make_scheduler(), make_sequence()
    scheduler.add(one)
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        scheduler_output = next_plan(scheduler)
        assert steps(scheduler_output) == [(0, [(0, start, stop)])]
        assert heads(scheduler_output) == [(0, stop - 1, stop)]
        answer(scheduler, scheduler_output, leaving=[] if stop == 5 else [0])
    assert one.watermarks == [5, 0, 0]
    assert one.exits == [1, 1]
    scheduler_output = next_plan(scheduler)
    assert steps(scheduler_output) == [(1, [(0, 0, 5)])], "with all that pend at its boundary"
    assert scheduler_output.tokens == ()
    assert heads(scheduler_output) == [(0, 4, 5)]
    answer(scheduler, scheduler_output, leaving=[])
    scheduler_output = next_plan(scheduler)
    assert steps(scheduler_output) == [(2, [(0, 0, 5)])]
    answer(scheduler, scheduler_output)
    assert one.exits == [1, 1, 4]
    assert one.tokens[3:] == [token_at(3), token_at(4), token_at(5)]
    assert one.watermarks == [5, 5, 5]


def test_an_exit_that_is_off_is_not_asked() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(thresholds=(None, 0.5)))
    scheduler_output = next_plan(scheduler)
    assert [segment for segment, _ in steps(scheduler_output)] == [0, 1]
    assert heads(scheduler_output) == [(0, 2, 3)]


def test_a_pass_ends_where_one_of_its_sequences_is_judged() -> None:
    scheduler = make_scheduler()
    exact, full = make_sequence("exact"), make_sequence("full", strategy="full")
    scheduler.add(exact)
    scheduler.add(full)
    scheduler_output = next_plan(scheduler)
    assert steps(scheduler_output) == [(0, [(0, 0, 3), (1, 0, 3)])]
    assert heads(scheduler_output) == [(0, 2, 3)]
    answer(scheduler, scheduler_output)
    assert full.watermarks == [3, 0, 0]
    assert steps(next_plan(scheduler))[0] == (1, [(1, 0, 3)])


def test_a_prompt_goes_in_chunks_that_fit_the_rings_and_is_judged_at_its_end() -> None:
    scheduler = make_scheduler(max_pending=4)
    scheduler.add(make_sequence(num_prompt=10))
    for start, stop, last, judged in ((0, 4, 2, []), (4, 8, 2, []), (8, 10, 0, [(0, 9, 10)])):
        scheduler_output = next_plan(scheduler)
        assert steps(scheduler_output) == [
            (segment, [(0, start, stop)]) for segment in range(last + 1)
        ]
        assert heads(scheduler_output) == judged
        answer(scheduler, scheduler_output)


def test_new_tokens_go_before_prompts_within_the_budget_of_rows() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=5)
    for id, num in (("a", 7), ("b", 1)):
        scheduler.add(make_sequence(id, num, strategy="full"))
    scheduler_outputs = [next_plan(scheduler)]
    for _ in range(3):
        answer(scheduler, scheduler_outputs[-1])
        scheduler_outputs.append(next_plan(scheduler))
    rows = [steps(scheduler_output)[0][1] for scheduler_output in scheduler_outputs]
    # A prompt that the budget cuts short leaves its end for the next pass, behind who has begun.
    assert rows[:2] == [[(1, 0, 1), (0, 0, 4)], [(1, 1, 2), (0, 4, 7)]]
    assert rows[2:] == [[(0, 7, 8), (1, 2, 3)], [(0, 8, 9), (1, 3, 4)]]


def test_a_sequence_with_more_pending_rows_than_the_budget_goes_deeper_alone() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=3, max_pending=8)
    first, second = make_sequence("a"), make_sequence("b", num_prompt=2)
    scheduler.add(first)
    scheduler.deferral_targets = [1, 9, 9]
    for leaving in ([0], [0], []):
        answer(scheduler, next_plan(scheduler), leaving)
    scheduler.add(second)
    answer(scheduler, next_plan(scheduler), leaving=[])
    for slot, num_rows in ((0, 5), (1, 2)):
        scheduler_output = next_plan(scheduler)
        assert steps(scheduler_output) == [(1, [(slot, 0, num_rows)])]
        answer(scheduler, scheduler_output, leaving=[])


def test_pending_rows_that_fill_a_ring_go_on_before_anything_else() -> None:
    """No exit is forced by it: the newest token has not even begun."""
    scheduler, one = make_scheduler(max_pending=4), make_sequence()
    scheduler.deferral_targets = [1, 9, 9]
    scheduler.add(one)
    for _ in range(2):
        answer(scheduler, next_plan(scheduler), leaving=[0])
    scheduler.add(make_sequence("b"))
    assert one.num_pending == 4
    scheduler_output = next_plan(scheduler)
    assert steps(scheduler_output) == [(1, [(0, 0, 4)]), (2, [(0, 0, 4)])]
    assert heads(scheduler_output) == []
    answer(scheduler, scheduler_output)
    assert one.exits == [1, 1]
    assert steps(next_plan(scheduler)) == [(0, [(0, 4, 5), (1, 0, 3)])]


def test_rows_that_declined_are_held_until_enough_are() -> None:
    scheduler = make_scheduler(max_deferred_steps=99, max_pending=64)
    for id in "abc":
        scheduler.add(make_sequence(id, max_new_tokens=50))
    scheduler.deferral_targets = [1, 2, 1]
    answer(scheduler, next_plan(scheduler), leaving=[0, 2])
    for _ in range(3):
        scheduler_output = next_plan(scheduler)
        assert [slot for slot, _, _ in steps(scheduler_output)[0][1]] == [0, 2]
        answer(scheduler, scheduler_output, leaving=[0, 2])
    answer(scheduler, next_plan(scheduler), leaving=[0])
    assert steps(next_plan(scheduler)) == [(1, [(1, 0, 3), (2, 0, 7)])]


def test_rows_are_not_held_when_there_is_nothing_else_to_do() -> None:
    scheduler = make_scheduler(max_deferred_steps=99)
    scheduler.deferral_targets = [1, 99, 99]
    for id in "ab":
        scheduler.add(make_sequence(id))
    answer(scheduler, next_plan(scheduler), leaving=[])
    assert steps(next_plan(scheduler)) == [(1, [(0, 0, 3), (1, 0, 3)])]


@pytest.mark.parametrize("max_deferred_steps", [1, 2, 5])
def test_no_row_is_held_for_longer_than_allowed(max_deferred_steps: int) -> None:
    scheduler = make_scheduler(max_deferred_steps=max_deferred_steps, max_pending=64)
    scheduler.deferral_targets = [1, 99, 99]
    scheduler.add(make_sequence("held"))
    scheduler.add(make_sequence("busy", max_new_tokens=40))
    answer(scheduler, next_plan(scheduler), leaving=[1])
    for _ in range(max_deferred_steps):  # it may wait for others yet
        scheduler_output = next_plan(scheduler)
        assert [segment for segment, _ in steps(scheduler_output)] == [0]
        answer(scheduler, scheduler_output, leaving=[1])
    assert steps(next_plan(scheduler)) == [(1, [(0, 0, 3)])]


def test_pending_rows_of_others_ride_along_within_their_budget() -> None:
    scheduler = make_scheduler(max_piggyback_rows=8)
    for id, num in (("a", 3), ("b", 4), ("c", 4), ("d", 1)):
        scheduler.add(make_sequence(id, num))
    answer(scheduler, next_plan(scheduler), leaving=[1, 2, 3])
    # The one that declined has 3 rows: 4 more fit, then 1, but not 4 and 4.
    assert steps(next_plan(scheduler)) == [(1, [(0, 0, 3), (1, 0, 4), (3, 0, 1)])]


def test_frozen_rows_are_named_from_their_exit_on() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("exact"))
    scheduler.add(make_sequence("frozen", strategy="propagate"))
    # Of both, rows 2 and 3 leave at the first exit, row 4 at the second, row 5 at the final one.
    leaving = {0: [[0, 1], [0, 1], [], []], 1: [[0, 1], []], 2: [[]]}
    frozen = []
    while leaving[2]:
        scheduler_output = next_plan(scheduler)
        frozen.append((scheduler_output.last_segment, scheduler_output.steps[-1].frozen))
        answer(scheduler, scheduler_output, leaving[scheduler_output.last_segment].pop(0))
    # Five rows, then six, of the first sequence come before the rows of the one that freezes them.
    in_second, in_third = (5 + 2, 5 + 3), (6 + 2, 6 + 3, 6 + 4)
    assert frozen == [(0, ()), (0, ()), (0, ()), (1, in_second), (0, ()), (1, ()), (2, in_third)]


def test_drafts_are_judged_together_and_what_follows_a_wrong_one_is_dropped() -> None:
    scheduler = make_scheduler()
    one = make_sequence(strategy="self-speculative", draft=SelfSpeculation(boundary=2, length=3))
    scheduler.add(one)
    for stop in (3, 4, 5):
        scheduler_output = next_plan(scheduler)
        assert steps(scheduler_output)[-1] == (1, [(0, 0 if stop == 3 else stop - 1, stop)])
        assert heads(scheduler_output) == [(0, stop - 1, stop)]
        answer(scheduler, scheduler_output, wrong=[4])
    assert (one.num_confirmed, len(one.tokens), one.num_drafted) == (3, 6, 3)
    scheduler_output = next_plan(scheduler)
    assert steps(scheduler_output) == [(0, [(0, 5, 6)]), (1, [(0, 5, 6)]), (2, [(0, 0, 6)])]
    assert heads(scheduler_output) == [(0, 2, 6)]
    answer(scheduler, scheduler_output)
    assert one.new_tokens == [token_at(3), token_at(4)]
    assert one.tokens == [0, 1, 2, token_at(3), token_at(4)]
    assert one.watermarks == [4, 4, 4], "as far as the rows are those of confirmed tokens"
    assert (one.exits, one.num_accepted) == ([4, 4], 1)


@pytest.mark.parametrize(
    ("max_new_tokens", "num_drafted"), [(1, [0]), (2, [1]), (3, [2]), (9, [3, 3, 0])]
)
def test_no_draft_goes_beyond_the_last_token(max_new_tokens: int, num_drafted: list[int]) -> None:
    scheduler = make_scheduler()
    draft = SelfSpeculation(boundary=1, length=3)
    one = make_sequence(strategy="self-speculative", draft=draft, max_new_tokens=max_new_tokens)
    scheduler.add(one)
    judged = [
        heads(scheduler_output)[0]
        for scheduler_output in finish(scheduler)
        if scheduler_output.last_segment == 2
    ]
    assert [stop - start - 1 for _, start, stop in judged] == num_drafted
    assert len(one.new_tokens) == max_new_tokens
    assert one.num_drafted == one.num_accepted == sum(num_drafted)


def test_plans_are_a_function_of_what_was_asked() -> None:
    """Ranks that see the same messages must build the same batches."""

    def run() -> list[str]:
        scheduler = make_scheduler(
            num_blocks=14, max_num_batched_tokens=9, max_piggyback_rows=6, max_deferred_steps=3
        )
        scheduler.deferral_targets = [1, 2, 3]
        for index, strategy in enumerate(
            ("exact", "full", "self-speculative", "propagate", "exact")
        ):
            draft = SelfSpeculation(1, 2) if strategy == "self-speculative" else None
            scheduler.add(make_sequence(f"r{index}", 3 + index, strategy=strategy, draft=draft))
        return [repr(scheduler_output) for scheduler_output in finish(scheduler, leaving=[0, 2])]

    assert run() == run()


@pytest.mark.parametrize(
    "name", ["max_num_seqs", "max_pending", "max_num_batched_tokens", "max_deferred_steps"]
)
def test_limits_without_room_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 0 must be at least 1"):
        SchedulerConfig(**{name: 0})
