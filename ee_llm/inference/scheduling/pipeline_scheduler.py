"""Which rows enter a pipeline of stages next, and what comes back from its exits; no torch.

Rows pass through all stages, one pass behind the other, so that a row always finds the keys and
values of the rows before it. A token that leaves at an exit comes back to the first stage at once,
and its row goes on to the last one for its keys and values alone. No row waits at a boundary. A
sequence's first watermark is the rows sent, its second those that the last stage is through with.
"""

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ee_llm.inference.request import ExitResult, Sequence
from ee_llm.inference.scheduling.block_manager import BlockManager
from ee_llm.inference.scheduling.prefix_cache import publish_prefix, share_prefix
from ee_llm.inference.scheduling.scheduler import SchedulerConfig, TokenRange, check_room

if TYPE_CHECKING:
    from ee_llm.inference.exits.policy import Measure
    from ee_llm.inference.sampling.sampler import SamplingParams


@dataclass(frozen=True)
class Frontier:
    """A row that the exits on its way are asked about.

    row: its number in the pass. thresholds: of each exit, the confidence at which its token
    leaves; None: this exit is not asked. is_draft: if it leaves before the final exit, that one
    is asked all the same. freezes: the row keeps its state from where it left on. history: the
    tokens up to `position`, for a repetition penalty alone.
    """

    slot: int
    position: int
    row: int
    thresholds: tuple[float | None, ...]
    is_draft: bool
    freezes: bool
    measure: "Measure"
    sampling: "SamplingParams"
    history: tuple[int, ...]


@dataclass(frozen=True)
class PipelineSchedulerOutput:
    """One pass through all stages. tokens: of its rows. tables, zeroed: as in `Plan`."""

    id: int
    ranges: tuple[TokenRange, ...] = ()
    tokens: tuple[int, ...] = ()
    frontiers: tuple[Frontier, ...] = ()
    new_blocks: tuple[tuple[int, int, int], ...] = ()
    zeroed: tuple[int, ...] = ()


@dataclass(frozen=True)
class StageResult:
    """What an exit says about one frontier of a pass."""

    frontier: int
    segment: int
    result: ExitResult


@dataclass
class _PassInFlight:
    """A pass on its way. num_missing: stages that have not answered yet.

    passengers: the sequence of each span, and how often drafts of it had been rejected when it was
    sent: its rows are void after another time.
    """

    scheduler_output: PipelineSchedulerOutput
    passengers: list[tuple[Sequence, int]]
    num_missing: int


