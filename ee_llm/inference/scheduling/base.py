"""The base of both schedulers: waiting and running sequences, slots, blocks and admission."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from ee_llm.errors import RequestError
from ee_llm.inference.scheduling.block_manager import BlockManager
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.prefix_cache import share_prefix
from ee_llm.inference.sequence import Sequence


class Load(NamedTuple):
    """How busy an engine is."""

    num_running: int
    """Number of sequences that run."""
    num_waiting: int
    """Number of sequences that wait to run."""
    cache_usage: float
    """Share of the K/V cache that sequences occupy, from 0 to 1."""


class SchedulerBase(ABC):
    """Admits sequences into slots and gives them blocks of the K/V cache.

    Attributes:
        config: Limits and sizes.
        blocks: The K/V cache.
        waiting: Sequences without a slot, the next one first.
        running: Sequences with a slot, in the order of their admission.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._slots = list(range(config.max_num_seqs))[::-1]

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    @property
    def load(self) -> Load:
        """How busy the engine is; may be read while another thread runs a step."""
        usage = 1.0 - self.blocks.num_available / (self.blocks.num_blocks - 1)
        return Load(len(self._slot_holders()), len(self.waiting), usage)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises RequestError if the cache is too small for it."""
        needed, available = self.blocks.num_needed(sequence.max_rows), self.blocks.num_blocks - 1
        if needed > available:
            raise RequestError(
                f"Request {sequence.request.id!r} may grow to {sequence.max_rows} positions, which"
                f" take {needed} blocks; the cache has {available}. Lower max_tokens ="
                f" {sequence.request.sampling_params.max_tokens}, or give the engine more blocks."
            )
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a waiting or running sequence and free its slot and blocks."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def check_integrity(self) -> None:
        """Assert the invariants that hold between any two steps."""
        holders = self._slot_holders()
        self.blocks.check_integrity(sequence.blocks for sequence in holders)
        slots = [sequence.slot for sequence in holders]
        assert sorted([*slots, *self._slots]) == list(range(self.config.max_num_seqs))
        for sequence in self.running:
            marks = [len(sequence.tokens), *sequence.watermarks]
            assert marks == sorted(marks, reverse=True), f"watermarks out of order: {marks}"

    @abstractmethod
    def _num_reserved(self, sequence: Sequence, num_shared: int) -> int:
        """Return how many blocks must be available to admit a sequence.

        num_shared: number of blocks that the sequence shares with the prefix cache.
        """

    @abstractmethod
    def _start(self, sequence: Sequence) -> None:
        """Initialize the watermarks of an admitted sequence, and allocate its first blocks."""

    @abstractmethod
    def _vacate(self, sequence: Sequence) -> None:
        """Take a running sequence out of `running` and free its slot and blocks."""

    def _slot_holders(self) -> list[Sequence]:
        """Return the sequences that occupy a slot."""
        return self.running

    def _admit(self) -> None:
        """Give slots to waiting sequences, in order, while slots and blocks last."""
        while self.waiting and self._slots:
            sequence = self.waiting[0]
            shared = share_prefix(self.blocks, sequence)
            if self.blocks.num_available < self._num_reserved(sequence, len(shared)):
                self.blocks.free(shared)
                return
            self.waiting.popleft()
            sequence.slot, sequence.blocks = self._slots.pop(), shared
            sequence.num_published = len(shared)
            sequence.num_cached = len(shared) * self.blocks.block_size
            self._start(sequence)
            self.running.append(sequence)

    def _free(self, sequence: Sequence) -> None:
        """Free the slot and blocks of a sequence; blocks that may hold NaN are zeroed later."""
        if sequence.is_tainted:
            self.blocks.taint(sequence.blocks)
        self.blocks.free(sequence.blocks)
        self._slots.append(sequence.slot)


def by_slot(sequences: Iterable[Sequence]) -> dict[int, Sequence]:
    """Return sequences by their slot."""
    return {sequence.slot: sequence for sequence in sequences}
