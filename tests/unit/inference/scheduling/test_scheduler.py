"""Which rows run next: passes, watermarks, deferral, piggybacking and row budgets."""

import pytest

from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.inference.sequences import (
    apply_results,
    finish,
    logit_rows,
    make_scheduler,
    make_sequence,
    next_pass,
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
    scheduler_output = next_pass(scheduler)
    assert steps(scheduler_output) == [(0, [(0, 0, 3)]), (1, [(0, 0, 3)]), (2, [(0, 0, 3)])]
    assert scheduler_output.tokens == (0, 1, 2)
    assert logit_rows(scheduler_output) == [(0, 2, 3)], "the exit evaluates only the newest row"
    apply_results(scheduler, scheduler_output)
    assert (one.new_tokens, one.exits, one.watermarks) == ([103], [4], [3, 3, 3])
    scheduler_output = next_pass(scheduler)
    assert steps(scheduler_output) == [(segment, [(0, 3, 4)]) for segment in range(3)]
    assert scheduler_output.tokens == (103,)


def test_exited_rows_wait_and_go_deeper_with_a_row_that_declines() -> None:
    scheduler, one = make_scheduler(), make_sequence()
    scheduler.add(one)
    for start, stop in ((0, 3), (3, 4), (4, 5)):
        scheduler_output = next_pass(scheduler)
        assert steps(scheduler_output) == [(0, [(0, start, stop)])]
        assert logit_rows(scheduler_output) == [(0, stop - 1, stop)]
        apply_results(scheduler, scheduler_output, exiting=[] if stop == 5 else [0])
    assert one.watermarks == [5, 0, 0]
    assert one.exits == [1, 1]
    scheduler_output = next_pass(scheduler)
    assert steps(scheduler_output) == [(1, [(0, 0, 5)])], "with all rows pending at its boundary"
    assert scheduler_output.tokens == ()
    assert logit_rows(scheduler_output) == [(0, 4, 5)]
    apply_results(scheduler, scheduler_output, exiting=[])
    scheduler_output = next_pass(scheduler)
    assert steps(scheduler_output) == [(2, [(0, 0, 5)])]
    apply_results(scheduler, scheduler_output)
    assert one.exits == [1, 1, 4]
    assert one.tokens[3:] == [token_at(3), token_at(4), token_at(5)]
    assert one.watermarks == [5, 5, 5]


def test_an_exit_that_is_off_is_not_evaluated() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(thresholds=(None, 0.5)))
    scheduler_output = next_pass(scheduler)
    assert [segment for segment, _ in steps(scheduler_output)] == [0, 1]
    assert logit_rows(scheduler_output) == [(0, 2, 3)]


def test_a_pass_ends_where_an_exit_evaluates_one_of_its_sequences() -> None:
    scheduler = make_scheduler()
    exact, full = make_sequence("exact"), make_sequence("full", strategy="full")
    scheduler.add(exact)
    scheduler.add(full)
    scheduler_output = next_pass(scheduler)
    assert steps(scheduler_output) == [(0, [(0, 0, 3), (1, 0, 3)])]
    assert logit_rows(scheduler_output) == [(0, 2, 3)]
    apply_results(scheduler, scheduler_output)
    assert full.watermarks == [3, 0, 0]
    assert steps(next_pass(scheduler))[0] == (1, [(1, 0, 3)])


def test_a_prompt_runs_in_chunks_that_fit_the_rings() -> None:
    scheduler = make_scheduler(max_pending=4)
    scheduler.add(make_sequence(num_prompt=10))
    for start, stop, last, evaluated in ((0, 4, 2, []), (4, 8, 2, []), (8, 10, 0, [(0, 9, 10)])):
        scheduler_output = next_pass(scheduler)
        assert steps(scheduler_output) == [
            (segment, [(0, start, stop)]) for segment in range(last + 1)
        ]
        assert logit_rows(scheduler_output) == evaluated
        apply_results(scheduler, scheduler_output)