@dataclass
class PipelineScheduler:
    """Admits sequences, sends their rows, takes the stages' answers."""

    scheduler_config: SchedulerConfig
    blocks: BlockManager
    num_stages: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    _leaving: list[Sequence] = field(default_factory=list)  # finished, with rows on their way
    _sent: deque[_PassInFlight] = field(default_factory=deque)
    _slots: list[int] = field(default_factory=list)
    _num_plans: int = 0

    def __post_init__(self) -> None:
        self._slots = list(range(self.scheduler_config.max_num_seqs))[::-1]

    @property
    def has_work(self) -> bool:
        """Return whether any sequence is unfinished, or any pass on its way."""
        return bool(self.waiting or self.running or self._sent)

    @property
    def num_sent(self) -> int:
        """Return how many passes are on their way."""
        return len(self._sent)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises RequestError if the cache could never hold it."""
        check_room(self.blocks, sequence)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence; what it holds is freed once its rows have left the pipeline."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self._leave(sequence)

    def schedule(self) -> PipelineSchedulerOutput | None:
        """Return the next pass; None if no row is ready, or enough passes are on their way."""
        if len(self._sent) >= 2 * self.num_stages:  # one to work on and one to go on with, each
            return None
        self._admit()
        chosen: list[tuple[Sequence, TokenRange]] = []
        room = self.scheduler_config.max_num_batched_tokens
        ready = [one for one in self.running if one.watermarks[0] < len(one.tokens)]
        ready.sort(key=lambda one: len(one.tokens) - one.watermarks[0] > 1)  # prompts come last
        for sequence in ready:
            start = sequence.watermarks[0]
            stop = min(len(sequence.tokens), start + min(room, self.scheduler_config.max_pending))
            if stop > start:
                chosen.append((sequence, TokenRange(sequence.slot, start, stop)))
                room -= stop - start
        return self._send(chosen) if chosen else None

    def heartbeat(self) -> PipelineSchedulerOutput:
        """Return a pass without rows, which tells all stages that the first one is there."""
        return self._send([])

    def answer(self, plan_id: int, answers: Items[StageResult]) -> list[Sequence]:
        """Take what a stage's exits say, each stage once; return the sequences that it concerns."""
        sent = next(one for one in self._sent if one.scheduler_output.id == plan_id)
        passengers = {one.slot: (one, rejections) for one, rejections in sent.passengers}
        changed = []
        for said in answers:
            slot = sent.scheduler_output.frontiers[said.frontier].slot
            sequence, num_rejections = passengers[slot]
            if sequence.finish_reason or sequence.num_rejections != num_rejections:
                continue
            # Stages answer on channels of their own: the final exit's token may be there first.
            is_draft = sequence.request.draft is not None and said.segment < sequence.last_segment
            if is_draft and said.result.position + 1 != len(sequence.tokens):
                continue
            sequence.settle(said.segment, said.result)
            changed.append(sequence)
            if sequence.finish_reason:
                self._leave(sequence)
        sent.num_missing -= 1
        while self._sent and self._sent[0].num_missing == 0:
            self._arrive(self._sent.popleft())
        return changed

    def check_integrity(self) -> None:
        """Assert what must hold between any two steps."""
        holders = [*self.running, *self._leaving]
        self.blocks.check_integrity(sequence.blocks for sequence in holders)
        slots = [sequence.slot for sequence in holders]
        assert sorted([*slots, *self._slots]) == list(range(self.scheduler_config.max_num_seqs))
        for sequence in self.running:
            sent, done = sequence.watermarks
            assert done <= sent <= len(sequence.tokens), f"watermarks out of order: {sent}, {done}"

    def _admit(self) -> None:
        while self.waiting and self._slots:
            sequence = self.waiting[0]
            shared = share_prefix(self.blocks, sequence)
            needed = self.blocks.num_needed(sequence.most_rows) - len(shared)
            if self.blocks.num_available < needed:
                self.blocks.give_back(shared)
                return
            # All blocks at once: whose rows are on their way can not be asked to make room.
            self.waiting.popleft()
            sequence.slot = self._slots.pop()
            sequence.blocks = shared + [self.blocks.take() for _ in range(needed)]
            sequence.num_published = len(shared)
            sequence.num_cached = len(shared) * self.blocks.block_size
            sequence.watermarks = [sequence.num_cached, sequence.num_cached]
            self.running.append(sequence)

    def _send(self, chosen: Items[tuple[Sequence, TokenRange]]) -> PipelineSchedulerOutput:
        tables: list[tuple[int, int, int]] = []
        frontiers, tokens = [], []
        for sequence, token_range in chosen:
            tables += sequence.table_blocks()
            sequence.watermarks[0] = token_range.stop
            tokens += sequence.tokens[token_range.start : token_range.stop]
            if token_range.stop == len(sequence.tokens):
                frontiers.append(_frontier(sequence, row=len(tokens) - 1))
        ranges = tuple(token_range for _, token_range in chosen)
        scheduler_output = PipelineSchedulerOutput(
            self._num_plans,
            ranges,
            tuple(tokens),
            tuple(frontiers),
            tuple(tables),
            self.blocks.drain_to_zero(),
        )
        self._num_plans += 1
        passengers = [(one, one.num_rejections) for one, _ in chosen]
        self._sent.append(_PassInFlight(scheduler_output, passengers, self.num_stages))
        return scheduler_output

    def _arrive(self, sent: _PassInFlight) -> None:
        """Note that all stages are through with a pass."""
        for token_range, (sequence, num_rejections) in zip(
            sent.scheduler_output.ranges, sent.passengers, strict=True
        ):
            if sequence.num_rejections == num_rejections and not sequence.finish_reason:
                sequence.watermarks[1] = token_range.stop
                publish_prefix(self.blocks, sequence, token_range.stop)
        self._free()

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._leaving.append(sequence)
        self._free()

    def _free(self) -> None:
        """Take the room of those that have left, and have no row on its way any more."""
        on_their_way = {id(one) for sent in self._sent for one, _ in sent.passengers}
        for sequence in [one for one in self._leaving if id(one) not in on_their_way]:
            self._leaving.remove(sequence)
            if sequence.is_tainted:
                self.blocks.taint(sequence.blocks)
            self.blocks.give_back(sequence.blocks)
            self._slots.append(sequence.slot)


def _frontier(sequence: Sequence, row: int) -> Frontier:
    request, position = sequence.request, len(sequence.tokens) - 1
    return Frontier(
        slot=sequence.slot,
        position=position,
        row=row,
        thresholds=tuple(_thresholds(sequence)),
        is_draft=request.draft is not None,
        freezes=request.strategy == "propagate",
        measure=request.policy.measure,
        sampling=request.sampling,
        history=sequence.history(position),
    )


def _thresholds(sequence: Sequence) -> Iterator[float | None]:
    """Yield at which confidence the frontier's token leaves each exit; None: not there."""
    for segment in range(len(sequence.boundaries)):
        yield sequence.threshold(segment) if sequence.decides_at(segment) else None
