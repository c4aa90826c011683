"""Blocks of the cache are never lost or allocated twice, and prefixes are found by their keys."""

import random

import pytest

from ee_llm.inference.scheduling.block_manager import BlockManager, prefix_key


def _full_of(blocks: BlockManager, count: int, name: str) -> tuple[list[int], list[bytes]]:
    """Return `count` allocated and published blocks and their keys."""
    allocated = [blocks.allocate() for _ in range(count)]
    keys = [b"%s %d" % (name.encode(), index) for index in range(count)]
    for block, key in zip(allocated, keys, strict=True):
        blocks.publish(block, key)
    return allocated, keys


def test_every_block_but_the_padding_block_is_allocated_once() -> None:
    blocks = BlockManager(5, 4)
    allocated = [blocks.allocate() for _ in range(blocks.num_available)]
    assert sorted(allocated) == [1, 2, 3, 4]
    assert blocks.num_available == 0
    blocks.free(allocated[:2])
    assert blocks.num_available == 2
    assert {blocks.allocate(), blocks.allocate()} == set(allocated[:2])


@pytest.mark.parametrize(("num_positions", "needed"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_positions_need_whole_blocks(num_positions: int, needed: int) -> None:
    assert BlockManager(9, 4).num_needed(num_positions) == needed


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 4), (0, 4), (8, 0)])
def test_a_cache_that_is_too_small_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=rf"num_blocks = {num_blocks}, block_size = {block_size}:"):
        BlockManager(num_blocks, block_size)


def test_the_longest_known_prefix_is_shared_and_nothing_after_a_gap() -> None:
    blocks = BlockManager(9, 4)
    allocated, keys = _full_of(blocks, 3, "a")
    assert blocks.share([*keys, b"unknown"]) == allocated
    assert blocks.share([keys[0], b"unknown", keys[2]]) == allocated[:1]
    assert blocks.share([b"unknown", *keys]) == []
    blocks.check_integrity([allocated, allocated, allocated[:1]])


def test_a_shared_block_stays_until_its_last_owner_frees_it() -> None:
    blocks = BlockManager(3, 4)
    allocated, keys = _full_of(blocks, 2, "a")
    assert blocks.share(keys) == allocated
    blocks.free(allocated)
    assert blocks.num_available == 0
    blocks.free(allocated)
    assert blocks.num_available == 2


def test_a_block_without_owners_is_found_until_it_is_needed() -> None:
    blocks = BlockManager(4, 4)
    allocated, keys = _full_of(blocks, 3, "a")
    blocks.free(allocated)
    assert blocks.share(keys) == allocated, "the idle blocks have an owner again"
    blocks.free(allocated)
    assert blocks.allocate() == allocated[2]
    assert blocks.share(keys) == allocated[:2]


def test_blocks_are_allocated_in_order() -> None:
    """A sequence whose blocks are adjacent is read without gathering them."""
    blocks = BlockManager(9, 4)
    allocated = [blocks.allocate() for _ in range(8)]
    for block in (allocated[5], allocated[2], allocated[7], allocated[3]):
        blocks.free([block])
    assert [blocks.allocate() for _ in range(4)] == [
        allocated[2],
        allocated[3],
        allocated[5],
        allocated[7],
    ]


def test_blocks_without_keys_are_allocated_first() -> None:
    blocks = BlockManager(4, 4)
    known, keys = _full_of(blocks, 2, "a")
    unknown = blocks.allocate()
    blocks.free(known)
    blocks.free([unknown])
    assert blocks.allocate() == unknown
    assert blocks.share(keys) == known


def test_the_least_recently_used_prefix_is_evicted_first_from_its_end() -> None:
    blocks = BlockManager(5, 4)
    old, old_keys = _full_of(blocks, 2, "old")
    new, new_keys = _full_of(blocks, 2, "new")
    blocks.free(new)
    blocks.free(old)
    assert blocks.share(new_keys) == new, "sharing makes it the more recently used one"
    blocks.free(new)
    assert [blocks.allocate() for _ in range(4)] == [old[1], old[0], new[1], new[0]]
    assert blocks.share(old_keys) == blocks.share(new_keys) == []


def test_a_key_belongs_to_the_first_block_published_under_it() -> None:
    blocks = BlockManager(4, 4)
    first, second = blocks.allocate(), blocks.allocate()
    blocks.publish(first, b"same")
    blocks.publish(second, b"same")
    assert blocks.share([b"same"]) == [first]
    blocks.publish(first, b"another")
    assert blocks.share([b"another"]) == []
    blocks.free([first, first])
    blocks.free([second])
    blocks.check_integrity([])
    assert {blocks.allocate(), blocks.allocate()} == {second, 3}, "the second has no key"


def test_freeing_a_block_twice_is_an_error() -> None:
    blocks = BlockManager(4, 4)
    block = blocks.allocate()
    blocks.free([block])
    with pytest.raises(AssertionError, match=f"block {block} was freed twice"):
        blocks.free([block])


def test_the_integrity_check_finds_lost_blocks_and_wrong_tables() -> None:
    blocks = BlockManager(4, 4)
    allocated = [blocks.allocate(), blocks.allocate()]
    blocks.check_integrity([allocated])
    for tables in ([allocated[:1]], [allocated, allocated], [[0, *allocated]], []):
        with pytest.raises(AssertionError):
            blocks.check_integrity(tables)
    blocks._free.pop()
    with pytest.raises(AssertionError, match="a block is lost"):
        blocks.check_integrity([allocated])


def test_random_use_conserves_blocks_and_their_contents() -> None:
    """A key finds only the content that was published under it, despite evictions."""
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
                    table.append(blocks.allocate())
                    content[table[-1]] = key
                    if rng.random() < 0.8:
                        blocks.publish(table[-1], key)
                    else:
                        content[table[-1]] = b"%d, not published" % step
            tables.append(table)
        elif tables:
            blocks.free(tables.pop(rng.randrange(len(tables))))
        blocks.check_integrity(tables)
    assert num_found > 100


def test_a_key_depends_on_all_tokens_before_it() -> None:
    """Without separators between ids, different prompts would get the same key."""
    root = prefix_key(b"", [1, 12])
    others = [([1, 2], b""), ([11, 2], b""), ([112], b""), ([12, 1], b""), ([1, 12], b"x")]
    assert root == prefix_key(b"", (1, 12))
    assert len({root, *(prefix_key(parent, tokens) for tokens, parent in others)}) == 6
    assert prefix_key(root, [3]) != prefix_key(prefix_key(b"", [11, 2]), [3])