def test_new_tokens_go_before_prompts_within_the_budget_of_rows() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=5)
    for id, num in (("a", 7), ("b", 1)):
        scheduler.add(make_sequence(id, num, strategy="full"))
    scheduler_outputs = [next_pass(scheduler)]
    for _ in range(3):
        apply_results(scheduler, scheduler_outputs[-1])
        scheduler_outputs.append(next_pass(scheduler))
    rows = [steps(scheduler_output)[0][1] for scheduler_output in scheduler_outputs]
    # The budget cuts the prompt; its end runs in the next pass, after sequences that have begun.
    assert rows[:2] == [[(1, 0, 1), (0, 0, 4)], [(1, 1, 2), (0, 4, 7)]]
    assert rows[2:] == [[(0, 7, 8), (1, 2, 3)], [(0, 8, 9), (1, 3, 4)]]


def test_a_sequence_with_more_pending_rows_than_the_budget_runs_by_itself() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=3, max_pending=8)
    first, second = make_sequence("a"), make_sequence("b", num_prompt=2)
    scheduler.add(first)
    scheduler.deferral_targets = [1, 9, 9]
    for exiting in ([0], [0], []):
        apply_results(scheduler, next_pass(scheduler), exiting)
    scheduler.add(second)
    apply_results(scheduler, next_pass(scheduler), exiting=[])
    for slot, num_rows in ((0, 5), (1, 2)):
        scheduler_output = next_pass(scheduler)
        assert steps(scheduler_output) == [(1, [(slot, 0, num_rows)])]
        apply_results(scheduler, scheduler_output, exiting=[])


def test_pending_rows_that_fill_a_ring_run_first() -> None:
    """This forces no exit: the newest token has not started."""
    scheduler, one = make_scheduler(max_pending=4), make_sequence()
    scheduler.deferral_targets = [1, 9, 9]
    scheduler.add(one)
    for _ in range(2):
        apply_results(scheduler, next_pass(scheduler), exiting=[0])
    scheduler.add(make_sequence("b"))
    assert one.num_pending == 4
    scheduler_output = next_pass(scheduler)
    assert steps(scheduler_output) == [(1, [(0, 0, 4)]), (2, [(0, 0, 4)])]
    assert logit_rows(scheduler_output) == []
    apply_results(scheduler, scheduler_output)
    assert one.exits == [1, 1]
    assert steps(next_pass(scheduler)) == [(0, [(0, 4, 5), (1, 0, 3)])]


def test_rows_that_declined_are_deferred_until_enough_wait() -> None:
    scheduler = make_scheduler(max_deferred_steps=99, max_pending=64)
    for id in "abc":
        scheduler.add(make_sequence(id, max_tokens=50))
    scheduler.deferral_targets = [1, 2, 1]
    apply_results(scheduler, next_pass(scheduler), exiting=[0, 2])
    for _ in range(3):
        scheduler_output = next_pass(scheduler)
        assert [slot for slot, _, _ in steps(scheduler_output)[0][1]] == [0, 2]
        apply_results(scheduler, scheduler_output, exiting=[0, 2])
    apply_results(scheduler, next_pass(scheduler), exiting=[0])
    assert steps(next_pass(scheduler)) == [(1, [(1, 0, 3), (2, 0, 7)])]


def test_rows_are_not_deferred_without_other_work() -> None:
    scheduler = make_scheduler(max_deferred_steps=99)
    scheduler.deferral_targets = [1, 99, 99]
    for id in "ab":
        scheduler.add(make_sequence(id))
    apply_results(scheduler, next_pass(scheduler), exiting=[])
    assert steps(next_pass(scheduler)) == [(1, [(0, 0, 3), (1, 0, 3)])]


@pytest.mark.parametrize("max_deferred_steps", [1, 2, 5])
def test_no_row_waits_longer_than_max_deferred_steps(max_deferred_steps: int) -> None:
    scheduler = make_scheduler(max_deferred_steps=max_deferred_steps, max_pending=64)
    scheduler.deferral_targets = [1, 99, 99]
    scheduler.add(make_sequence("deferred"))
    scheduler.add(make_sequence("busy", max_tokens=40))
    apply_results(scheduler, next_pass(scheduler), exiting=[1])
    for _ in range(max_deferred_steps):  # It may still wait for others.
        scheduler_output = next_pass(scheduler)
        assert [segment for segment, _ in steps(scheduler_output)] == [0]
        apply_results(scheduler, scheduler_output, exiting=[1])
    assert steps(next_pass(scheduler)) == [(1, [(0, 0, 3)])]


