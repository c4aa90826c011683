"""Limits of the schedulers and the size of the K/V cache."""

from dataclasses import dataclass

from ee_llm.errors import RequestError


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of the scheduler and the size of the K/V cache.

    Attributes:
        max_num_seqs: Sequences that run at once.
        num_blocks: Blocks of the K/V cache; one of them is for padding.
        block_size: Positions in a block.
        max_pending: Rows of one sequence that may wait at boundaries; also the longest prompt
            chunk.
        max_num_batched_tokens: Rows of one segment in a pass. Rows of a single sequence, and rows
            that the previous segment hands on, may exceed it.
        max_deferred_steps: Steps after which a row that did not exit runs, even if others wait. If
            more are due than max_num_batched_tokens allows, the oldest run first.
        max_piggyback_rows: Pending rows of other sequences join a deeper pass up to this number of
            rows.
    """

    max_num_seqs: int = 16
    num_blocks: int = 257
    block_size: int = 16
    max_pending: int = 64
    max_num_batched_tokens: int = 256
    max_deferred_steps: int = 8
    max_piggyback_rows: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_pending", "max_num_batched_tokens", "max_deferred_steps"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} = {getattr(self, name)} must be at least 1")
