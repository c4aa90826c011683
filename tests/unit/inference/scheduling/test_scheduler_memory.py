"""Who has room: slots, blocks, preemption, and what others may use of the cache."""

import pytest

from ee_llm.inference.strategies import SelfSpeculation
from tests.unit.inference.sequences import (
    answer,
    finish,
    make_scheduler,
    make_sequence,
    next_plan,
    steps,
    token_at,
)

PROMPT = tuple(range(10, 20))


def test_sequences_are_admitted_in_their_order_as_slots_allow() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    few, *others = [make_sequence(id, max_new_tokens=n) for id, n in (("a", 2), ("b", 9), ("c", 9))]
    for sequence in (few, *others):
        scheduler.add(sequence)
    answer(scheduler, next_plan(scheduler))
    assert scheduler.running == [few, others[0]]
    assert answer(scheduler, next_plan(scheduler)) == [few]
    answer(scheduler, next_plan(scheduler))
    assert scheduler.running == others
    assert others[1].slot == 0, "the slot that became free"


@pytest.mark.parametrize(("num_blocks", "is_admitted"), [(6, False), (7, True)])
def test_one_block_stays_for_each_that_runs_when_another_comes(
    num_blocks: int, is_admitted: bool
) -> None:
    """Who comes would otherwise take the block that the next token of who runs needs."""
    scheduler = make_scheduler(num_blocks=num_blocks)
    first = make_sequence("a", 8, strategy="full", max_new_tokens=2)
    second = make_sequence("b", prompt=PROMPT, max_new_tokens=2)
    scheduler.add(first)
    answer(scheduler, next_plan(scheduler))
    scheduler.add(second)  # its prompt needs three blocks
    answer(scheduler, next_plan(scheduler))
    assert (second in scheduler.running) == is_admitted
    assert first.finish_reason == "length"
    finish(scheduler)
    assert len(second.new_tokens) == 2
    assert scheduler.num_preemptions == 0


def test_blocks_are_given_as_rows_come_and_told_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(num_prompt=7, strategy="full", max_new_tokens=7))
    told = [
        [entry[:2] for entry in scheduler_output.new_blocks]
        for scheduler_output in finish(scheduler)
    ]
    # Of 7 rows, of the ninth and of the thirteenth.
    assert told == [[(0, 0), (0, 1)], [], [(0, 2)], [], [], [], [(0, 3)]]
    assert scheduler.blocks.num_available == 32


def test_without_blocks_the_last_to_come_starts_anew_before_all_that_wait() -> None:
    """It keeps what was decided; its tokens run again as a prompt would."""
    scheduler = make_scheduler(num_blocks=5, max_num_seqs=2)
    first, last = (make_sequence(id, 4, max_new_tokens=9) for id in "ab")
    waiting = make_sequence("c", 4)
    for sequence in (first, last, waiting):
        scheduler.add(sequence)
    while not scheduler.num_preemptions:
        answer(scheduler, next_plan(scheduler))
    assert scheduler.running == [first]
    assert list(scheduler.waiting) == [last, waiting]
    assert last.exits == [1] * 5
    assert last.new_tokens == [token_at(position) for position in range(4, 9)]
    assert (last.slot, last.blocks, last.watermarks) == (-1, [], [0, 0, 0])
    finish(scheduler)
    assert last.new_tokens == [token_at(position) for position in range(4, 13)]
    assert scheduler.blocks.num_available == 4


def test_who_starts_anew_tells_all_its_blocks_again() -> None:
    scheduler, one = make_scheduler(), make_sequence(num_prompt=7)
    scheduler.add(one)
    answer(scheduler, next_plan(scheduler))
    scheduler.preempt(one)
    assert [entry[:2] for entry in next_plan(scheduler).new_blocks] == [(0, 0), (0, 1)]


def test_who_starts_anew_does_not_ask_the_exits_that_it_declined() -> None:
    """Asked again, an exit might say otherwise in low precision: each token is decided once."""
    scheduler, one = make_scheduler(), make_sequence()
    scheduler.add(one)
    answer(scheduler, next_plan(scheduler), leaving=[])
    scheduler.preempt(one)
    assert [segment for segment, _ in steps(next_plan(scheduler))] == [0, 1]


def test_who_starts_anew_drops_its_drafts() -> None:
    scheduler = make_scheduler()
    one = make_sequence(strategy="self-speculative", draft=SelfSpeculation(1, 3))
    scheduler.add(one)
    for _ in range(2):
        answer(scheduler, next_plan(scheduler))
    assert len(one.tokens) == 5
    scheduler.preempt(one)
    assert (len(one.tokens), one.num_confirmed) == (3, 3)
    finish(scheduler)
    assert one.new_tokens == [token_at(position) for position in range(3, 11)]


def test_what_could_never_fit_is_refused() -> None:
    scheduler = make_scheduler(num_blocks=5, max_pending=8)
    with pytest.raises(ValueError, match=r"'a' may grow to 17 positions, 5 blocks .* has 4; ask"):
        scheduler.add(make_sequence(num_prompt=10, max_new_tokens=8))
    draft = SelfSpeculation(1, length=8)
    with pytest.raises(ValueError, match="draft length 8 does not fit max_pending = 8"):
        scheduler.add(make_sequence(strategy="self-speculative", draft=draft))
    assert not scheduler.has_work
    scheduler.add(make_sequence(num_prompt=9, max_new_tokens=8))
    scheduler.add(
        make_sequence("b", strategy="self-speculative", draft=SelfSpeculation(1, length=7))
    )
    finish(scheduler)
    assert scheduler.num_preemptions > 0


