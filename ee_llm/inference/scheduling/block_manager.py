"""Blocks of the K/V cache: who has which, and which hold a prefix that others may use; no torch."""

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ee_llm.errors import RequestError

Key = bytes


class BlockManager:
    """Gives out the blocks of a paged K/V cache: `block_size` positions each, in all layers.

    Block 0 is never given: padding reads and writes there. A block whose content is known by a key
    stays after its last owner has gone, until its room is needed (least recently used first).
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise RequestError(
                f"{num_blocks} blocks of {block_size} positions: a cache needs two blocks (one is"
                " for padding) of one position at least"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_owners = [0] * num_blocks
        self.clear()

    def clear(self) -> None:
        """Forget all content; no block may have an owner."""
        assert not any(self._num_owners), "a block has an owner"
        self._free = list(range(1, self.num_blocks))  # a heap: neighbours are read faster
        self._idle: OrderedDict[int, None] = OrderedDict()  # keyed, without an owner; oldest first
        self._by_key: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._tainted: set[int] = set()
        self._to_zero: list[int] = []

    @property
    def num_available(self) -> int:
        """Return how many blocks could be given now."""
        return len(self._free) + len(self._idle)

    def num_needed(self, num_positions: int) -> int:
        """Return how many blocks hold `num_positions` positions."""
        return -(-num_positions // self.block_size)

    def take(self) -> int:
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
        """Note that blocks may hold NaN or infinity; their current owners still have them.

        Attention multiplies masked values with 0, which does not remove a NaN. So nobody finds
        these blocks by a key any more, and they are zeroed before they hold new content.
        """
        for block in blocks:
            self._tainted.add(block)
            if block in self._key_of:
                del self._by_key[self._key_of.pop(block)]

    def drain_to_zero(self) -> tuple[int, ...]:
        """Return the blocks to zero before the next pass writes to the cache, each time once."""
        blocks, self._to_zero = tuple(self._to_zero), []
        return blocks

    def share(self, keys: Iterable[Key]) -> list[int]:
        """Return the blocks of the longest known prefix of `keys`, now owned once more."""
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
        """Let others use a full block that never changes again, by its key."""
        if key not in self._by_key and block not in self._key_of and block not in self._tainted:
            self._by_key[key] = block
            self._key_of[block] = key

    def give_back(self, blocks: Sequence[int]) -> None:
        """Take back one ownership of each block."""
        for block in reversed(blocks):  # so that the end of a prefix goes before its beginning
            self._num_owners[block] -= 1
            assert self._num_owners[block] >= 0, f"block {block} was given back twice"
            if self._num_owners[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    heapq.heappush(self._free, block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert that every block is free, idle, or owned by just those whose table names it."""
        num_owners = [0] * self.num_blocks
        for table in tables:
            for block in table:
                num_owners[block] += 1
        assert num_owners == self._num_owners, "owners of blocks do not add up"
        resting = [*self._free, *self._idle]
        owned = [block for block in range(1, self.num_blocks) if num_owners[block]]
        assert sorted([*resting, *owned]) == list(range(1, self.num_blocks)), "a block is lost"
        assert num_owners[0] == 0, "the block for padding was given out"
        assert all(self._by_key[key] == block for block, key in self._key_of.items())


def prefix_key(parent: Key, tokens: Sequence[int]) -> Key:
    """Return the key of a block that holds `tokens` after the blocks that `parent` names."""
    text = b",".join(b"%d" % token for token in tokens)
    return hashlib.sha256(parent + text).digest()
