"""Allocate the blocks of the K/V cache and share those of common prefixes; no torch."""

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ee_llm.errors import RequestError

Key = bytes


class BlockManager:
    """Allocates the blocks of a paged K/V cache: `block_size` positions each, in all layers.

    Block 0 is never allocated: padding reads and writes there. A block with a key keeps its content
    after its last owner frees it, until the block is needed (least recently used first).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise RequestError(
                f"num_blocks = {num_blocks}, block_size = {block_size}: a cache needs at least 2"
                " blocks (one is for padding) of at least 1 position."
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_owners = [0] * num_blocks
        self.clear()

    def clear(self) -> None:
        """Discard all content; no block may have an owner."""
        assert not any(self._num_owners), "a block has an owner"
        self._free = list(
            range(1, self.num_blocks)
        )  # a heap, since adjacent blocks are read faster
        self._idle: OrderedDict[int, None] = OrderedDict()  # with a key but no owner, oldest first
        self._by_key: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._tainted: set[int] = set()
        self._to_zero: list[int] = []

    @property
    def num_available(self) -> int:
        """Number of blocks that can be allocated now."""
        return len(self._free) + len(self._idle)

    def num_needed(self, num_positions: int) -> int:
        """Return the number of blocks for `num_positions` positions."""
        return -(-num_positions // self.block_size)

    def allocate(self) -> int:
        """Return a block for new content; `num_available` must not be 0."""
        if self._free:
            block = heapq.heappop(self._free)
        else:
            block, _ = self._idle.popitem(last=False)
            del self._by_key[self._key_of.pop(block)]
        self._num_owners[block] = 1
        if block in self._tainted:
            self._tainted.remove(block)
            self._to_zero.append(block)
        return block

    def taint(self, blocks: Iterable[int]) -> None:
        """Mark blocks that may hold NaN or infinity; their current owners keep them.

        Attention multiplies masked values by 0, which keeps NaN. So these blocks lose their keys,
        and they must be zeroed before they get new content.
        """
        for block in blocks:
            self._tainted.add(block)
            if block in self._key_of:
                del self._by_key[self._key_of.pop(block)]

    def drain_to_zero(self) -> tuple[int, ...]:
        """Return and reset the list of blocks to zero before the next pass writes to the cache."""
        blocks, self._to_zero = tuple(self._to_zero), []
        return blocks

    def share(self, keys: Iterable[Key]) -> list[int]:
        """Return the blocks of the longest known prefix of `keys`, each with one more owner."""
        blocks = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._idle.pop(block, None)
            self._num_owners[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: Key) -> None:
        """Share a full block, which must not change any more, under a key."""
        if key not in self._by_key and block not in self._key_of and block not in self._tainted:
            self._by_key[key] = block
            self._key_of[block] = key

    def free(self, blocks: Sequence[int]) -> None:
        """Remove one owner of each block."""
        for block in reversed(blocks):  # The end of a prefix is evicted before its beginning.
            self._num_owners[block] -= 1
            assert self._num_owners[block] >= 0, f"block {block} was freed twice"
            if self._num_owners[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    heapq.heappush(self._free, block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that every block is free, idle, or owned by exactly the tables that contain it."""
        num_owners = [0] * self.num_blocks
        for table in tables:
            for block in table:
                num_owners[block] += 1
        assert num_owners == self._num_owners, "the numbers of owners do not match the tables"
        unowned = [*self._free, *self._idle]
        owned = [block for block in range(1, self.num_blocks) if num_owners[block]]
        assert sorted([*unowned, *owned]) == list(range(1, self.num_blocks)), "a block is lost"
        assert num_owners[0] == 0, "the padding block was allocated"
        assert all(self._by_key[key] == block for block, key in self._key_of.items())


def prefix_key(parent: Key, tokens: Sequence[int]) -> Key:
    """Return the key of a block with `tokens` after the blocks whose last key is `parent`."""
    text = b",".join(b"%d" % token for token in tokens)
    return hashlib.sha256(parent + text).digest()