def test_who_is_removed_leaves_nothing_waiting_or_running() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = make_sequence("a"), make_sequence("b")
    scheduler.add(running)
    scheduler.add(waiting)
    answer(scheduler, next_plan(scheduler))
    scheduler.remove(waiting)
    assert not scheduler.waiting
    scheduler.remove(running)
    scheduler.check_integrity()
    assert not scheduler.has_work
    assert scheduler.blocks.num_available == 32
    assert scheduler.schedule() is None


def test_blocks_are_known_to_others_once_all_segments_are_through_with_them() -> None:
    """Its keys and values lack the deeper layers before."""
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", prompt=PROMPT))
    answer(scheduler, next_plan(scheduler))  # the first 8 of the prompt, through all segments
    answer(scheduler, next_plan(scheduler))
    for leaving in ([0], [0], []):
        early = make_sequence("early", prompt=(*PROMPT, *map(token_at, range(10, 13))))
        scheduler.add(early)
        scheduler._admit()
        assert early.num_cached == 8
        scheduler.remove(early)
        answer(scheduler, next_plan(scheduler), leaving)
    for _ in range(2):
        answer(scheduler, next_plan(scheduler), leaving=[])
    late = make_sequence("late", prompt=(*PROMPT, *map(token_at, range(10, 13))))
    scheduler.add(late)
    scheduler._admit()
    assert late.num_cached == 12
    assert late.watermarks == [12, 12, 12]


def test_the_last_row_of_a_prompt_always_runs() -> None:
    """Somebody has to decide the first new token, whatever the cache holds."""
    scheduler = make_scheduler()
    for num_prompt, num_cached in ((8, 0), (8, 4), (9, 8), (9, 8)):
        one = make_sequence(num_prompt=num_prompt, strategy="full", max_new_tokens=1)
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


def test_propagate_shares_its_prompt_and_not_what_it_froze() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence("a", prompt=PROMPT, strategy="propagate", max_new_tokens=12))
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
        answer(scheduler, next_plan(scheduler), wrong=[5])
    assert (one.num_drafted, one.watermarks) == (5, [7, 0, 0])
    answer(scheduler, next_plan(scheduler))
    # The deep pass took eight rows; the last whose token stands is row 4.
    assert one.tokens == [0, 1, 2, *map(token_at, range(3, 6))]
    assert one.num_published == 1
    drafted = make_sequence("b", prompt=(0, 1, 2, *map(token_at, (3, 4)), 106, *range(9)))
    scheduler.add(drafted)
    scheduler._admit()
    assert drafted.num_cached == 4


def test_the_check_sees_watermarks_and_rows_that_can_not_be() -> None:
    scheduler, one = make_scheduler(), make_sequence()
    scheduler.add(one)
    answer(scheduler, next_plan(scheduler))
    for marks, message in (
        ([3, 0, 1], "out of order"),
        ([5, 3, 3], "out of order"),
        ([3, 3, -6], "too many rows pend"),
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
def test_who_was_pushed_out_comes_back_when_there_is_room_for_all_it_has(strategy: str) -> None:
    """Else it would be pushed out again and again before it is where it was."""
    scheduler = make_scheduler(num_blocks=26, max_pending=8, max_num_batched_tokens=64)
    for name in "abc":
        thresholds = (None, None)
        scheduler.add(make_sequence(name, 16, thresholds, strategy, max_new_tokens=48))
    rows = sum(scheduler_output.steps[-1].num_rows for scheduler_output in finish(scheduler))
    assert scheduler.num_preemptions >= 1
    assert rows < 2 * 3 * 63


@pytest.mark.parametrize("max_num_batched_tokens", [1, 2])
def test_where_not_all_rows_fit_they_run_in_turn(max_num_batched_tokens: int) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=max_num_batched_tokens)
    for name in "abcd":
        scheduler.add(make_sequence(name, 1, (None, None), "full", max_new_tokens=4))
    counts: list[list[int]] = []
    while scheduler.has_work:
        answer(scheduler, next_plan(scheduler))
        counts.append([len(one.new_tokens) for one in scheduler.running])
    assert all(max(row) - min(row) <= 1 for row in counts if row)


def test_the_oldest_of_the_held_goes_deeper_first() -> None:
    """Two of four fit; the two that have waited longest go, wherever they stand in the batch."""
    scheduler = make_scheduler(max_num_batched_tokens=2, max_deferred_steps=3)
    scheduler.deferral_targets = [1, 9, 9]
    for name in "abcd":
        scheduler.add(make_sequence(name, 1, (0.5, None), max_new_tokens=6))
    longest = 0
    while scheduler.has_work:
        answer(scheduler, next_plan(scheduler), leaving=())
        held = [one for one in scheduler.running if one.watermarks[0] > one.watermarks[1]]
        longest = max([longest, *(scheduler.step - one.waiting_since for one in held)])
    assert longest <= 3 + 1  # max_deferred_steps, and a pass for those that did not fit


def test_to_begin_anew_keeps_tokens_and_forgets_the_cache() -> None:
    scheduler = make_scheduler()
    sequences = [make_sequence(name, 9, strategy="full") for name in "ab"]
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(3):
        answer(scheduler, next_plan(scheduler))
    decided = [list(one.new_tokens) for one in sequences]
    scheduler.begin_anew()
    scheduler.check_integrity()
    assert list(scheduler.waiting) == sequences
    assert scheduler.blocks.num_available == 32
    first = next_plan(scheduler)
    assert {token_range.start for token_range in first.steps[0].ranges} == {0}, (
        "nothing is found in the cache"
    )
    assert [list(one.new_tokens) for one in sequences] == decided
    answer(scheduler, first)
    finish(scheduler)
    assert [len(one.new_tokens) for one in sequences] == [8, 8]
