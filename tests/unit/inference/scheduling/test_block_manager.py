"""Blocks of the cache: none is lost or given twice, and a prefix is found by its key alone."""

import random

import pytest

from ee_llm.inference.scheduling.block_manager import BlockManager, prefix_key


def _full_of(blocks: BlockManager, count: int, name: str) -> tuple[list[int], list[bytes]]:
    """Return `count` blocks that are taken and published, and their keys."""
    taken = [blocks.take() for _ in range(count)]
    keys = [b"%s %d" % (name.encode(), index) for index in range(count)]
    for block, key in zip(taken, keys, strict=True):
        blocks.publish(block, key)
    return taken, keys


def test_every_block_but_the_one_for_padding_is_given_once() -> None:
    blocks = BlockManager(5, 4)
    taken = [blocks.take() for _ in range(blocks.num_available)]
    assert sorted(taken) == [1, 2, 3, 4]
    assert blocks.num_available == 0
    blocks.give_back(taken[:2])
    assert blocks.num_available == 2
    assert {blocks.take(), blocks.take()} == set(taken[:2])


@pytest.mark.parametrize(("num_positions", "needed"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_positions_need_whole_blocks(num_positions: int, needed: int) -> None:
    assert BlockManager(9, 4).num_needed(num_positions) == needed


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 4), (0, 4), (8, 0)])
def test_a_cache_without_room_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=rf"{num_blocks} blocks of {block_size} positions"):
        BlockManager(num_blocks, block_size)


def test_the_longest_known_prefix_is_shared_and_nothing_after_a_gap() -> None:
    blocks = BlockManager(9, 4)
    taken, keys = _full_of(blocks, 3, "a")
    assert blocks.share([*keys, b"unknown"]) == taken
    assert blocks.share([keys[0], b"unknown", keys[2]]) == taken[:1]
    assert blocks.share([b"unknown", *keys]) == []
    blocks.check_integrity([taken, taken, taken[:1]])


def test_a_shared_block_stays_until_its_last_owner_has_gone() -> None:
    blocks = BlockManager(3, 4)
    taken, keys = _full_of(blocks, 2, "a")
    assert blocks.share(keys) == taken
    blocks.give_back(taken)
    assert blocks.num_available == 0
    blocks.give_back(taken)
    assert blocks.num_available == 2


def test_a_block_without_owners_is_found_until_its_room_is_needed() -> None:
    blocks = BlockManager(4, 4)
    taken, keys = _full_of(blocks, 3, "a")
    blocks.give_back(taken)
    assert blocks.share(keys) == taken, "they had rested, and are owned again"
    blocks.give_back(taken)
    assert blocks.take() == taken[2]
    assert blocks.share(keys) == taken[:2]


def test_neighbours_are_given_together() -> None:
    """A sequence whose blocks lie one after the other is read without gathering them."""
    blocks = BlockManager(9, 4)
    taken = [blocks.take() for _ in range(8)]
    for block in (taken[5], taken[2], taken[7], taken[3]):
        blocks.give_back([block])
    assert [blocks.take() for _ in range(4)] == [taken[2], taken[3], taken[5], taken[7]]


def test_unknown_blocks_are_given_before_known_ones() -> None:
    blocks = BlockManager(4, 4)
    known, keys = _full_of(blocks, 2, "a")
    unknown = blocks.take()
    blocks.give_back(known)
    blocks.give_back([unknown])
    assert blocks.take() == unknown
    assert blocks.share(keys) == known


def test_the_least_recently_used_prefix_goes_first_and_from_its_end() -> None:
    blocks = BlockManager(5, 4)
    old, old_keys = _full_of(blocks, 2, "old")
    new, new_keys = _full_of(blocks, 2, "new")
    blocks.give_back(new)
    blocks.give_back(old)
    assert blocks.share(new_keys) == new, "which makes it the newer one"
    blocks.give_back(new)
    assert [blocks.take() for _ in range(4)] == [old[1], old[0], new[1], new[0]]
    assert blocks.share(old_keys) == blocks.share(new_keys) == []


def test_a_key_names_the_first_block_that_had_it() -> None:
    blocks = BlockManager(4, 4)
    first, second = blocks.take(), blocks.take()
    blocks.publish(first, b"same")
    blocks.publish(second, b"same")
    assert blocks.share([b"same"]) == [first]
    blocks.publish(first, b"another")
    assert blocks.share([b"another"]) == []
    blocks.give_back([first, first])
    blocks.give_back([second])
    blocks.check_integrity([])
    assert {blocks.take(), blocks.take()} == {second, 3}, "the second was never known"


def test_a_block_given_back_twice_is_noticed() -> None:
    blocks = BlockManager(4, 4)
    block = blocks.take()
    blocks.give_back([block])
    with pytest.raises(AssertionError, match=f"block {block} was given back twice"):
        blocks.give_back([block])


def test_the_check_sees_what_is_lost_and_what_is_named_wrongly() -> None:
    blocks = BlockManager(4, 4)
    taken = [blocks.take(), blocks.take()]
    blocks.check_integrity([taken])
    for tables in ([taken[:1]], [taken, taken], [[0, *taken]], []):
        with pytest.raises(AssertionError):
            blocks.check_integrity(tables)
    blocks._free.pop()
    with pytest.raises(AssertionError, match="a block is lost"):
        blocks.check_integrity([taken])


def test_random_use_conserves_blocks_and_their_contents() -> None:
    """What a key finds is what was published under it, through any evictions."""
    rng = random.Random(0)
    blocks = BlockManager(12, 4)
    tables: list[list[int]] = []
    content: dict[int, bytes] = {}
    num_found = 0
    for step in range(2000):
        if blocks.num_available and rng.random() < 0.5:
            keys = [b"%d %d" % (rng.randrange(4), index) for index in range(rng.randint(1, 4))]
            table = blocks.share(keys)
            assert [content[block] for block in table] == keys[: len(table)]
            num_found += len(table)
            for key in keys[len(table) :]:
                if blocks.num_available:
                    table.append(blocks.take())
                    content[table[-1]] = key
                    if rng.random() < 0.8:
                        blocks.publish(table[-1], key)
                    else:
                        content[table[-1]] = b"%d, not told" % step
            tables.append(table)
        elif tables:
            blocks.give_back(tables.pop(rng.randrange(len(tables))))
        blocks.check_integrity(tables)
    assert num_found > 100


def test_a_key_tells_all_tokens_before_it() -> None:
    """Ids that run together would make one key of different prompts."""
    root = prefix_key(b"", [1, 12])
    others = [([1, 2], b""), ([11, 2], b""), ([112], b""), ([12, 1], b""), ([1, 12], b"x")]
    assert root == prefix_key(b"", (1, 12))
    assert len({root, *(prefix_key(parent, tokens) for tokens, parent in others)}) == 6
    assert prefix_key(root, [3]) != prefix_key(prefix_key(b"", [11, 2]), [3])
