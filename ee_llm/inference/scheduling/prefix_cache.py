"""Prompts that begin alike share the blocks of what they have in common; no torch."""

from ee_llm.inference.request import Sequence
from ee_llm.inference.scheduling.block_manager import BlockManager, Key, prefix_key


def share_prefix(blocks: BlockManager, sequence: Sequence) -> list[int]:
    """Return the blocks that hold the beginning of a sequence already, now owned by it too.

    They end before its newest row, which has to run.
    """
    known = min(len(sequence.tokens) - 1, sequence.num_reusable)
    return blocks.share(_keys(blocks, sequence, known))


def publish_prefix(blocks: BlockManager, sequence: Sequence, num_rows: int) -> None:
    """Let others use the full blocks of the first `num_rows` rows, which are through all layers."""
    num_rows = min(num_rows, sequence.num_reusable)
    if num_rows // blocks.block_size > sequence.num_published:
        keys = _keys(blocks, sequence, num_rows)
        for index in range(sequence.num_published, len(keys)):
            blocks.publish(sequence.blocks[index], keys[index])
        sequence.num_published = len(keys)


def _keys(blocks: BlockManager, sequence: Sequence, num_positions: int) -> list[Key]:
    """Return the keys of the full blocks within the first `num_positions` positions."""
    size, request = blocks.block_size, sequence.request
    count = num_positions // size
    while len(sequence.keys) < count:
        # One tenant can not learn from a quick answer what another one asked.
        root = repr((request.tenant, request.policy.digest, request.strategy == "propagate"))
        parent = sequence.keys[-1] if sequence.keys else root.encode()
        start = len(sequence.keys) * size
        sequence.keys.append(prefix_key(parent, sequence.tokens[start : start + size]))
    return sequence.keys[:count]
