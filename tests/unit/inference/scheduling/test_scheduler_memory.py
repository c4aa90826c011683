"""Slots, blocks, preemption and prefix sharing."""

import pytest

from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.inference.sequences import (
    apply_results,
    finish,
    make_scheduler,
    make_sequence,
    next_pass,
    steps,
    token_at,
)

PROMPT = tuple(range(10, 20))


def test_sequences_are_admitted_in_order_as_slots_allow() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    short, *others = [make_sequence(id, max_tokens=n) for id, n in (("a", 2), ("b", 9), ("c", 9))]
    for sequence in (short, *others):
        scheduler.add(sequence)
    apply_results(scheduler, next_pass(scheduler))
    assert scheduler.running == [short, others[0]]
    assert apply_results(scheduler, next_pass(scheduler)) == [short]
    apply_results(scheduler, next_pass(scheduler))
    assert scheduler.running == others
    assert others[1].slot == 0, "the slot that became free"


@pytest.mark.parametrize(("num_blocks", "is_admitted"), [(6, False), (7, True)])
def test_admission_reserves_one_block_per_running_sequence(
    num_blocks: int, is_admitted: bool
) -> None:
    """Otherwise a new sequence could take the block that a running one needs for its next token."""
    scheduler = make_scheduler(num_blocks=num_blocks)
    first = make_sequence("a", 8, strategy="full", max_tokens=2)
    second = make_sequence("b", prompt=PROMPT, max_tokens=2)
    scheduler.add(first)
    apply_results(scheduler, next_pass(scheduler))
    scheduler.add(second)  # its prompt needs three blocks
    apply_results(scheduler, next_pass(scheduler))
    assert (second in scheduler.running) == is_admitted
    assert first.finish_reason == "length"
    finish(scheduler)
    assert len(second.new_tokens) == 2
    assert scheduler.num_preemptions == 0


def test_blocks_are_allocated_on_demand_and_reported_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(num_prompt=7, strategy="full", max_tokens=7))
    reported = [
        [entry[:2] for entry in scheduler_output.new_blocks]
        for scheduler_output in finish(scheduler)
    ]
    # The blocks of 7 rows, of the ninth row and of the thirteenth row.
    assert reported == [[(0, 0), (0, 1)], [], [(0, 2)], [], [], [], [(0, 3)]]
    assert scheduler.blocks.num_available == 32


def test_without_blocks_the_newest_sequence_is_preempted_and_queued_first() -> None:
    """It keeps its tokens, which run again like a prompt."""
    scheduler = make_scheduler(num_blocks=5, max_num_seqs=2)
    first, last = (make_sequence(id, 4, max_tokens=9) for id in "ab")
    waiting = make_sequence("c", 4)
    for sequence in (first, last, waiting):
        scheduler.add(sequence)
    while not scheduler.num_preemptions:
        apply_results(scheduler, next_pass(scheduler))
    assert scheduler.running == [first]
    assert list(scheduler.waiting) == [last, waiting]
    assert last.exits == [1] * 5
    assert last.new_tokens == [token_at(position) for position in range(4, 9)]
    assert (last.slot, last.blocks, last.watermarks) == (-1, [], [0, 0, 0])
    finish(scheduler)
    assert last.new_tokens == [token_at(position) for position in range(4, 13)]
    assert scheduler.blocks.num_available == 4


def test_a_preempted_sequence_reports_all_its_blocks_again() -> None:
    scheduler, one = make_scheduler(), make_sequence(num_prompt=7)
    scheduler.add(one)
    apply_results(scheduler, next_pass(scheduler))
    scheduler.preempt(one)
    assert [entry[:2] for entry in next_pass(scheduler).new_blocks] == [(0, 0), (0, 1)]


def test_a_preempted_sequence_skips_the_exits_that_it_declined() -> None:
    """In low precision, a second evaluation could differ; each exit decides only once."""
    scheduler, one = make_scheduler(), make_sequence()
    scheduler.add(one)
    apply_results(scheduler, next_pass(scheduler), exiting=[])
    scheduler.preempt(one)
    assert [segment for segment, _ in steps(next_pass(scheduler))] == [0, 1]


def test_a_preempted_sequence_drops_its_drafts() -> None:
    scheduler = make_scheduler()
    one = make_sequence(strategy="self-speculative", draft=SelfSpeculation(1, 3))
    scheduler.add(one)
    for _ in range(2):
        apply_results(scheduler, next_pass(scheduler))
    assert len(one.tokens) == 5
    scheduler.preempt(one)
    assert (len(one.tokens), one.num_confirmed) == (3, 3)
    finish(scheduler)
    assert one.new_tokens == [token_at(position) for position in range(3, 11)]


