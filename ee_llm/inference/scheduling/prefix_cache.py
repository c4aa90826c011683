"""Share the K/V blocks of common prompt prefixes between sequences."""

from ee_llm.inference.scheduling.block_manager import BlockManager, Key, prefix_key
from ee_llm.inference.sequence import Sequence


def share_prefix(blocks: BlockManager, sequence: Sequence) -> list[int]:
    """Return the cached blocks of the beginning of a sequence, which becomes one of their owners.

    They end before its newest row, which has to run.
    """
    num_rows = min(len(sequence.tokens) - 1, sequence.num_reusable)
    return blocks.share(_keys(blocks, sequence, num_rows))


def publish_prefix(blocks: BlockManager, sequence: Sequence, num_rows: int) -> None:
    """Publish the full blocks of the first `num_rows` rows, which all layers have processed."""
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
        # Prompts are not shared across tenants, since the response time would reveal one tenant's
        # prompts to another.
        root = repr((request.tenant, request.policy.digest, request.strategy == "propagate"))
        parent = sequence.keys[-1] if sequence.keys else root.encode()
        start = len(sequence.keys) * size
        sequence.keys.append(prefix_key(parent, sequence.tokens[start : start + size]))
    return sequence.keys[:count]