def test_pending_rows_of_others_piggyback_within_their_budget() -> None:
    scheduler = make_scheduler(max_piggyback_rows=8)
    for id, num in (("a", 3), ("b", 4), ("c", 4), ("d", 1)):
        scheduler.add(make_sequence(id, num))
    apply_results(scheduler, next_pass(scheduler), exiting=[1, 2, 3])
    # The one that declined has 3 rows: 4 more fit, then 1, but not 4 and 4.
    assert steps(next_pass(scheduler)) == [(1, [(0, 0, 3), (1, 0, 4), (3, 0, 1)])]


def test_rows_are_frozen_from_their_exit_on() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("exact"))
    scheduler.add(make_sequence("frozen", strategy="propagate"))
    # In both, rows 2 and 3 exit at the first exit, row 4 at the second, row 5 at the final one.
    exiting = {0: [[0, 1], [0, 1], [], []], 1: [[0, 1], []], 2: [[]]}
    frozen = []
    while exiting[2]:
        scheduler_output = next_pass(scheduler)
        frozen.append((scheduler_output.last_segment, scheduler_output.steps[-1].frozen))
        apply_results(scheduler, scheduler_output, exiting[scheduler_output.last_segment].pop(0))
    # Five, then six, rows of the first sequence precede those of the sequence with frozen rows.
    in_second, in_third = (5 + 2, 5 + 3), (6 + 2, 6 + 3, 6 + 4)
    assert frozen == [(0, ()), (0, ()), (0, ()), (1, in_second), (0, ()), (1, ()), (2, in_third)]


def test_drafts_are_verified_together_and_dropped_after_a_wrong_one() -> None:
    scheduler = make_scheduler()
    one = make_sequence(
        strategy="self-speculative", draft=SelfSpeculation(draft_exit=2, draft_length=3)
    )
    scheduler.add(one)
    for stop in (3, 4, 5):
        scheduler_output = next_pass(scheduler)
        assert steps(scheduler_output)[-1] == (1, [(0, 0 if stop == 3 else stop - 1, stop)])
        assert logit_rows(scheduler_output) == [(0, stop - 1, stop)]
        apply_results(scheduler, scheduler_output, wrong=[4])
    assert (one.num_confirmed, len(one.tokens), one.num_drafted) == (3, 6, 3)
    scheduler_output = next_pass(scheduler)
    assert steps(scheduler_output) == [(0, [(0, 5, 6)]), (1, [(0, 5, 6)]), (2, [(0, 0, 6)])]
    assert logit_rows(scheduler_output) == [(0, 2, 6)]
    apply_results(scheduler, scheduler_output)
    assert one.new_tokens == [token_at(3), token_at(4)]
    assert one.tokens == [0, 1, 2, token_at(3), token_at(4)]
    assert one.watermarks == [4, 4, 4], "only rows of confirmed tokens count"
    assert (one.exits, one.num_accepted) == ([4, 4], 1)


@pytest.mark.parametrize(
    ("max_tokens", "num_drafted"), [(1, [0]), (2, [1]), (3, [2]), (9, [3, 3, 0])]
)
def test_no_draft_is_made_beyond_the_last_token(max_tokens: int, num_drafted: list[int]) -> None:
    scheduler = make_scheduler()
    draft = SelfSpeculation(draft_exit=1, draft_length=3)
    one = make_sequence(strategy="self-speculative", draft=draft, max_tokens=max_tokens)
    scheduler.add(one)
    evaluated = [
        logit_rows(scheduler_output)[0]
        for scheduler_output in finish(scheduler)
        if scheduler_output.last_segment == 2
    ]
    assert [stop - start - 1 for _, start, stop in evaluated] == num_drafted
    assert len(one.new_tokens) == max_tokens
    assert one.num_drafted == one.num_accepted == sum(num_drafted)


def test_passes_are_a_function_of_the_requests() -> None:
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
        return [repr(scheduler_output) for scheduler_output in finish(scheduler, exiting=[0, 2])]

    assert run() == run()


@pytest.mark.parametrize(
    "name", ["max_num_seqs", "max_pending", "max_num_batched_tokens", "max_deferred_steps"]
)
def test_limits_of_zero_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} = 0 must be at least 1"):
        SchedulerConfig(**{name: 0})