def test_requests_that_can_never_fit_are_refused() -> None:
    scheduler = make_scheduler(num_blocks=5, max_pending=8)
    with pytest.raises(ValueError, match=r"'a' .*17 positions.* 5 blocks.* 4.*max_tokens = 8"):
        scheduler.add(make_sequence(num_prompt=10, max_tokens=8))
    draft = SelfSpeculation(1, draft_length=8)
    with pytest.raises(ValueError, match="draft_length = 8 .* max_pending = 8"):
        scheduler.add(make_sequence(strategy="self-speculative", draft=draft))
    assert not scheduler.has_work
    scheduler.add(make_sequence(num_prompt=9, max_tokens=8))
    scheduler.add(
        make_sequence("b", strategy="self-speculative", draft=SelfSpeculation(1, draft_length=7))
    )
    finish(scheduler)
    assert scheduler.num_preemptions > 0


def test_removed_sequences_neither_wait_nor_run() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_sequence("a"), make_sequence("b")
    scheduler.add(running)
    scheduler.add(waiting)
    apply_results(scheduler, next_pass(scheduler))
    scheduler.remove(waiting)
    assert not scheduler.waiting
    scheduler.remove(running)
    scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.blocks.num_available == 32
    assert scheduler.schedule() is None


def test_blocks_are_shared_once_all_segments_have_processed_them() -> None:
    """Before that, the keys and values of deeper layers are missing."""
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", prompt=PROMPT))
    apply_results(
        scheduler, next_pass(scheduler)
    )  # the first 8 rows of the prompt, through all segments
    apply_results(scheduler, next_pass(scheduler))
    for exiting in ([0], [0], []):
        early = make_sequence("early", prompt=(*PROMPT, *map(token_at, range(10, 13))))
        scheduler.add(early)
        scheduler._admit()
        assert early.num_cached == 8
        scheduler.remove(early)
        apply_results(scheduler, next_pass(scheduler), exiting)
    for _ in range(2):
        apply_results(scheduler, next_pass(scheduler), exiting=[])
    late = make_sequence("late", prompt=(*PROMPT, *map(token_at, range(10, 13))))
    scheduler.add(late)
    scheduler._admit()
    assert late.num_cached == 12
    assert late.watermarks == [12, 12, 12]


def test_the_last_row_of_a_prompt_always_runs() -> None:
    """It decides the first new token, even if the cache has the whole prompt."""
    scheduler = make_scheduler()
    for num_prompt, num_cached in ((8, 0), (8, 4), (9, 8), (9, 8)):
        one = make_sequence(num_prompt=num_prompt, strategy="full", max_tokens=1)
        scheduler.add(one)
        scheduler_outputs = finish(scheduler)
        assert one.num_cached == num_cached
        assert steps(scheduler_outputs[0])[0] == (0, [(0, num_cached, num_prompt)])


