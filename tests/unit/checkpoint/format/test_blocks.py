"""Overlapping blocks of a tensor are found, in reasonable time."""

import random
import time

import pytest

from ee_llm.checkpoint.format import blocks


def grid_of_blocks(rows, columns):
    """Return the [2, 3] blocks of a tensor [2 rows, 3 columns] in random order."""
    corners = [(2 * i, 3 * j) for i in range(rows) for j in range(columns)]
    random.Random(0).shuffle(corners)
    return [blocks.Chunk(corner, (2, 3), "", 0, 0) for corner in corners]


@pytest.mark.thorough
@pytest.mark.parametrize(("rows", "columns"), [(20_000, 1), (1, 20_000), (150, 150)])
def test_many_blocks_are_compared_quickly(rows, columns):
    """The index of an untrusted file has any number of blocks; comparing all pairs is too slow."""
    chunks = grid_of_blocks(rows, columns)
    start = time.perf_counter()
    assert not blocks.any_overlap(chunks)
    assert time.perf_counter() - start < 20


def test_every_overlap_is_found():
    chunks = grid_of_blocks(6, 5)
    for moved in chunks:
        for step in [(1, 0), (0, 1), (1, 2), (-1, -1)]:
            beside = tuple(a + b for a, b in zip(moved.offsets, step, strict=True))
            others = [chunk for chunk in chunks if chunk is not moved]
            expected = any(blocks._overlap(moved._replace(offsets=beside), c) for c in others)
            assert blocks.any_overlap([*others, moved._replace(offsets=beside)]) == expected
    scalar = blocks.Chunk((), (), "", 0, 0)
    assert [blocks.any_overlap([scalar] * n) for n in range(3)] == [False, False, True]
