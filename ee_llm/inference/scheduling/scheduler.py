"""Which rows run through which segments next: a pure function of the sequences' state; no torch.

A pass takes rows through one segment or several in a row, until it reaches an exit that has to
judge one of its frontiers. A sequence's pending rows always go along, from the boundary where they
lie, so that every row finds the keys and values of all earlier positions at every layer.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from ee_llm.errors import RequestError
from ee_llm.inference.request import ExitResult, Sequence
from ee_llm.inference.scheduling.block_manager import BlockManager
from ee_llm.inference.scheduling.prefix_cache import publish_prefix, share_prefix


@dataclass(frozen=True)
class TokenRange:
    """The rows at positions start .. stop-1 of the sequence in `slot`."""

    slot: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class SegmentStep:
    """What a pass does in one segment. frozen: numbers of the rows that keep their state there."""

    segment: int
    ranges: tuple[TokenRange, ...]
    frozen: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """Return how many rows run through the segment."""
        return sum(map(len, self.ranges))


@dataclass(frozen=True)
class SchedulerOutput:
    """One pass. parts: neighbouring segments. tokens: of the rows that enter segment 0.

    heads: the rows that the exit at the end of the last part judges. tables: newly given blocks
    as (slot, index within the sequence, block). zeroed: blocks to zero before the pass.
    """

    steps: tuple[SegmentStep, ...]
    tokens: tuple[int, ...]
    logit_rows: tuple[TokenRange, ...]
    new_blocks: tuple[tuple[int, int, int], ...]
    zeroed: tuple[int, ...] = ()

    @property
    def last_segment(self) -> int:
        """Return the segment at whose end the pass stops."""
        return self.steps[-1].segment


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
        max_deferred_steps: Steps after which a row that did not exit runs, whatever else waits. If
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
                raise RequestError(f"{name} {getattr(self, name)} must be at least 1")


@dataclass
class Scheduler:
    """Admits sequences, plans passes, and takes the verdicts on them.

    holds[s]: how many sequences segment s waits for while there is other work (its entry for
    segment 0 is not read); 1 everywhere is no holding.
    """

    num_segments: int
    scheduler_config: SchedulerConfig
    blocks: BlockManager
    deferral_targets: list[int] = field(default_factory=list)
    step: int = 0
    num_preemptions: int = 0
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)  # in the order of their admission
    _slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.deferral_targets = self.deferral_targets or [1] * self.num_segments
        self._slots = list(range(self.scheduler_config.max_num_seqs))[::-1]

    @property
    def has_work(self) -> bool:
        """Return whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises RequestError if the cache could never hold it."""
        request = sequence.request
        check_room(self.blocks, sequence)
        if request.draft is not None and request.draft.length >= self.scheduler_config.max_pending:
            raise RequestError(
                f"draft length {request.draft.length} does not fit max_pending ="
                f" {self.scheduler_config.max_pending}, which holds the drafts and one more row"
            )
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it stands, and free what it holds."""
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self._vacate(sequence)

    def schedule(self) -> SchedulerOutput | None:
        """Return the next pass, or None if there is nothing to do."""
        self._admit()
        while self.running:
            first = self._pick()
            ranges = self._with_blocks(self._spans(first))
            if ranges:
                return self._through(first, ranges)
        assert not self.waiting, "a sequence waits for room that nobody holds"
        return None

    def apply(
        self, scheduler_output: SchedulerOutput, results: Items[ExitResult]
    ) -> list[Sequence]:
        """Move the watermarks, take the verdicts; return the sequences that are finished by them.

        verdicts: one for each of the rows that the plan's heads name, in their order.
        """
        self.step += 1
        by_slot = {sequence.slot: sequence for sequence in self.running}
        for step in scheduler_output.steps:
            for token_range in step.ranges:
                by_slot[token_range.slot].watermarks[step.segment] = token_range.stop
        for token_range in scheduler_output.steps[-1].ranges:
            by_slot[token_range.slot].waiting_since = self.step
        for slot in {result.slot for result in results if not result.is_finite}:
            if by_slot[slot].request.draft is not None and by_slot[slot].may_draft:
                self._restart_without_drafts(by_slot.pop(slot))
        unsettled = by_slot.copy()
        for result in results:
            sequence = unsettled.get(result.slot)
            if sequence and not sequence.settle(scheduler_output.last_segment, result):
                del unsettled[result.slot]
        if scheduler_output.last_segment == self.num_segments - 1:
            for token_range in scheduler_output.steps[-1].ranges:
                sequence = by_slot.get(token_range.slot)
                if sequence and not sequence.is_tainted:
                    publish_prefix(self.blocks, sequence, sequence.watermarks[-1])
        finished = [sequence for sequence in self.running if sequence.finish_reason]
        for sequence in finished:
            self._vacate(sequence)
        return finished

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's room; it begins anew, before all that wait."""
        self._vacate(sequence)
        sequence.restart()
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _restart_without_drafts(self, sequence: Sequence) -> None:
        """Let the model alone decide whether a sequence has failed.

        A draft that it would reject can lead to NaN, and attention spreads the NaN of a masked
        row to the rows before it in the same pass.
        """
        sequence.may_draft, sequence.is_tainted = False, True
        self.preempt(sequence)
        sequence.is_tainted = False

    def begin_anew(self) -> None:
        """Take the room of all running sequences and forget the cache, after a pass that failed."""
        for sequence in self.running[::-1]:
            self.preempt(sequence)
        self.blocks.clear()

    def check_integrity(self) -> None:
        """Assert what must hold between any two steps."""
        self.blocks.check_integrity(sequence.blocks for sequence in self.running)
        slots = [sequence.slot for sequence in self.running]
        assert sorted([*slots, *self._slots]) == list(range(self.scheduler_config.max_num_seqs))
        for sequence in self.running:
            marks = [len(sequence.tokens), *sequence.watermarks]
            assert marks == sorted(marks, reverse=True), f"watermarks out of order: {marks}"
            assert sequence.num_pending <= self.scheduler_config.max_pending, "too many rows pend"
            room = len(sequence.blocks) * self.blocks.block_size
            assert sequence.watermarks[0] <= room, "rows without a block"

    def due(self, sequence: Sequence) -> int:
        """Return the segment that the sequence has to go through next."""
        marks = sequence.watermarks
        if (
            marks[0] < len(sequence.tokens)
            and sequence.num_pending < self.scheduler_config.max_pending
        ):
            return 0
        return next(segment for segment, mark in enumerate(marks) if mark < marks[0])

    def _admit(self) -> None:
        while self.waiting and self._slots:
            sequence = self.waiting[0]
            shared = share_prefix(self.blocks, sequence)
            start = len(shared) * self.blocks.block_size
            # All that it has to run, and one block more for each that runs: who comes must not push
            # others out at once, nor be pushed out before it is where it was.
            needed = self.blocks.num_needed(len(sequence.tokens)) - len(shared)
            if self.running and self.blocks.num_available < needed + len(self.running):
                self.blocks.give_back(shared)
                return
            self.waiting.popleft()
            sequence.slot, sequence.blocks = self._slots.pop(), shared
            sequence.num_cached, sequence.num_published = start, len(shared)
            sequence.watermarks = [start] * self.num_segments
            self.running.append(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.is_tainted:
            self.blocks.taint(sequence.blocks)
        self.blocks.give_back(sequence.blocks)
        self._slots.append(sequence.slot)

    def _pick(self) -> int:
        """Return the segment that the next pass begins with."""
        waiting: list[list[Sequence]] = [[] for _ in range(self.num_segments)]
        for sequence in self.running:
            waiting[self.due(sequence)].append(sequence)
        oldest = self.step - self.scheduler_config.max_deferred_steps
        for segment in range(self.num_segments - 1, 0, -1):
            held = waiting[segment]
            if held and (
                len(held) >= self.deferral_targets[segment]
                or any(one.waiting_since <= oldest for one in held)
                or any(one.watermarks[0] < len(one.tokens) for one in held)  # no room to go on
            ):
                return segment
        return next(segment for segment, held in enumerate(waiting) if held)

    def _spans(self, segment: int, carried: Items[TokenRange] = ()) -> list[TokenRange]:
        """Return the rows that run through `segment`, after those `carried` from the one before."""
        by_slot = {token_range.slot: token_range.stop for token_range in carried}
        ranges = [
            TokenRange(sequence.slot, sequence.watermarks[segment], by_slot[sequence.slot])
            for sequence in self.running
            if sequence.slot in by_slot
        ]
        num_rows = sum(map(len, ranges))
        others = [sequence for sequence in self.running if sequence.slot not in by_slot]
        due = [sequence for sequence in others if self.due(sequence) == segment]
        due.sort(key=lambda sequence: sequence.waiting_since)  # where not all fit, in turn
        if segment == 0:  # new tokens go before prompts
            due.sort(key=lambda sequence: len(sequence.tokens) - sequence.watermarks[0] > 1)
        for sequence in due:
            start, stop = sequence.watermarks[segment], sequence.watermarks[0]
            room = self.scheduler_config.max_num_batched_tokens - num_rows
            if segment == 0:
                room = min(room, self.scheduler_config.max_pending - sequence.num_pending)
                stop = min(len(sequence.tokens), start + room)
            if stop > start and (stop - start <= room or not ranges):
                ranges.append(TokenRange(sequence.slot, start, stop))
                num_rows += stop - start
        if segment > 0 and num_rows < self.scheduler_config.max_piggyback_rows:
            slots = {sequence.slot for sequence in due}
            riders = [sequence for sequence in others if sequence.slot not in slots]
            ranges += self._riders(segment, riders, num_rows)
        return ranges

    def _riders(self, segment: int, others: Items[Sequence], num_rows: int) -> Iterator[TokenRange]:
        """Yield pending rows of sequences that could do without this pass yet."""
        for sequence in others:
            stop, start = sequence.watermarks[segment - 1 : segment + 1]
            if 0 < stop - start <= self.scheduler_config.max_piggyback_rows - num_rows:
                num_rows += stop - start
                yield TokenRange(sequence.slot, start, stop)

    def _with_blocks(self, ranges: list[TokenRange]) -> list[TokenRange]:
        """Return the spans that have blocks; the last to come give theirs where none is left."""
        by_slot = {sequence.slot: sequence for sequence in self.running}
        for token_range in ranges:
            sequence = by_slot[token_range.slot]
            needed = self.blocks.num_needed(token_range.stop)
            while sequence.slot >= 0 and len(sequence.blocks) < needed:
                if self.blocks.num_available:
                    sequence.blocks.append(self.blocks.take())
                else:
                    self.preempt(self.running[-1])
        return [token_range for token_range in ranges if by_slot[token_range.slot].slot >= 0]

    def _through(self, segment: int, ranges: list[TokenRange]) -> SchedulerOutput:
        """Return the pass that begins with `spans` and ends where an exit has to judge."""
        by_slot = {sequence.slot: sequence for sequence in self.running}
        tokens: list[int] = []
        if segment == 0:
            for token_range in ranges:
                tokens += by_slot[token_range.slot].tokens[token_range.start : token_range.stop]
        steps: list[SegmentStep] = []
        while True:
            steps.append(
                SegmentStep(segment, tuple(ranges), tuple(_frozen(segment, ranges, by_slot)))
            )
            heads = tuple(self._heads(segment, ranges, by_slot))
            if heads or segment == self.num_segments - 1:
                break
            segment += 1
            ranges = self._spans(segment, ranges)
        tables = [
            entry for token_range in ranges for entry in by_slot[token_range.slot].table_blocks()
        ]
        zeroed = self.blocks.drain_to_zero()
        return SchedulerOutput(tuple(steps), tuple(tokens), heads, tuple(tables), zeroed)

    def _heads(
        self, segment: int, ranges: Items[TokenRange], by_slot: Mapping[int, Sequence]
    ) -> Iterator[TokenRange]:
        """Yield the rows that the exit at the end of `segment` judges."""
        for token_range in ranges:
            sequence = by_slot[token_range.slot]
            if segment == self.num_segments - 1:
                start = max(token_range.start, sequence.num_confirmed - 1)
                if start < token_range.stop:
                    yield TokenRange(token_range.slot, start, token_range.stop)
            elif token_range.stop == len(sequence.tokens) and sequence.decides_at(segment):
                yield TokenRange(token_range.slot, token_range.stop - 1, token_range.stop)


def check_room(blocks: BlockManager, sequence: Sequence) -> None:
    """Raise RequestError if the cache could never hold a sequence."""
    length, room = sequence.most_rows, blocks.num_blocks - 1
    needed = blocks.num_needed(length)
    if needed > room:
        raise RequestError(
            f"request {sequence.request.id!r} may grow to {length} positions, {needed} blocks of"
            f" the cache, which has {room}; ask for fewer tokens or give the engine more blocks"
        )


def _frozen(
    segment: int, ranges: Items[TokenRange], by_slot: Mapping[int, Sequence]
) -> Iterator[int]:
    """Yield the numbers of the rows that keep their state in `segment`."""
    first = 0
    for token_range in ranges:
        sequence = by_slot[token_range.slot]
        if sequence.request.strategy == "propagate":
            for position in range(token_range.start, token_range.stop):
                if sequence.is_frozen(position, segment):
                    yield first + position - token_range.start
        first += len(token_range)