@pytest.mark.parametrize(
    ("other", "num_cached"),
    [
        ({}, 8),
        ({"strategy": "full"}, 8),
        ({"strategy": "self-speculative", "draft": SelfSpeculation(1, 2)}, 8),
        ({"tenant": "b"}, 0),
        ({"thresholds": (0.5, 0.25)}, 0),
        ({"strategy": "propagate"}, 0),
        ({"prompt": (*PROMPT[:4], 7, *PROMPT[5:])}, 4),
        ({"prompt": (7, *PROMPT[1:])}, 0),
    ],
)
def test_a_prefix_is_shared_within_one_tenant_and_policy(other: dict, num_cached: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", prompt=PROMPT, tenant="a"))
    finish(scheduler)
    second = make_sequence("b", **({"prompt": PROMPT, "tenant": "a"} | other))
    scheduler.add(second)
    finish(scheduler)
    assert second.num_cached == num_cached


def test_propagate_shares_its_prompt_but_not_frozen_rows() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", prompt=PROMPT, strategy="propagate", max_tokens=12))
    finish(scheduler)
    longer = (*PROMPT, *map(token_at, range(10, 22)))
    second = make_sequence("b", prompt=longer, strategy="propagate")
    scheduler.add(second)
    finish(scheduler)
    assert second.num_cached == 8


def test_drafts_are_not_shared_before_they_are_confirmed() -> None:
    scheduler = make_scheduler()
    one = make_sequence("a", 3, strategy="self-speculative", draft=SelfSpeculation(1, 5))
    scheduler.add(one)
    for _ in range(5):
        apply_results(scheduler, next_pass(scheduler), wrong=[5])
    assert (one.num_drafted, one.watermarks) == (5, [7, 0, 0])
    apply_results(scheduler, next_pass(scheduler))
    # The deep pass had eight rows; the last one with a confirmed token is row 4.
    assert one.tokens == [0, 1, 2, *map(token_at, range(3, 6))]
    assert one.num_published == 1
    drafted = make_sequence("b", prompt=(0, 1, 2, *map(token_at, (3, 4)), 106, *range(9)))
    scheduler.add(drafted)
    scheduler._admit()
    assert drafted.num_cached == 4


def test_the_integrity_check_finds_invalid_watermarks_and_rows() -> None:
    scheduler, one = make_scheduler(), make_sequence()
    scheduler.add(one)
    apply_results(scheduler, next_pass(scheduler))
    for marks, message in (
        ([3, 0, 1], "out of order"),
        ([5, 3, 3], "out of order"),
        ([3, 3, -6], "too many pending rows"),
    ):
        one.watermarks, kept = marks, one.watermarks
        with pytest.raises(AssertionError, match=message):
            scheduler.check_integrity()
        one.watermarks = kept
    one.tokens += [1] * 5
    one.watermarks = [5, 5, 5]
    with pytest.raises(AssertionError, match="rows without a block"):
        scheduler.check_integrity()


@pytest.mark.parametrize("strategy", ["full", "propagate"])
def test_a_preempted_sequence_returns_when_all_its_rows_fit(strategy: str) -> None:
    """Otherwise it would be preempted again and again before it has caught up."""
    scheduler = make_scheduler(num_blocks=26, max_pending=8, max_num_batched_tokens=64)
    for name in "abc":
        thresholds = (None, None)
        scheduler.add(make_sequence(name, 16, thresholds, strategy, max_tokens=48))
    rows = sum(scheduler_output.steps[-1].num_rows for scheduler_output in finish(scheduler))
    assert scheduler.num_preemptions >= 1
    assert rows < 2 * 3 * 63


@pytest.mark.parametrize("max_num_batched_tokens", [1, 2])
def test_rows_that_do_not_all_fit_take_turns(max_num_batched_tokens: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=max_num_batched_tokens)
    for name in "abcd":
        scheduler.add(make_sequence(name, 1, (None, None), "full", max_tokens=4))
    counts: list[list[int]] = []
    while scheduler.has_work:
        apply_results(scheduler, next_pass(scheduler))
        counts.append([len(one.new_tokens) for one in scheduler.running])
    assert all(max(row) - min(row) <= 1 for row in counts if row)


def test_the_oldest_deferred_rows_run_first() -> None:
    """Two of four fit: those that have waited longest, wherever they are in the batch."""
    scheduler = make_scheduler(max_num_batched_tokens=2, max_deferred_steps=3)
    scheduler.deferral_targets = [1, 9, 9]
    for name in "abcd":
        scheduler.add(make_sequence(name, 1, (0.5, None), max_tokens=6))
    longest = 0
    while scheduler.has_work:
        apply_results(scheduler, next_pass(scheduler), exiting=())
        deferred = [one for one in scheduler.running if one.watermarks[0] > one.watermarks[1]]
        longest = max([longest, *(scheduler.step - one.waiting_since for one in deferred)])
    assert longest <= 3 + 1  # max_deferred_steps, and a pass for those that did not fit


def test_reset_keeps_tokens_and_clears_the_cache() -> None:
    scheduler = make_scheduler()
    sequences = [make_sequence(name, 9, strategy="full") for name in "ab"]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(3):
        apply_results(scheduler, next_pass(scheduler))
    decided = [list(one.new_tokens) for one in sequences]
    scheduler.reset()
    scheduler.check_integrity()
    assert list(scheduler.waiting) == sequences
    assert scheduler.blocks.num_available == 32
    first = next_pass(scheduler)
    assert {token_range.start for token_range in first.steps[0].ranges} == {0}, (
        "nothing is found in the cache"
    )
    assert [list(one.new_tokens) for one in sequences] == decided
    apply_results(scheduler, first)
    finish(scheduler)
    assert [len(one.new_tokens) for one in sequences] == [8, 8]
