"""Schedule which rows run through which segments next, from the state of the sequences only.

A pass takes rows through one or several consecutive segments, until it reaches an exit that has to
decide about one of its frontiers. The pending rows of a sequence always go along, from the boundary
where they wait, so that every row finds the keys and values of all earlier positions at every
layer.
"""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items

from ee_llm.errors import RequestError
from ee_llm.inference.request import ExitResult
from ee_llm.inference.scheduling.base import SchedulerBase, by_slot
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.output import (
    EarlyQuery,
    HiddenQuery,
    SchedulerOutput,
    SegmentStep,
    TokenRange,
    is_hidden,
    make_early_query,
)
from ee_llm.inference.scheduling.prefix_cache import publish_prefix
from ee_llm.inference.sequence import Sequence


class Scheduler(SchedulerBase):
    """Admits sequences, plans passes, and applies the results of exits.

    Attributes:
        num_segments: Number of segments of the model.
        deferral_targets: Segment s waits for deferral_targets[s] sequences while there is other
            work; 1 disables deferral. The entry of segment 0 is not read.
        step: Number of passes applied so far.
        num_preemptions: Number of preempted sequences so far.
    """

    def __init__(self, num_segments: int, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.num_segments = num_segments
        self.deferral_targets = [1] * num_segments
        self.step = 0
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises RequestError if the engine cannot serve it."""
        speculation = sequence.request.speculation
        if speculation is not None and speculation.draft_length >= self.config.max_pending:
            raise RequestError(
                f"draft_length = {speculation.draft_length} must be below max_pending ="
                f" {self.config.max_pending}, which bounds the drafts and one more row."
            )
        super().add(sequence)

    def schedule(self) -> SchedulerOutput | None:
        """Return the next pass, or None if there is nothing to do."""
        self._admit()
        while self.running:
            first = self._pick()
            ranges = self._with_blocks(self._ranges(first))
            if ranges:
                return self._through(first, ranges)
        assert not self.waiting, "a sequence waits although no sequence runs"
        return None

    def apply(self, output: SchedulerOutput, results: Items[ExitResult]) -> list[Sequence]:
        """Move the watermarks, apply the results, and return the sequences that are finished.

        Args:
            output: The pass.
            results: One result for each of its `logit_rows`, in order.
        """
        self.step += 1
        running = by_slot(self.running)
        for step in output.steps:
            for rows in step.ranges:
                running[rows.slot].watermarks[step.segment] = rows.stop
        for rows in output.steps[-1].ranges:
            running[rows.slot].waiting_since = self.step
        for slot in {result.slot for result in results if not result.is_finite}:
            if running[slot].request.speculation is not None and running[slot].may_draft:
                self._restart_without_drafts(running.pop(slot))
        unsettled = running.copy()
        for result in results:
            sequence = unsettled.get(result.slot)
            if sequence and not sequence.apply(output.last_segment, result):
                del unsettled[result.slot]
        if output.last_segment == self.num_segments - 1:
            for rows in output.steps[-1].ranges:
                sequence = running.get(rows.slot)
                if sequence and not sequence.is_tainted:
                    publish_prefix(self.blocks, sequence, sequence.watermarks[-1])
        finished = [sequence for sequence in self.running if sequence.finish_reason]
        for sequence in finished:
            self._vacate(sequence)
        return finished

    def preempt(self, sequence: Sequence) -> None:
        """Free the slot and blocks of a running sequence and queue it before all waiting ones."""
        self._vacate(sequence)
        sequence.restart()
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def reset(self) -> None:
        """Preempt all running sequences and clear the cache, after a pass that failed."""
        for sequence in self.running[::-1]:
            self.preempt(sequence)
        self.blocks.clear()

    def check_integrity(self) -> None:
        """Assert the invariants that hold between any two steps."""
        super().check_integrity()
        for sequence in self.running:
            assert sequence.num_pending <= self.config.max_pending, "too many pending rows"
            capacity = len(sequence.blocks) * self.blocks.block_size
            assert sequence.watermarks[0] <= capacity, "rows without a block"

    def due(self, sequence: Sequence) -> int:
        """Return the segment that the sequence has to go through next."""
        marks = sequence.watermarks
        if marks[0] < len(sequence.tokens) and sequence.num_pending < self.config.max_pending:
            return 0
        return next(segment for segment, mark in enumerate(marks) if mark < marks[0])

    def _num_reserved(self, sequence: Sequence, num_shared: int) -> int:
        # Reserve one more block for each running sequence, so that admitting a request does not
        # preempt a running one, and is not undone before the request has caught up.
        if not self.running:
            return 0
        return self.blocks.num_needed(len(sequence.tokens)) - num_shared + len(self.running)

    def _start(self, sequence: Sequence) -> None:
        sequence.watermarks = [sequence.num_cached] * self.num_segments

    def _vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)

    def _restart_without_drafts(self, sequence: Sequence) -> None:
        """Restart a sequence so that the model alone decides whether it has failed.

        A draft that the model would reject can lead to NaN, and attention spreads the NaN of a
        masked row to earlier rows of the same pass.
        """
        sequence.may_draft, sequence.is_tainted = False, True
        self.preempt(sequence)
        sequence.is_tainted = False

    def _pick(self) -> int:
        """Return the segment that the next pass begins with."""
        due: list[list[Sequence]] = [[] for _ in range(self.num_segments)]
        for sequence in self.running:
            due[self.due(sequence)].append(sequence)
        oldest = self.step - self.config.max_deferred_steps
        for segment in range(self.num_segments - 1, 0, -1):
            deferred = due[segment]
            if deferred and (
                len(deferred) >= self.deferral_targets[segment]
                or any(sequence.waiting_since <= oldest for sequence in deferred)
                # Rows remain although segment 0 is not due: too many are pending.
                or any(sequence.watermarks[0] < len(sequence.tokens) for sequence in deferred)
            ):
                return segment
        return next(segment for segment, sequences in enumerate(due) if sequences)

    def _ranges(self, segment: int, carried: Items[TokenRange] = ()) -> list[TokenRange]:
        """Return the rows that run through `segment`; `carried`: rows of the previous segment."""
        stops = {rows.slot: rows.stop for rows in carried}
        ranges = [
            TokenRange(sequence.slot, sequence.watermarks[segment], stops[sequence.slot])
            for sequence in self.running
            if sequence.slot in stops
        ]
        num_rows = sum(map(len, ranges))
        others = [sequence for sequence in self.running if sequence.slot not in stops]
        due = [sequence for sequence in others if self.due(sequence) == segment]
        due.sort(key=lambda sequence: sequence.waiting_since)  # If not all fit, the oldest first.
        if segment == 0:  # New tokens go before prompts.
            due.sort(key=lambda sequence: len(sequence.tokens) - sequence.watermarks[0] > 1)
        for sequence in due:
            start, stop = sequence.watermarks[segment], sequence.watermarks[0]
            budget = self.config.max_num_batched_tokens - num_rows
            if segment == 0:
                budget = min(budget, self.config.max_pending - sequence.num_pending)
                stop = min(len(sequence.tokens), start + budget)
            if stop > start and (stop - start <= budget or not ranges):
                ranges.append(TokenRange(sequence.slot, start, stop))
                num_rows += stop - start
        if segment > 0 and num_rows < self.config.max_piggyback_rows:
            slots = {sequence.slot for sequence in due}
            rest = [sequence for sequence in others if sequence.slot not in slots]
            ranges += self._piggyback(segment, rest, num_rows)
        return ranges

    def _piggyback(
        self, segment: int, others: Items[Sequence], num_rows: int
    ) -> Iterator[TokenRange]:
        """Yield pending rows of sequences that do not need this pass yet."""
        for sequence in others:
            stop, start = sequence.watermarks[segment - 1 : segment + 1]
            if 0 < stop - start <= self.config.max_piggyback_rows - num_rows:
                num_rows += stop - start
                yield TokenRange(sequence.slot, start, stop)

    def _with_blocks(self, ranges: list[TokenRange]) -> list[TokenRange]:
        """Return the rows that have blocks; if none is free, the newest sequences are preempted."""
        sequences = by_slot(self.running)
        for rows in ranges:
            sequence = sequences[rows.slot]
            needed = self.blocks.num_needed(rows.stop)
            while sequence.slot >= 0 and len(sequence.blocks) < needed:
                if self.blocks.num_available:
                    sequence.blocks.append(self.blocks.allocate())
                else:
                    self.preempt(self.running[-1])
        return [rows for rows in ranges if sequences[rows.slot].slot >= 0]

    def _through(self, segment: int, ranges: list[TokenRange]) -> SchedulerOutput:
        """Return the pass that begins with `ranges` and ends where an exit has to decide."""
        sequences = by_slot(self.running)
        tokens: list[int] = []
        if segment == 0:
            for rows in ranges:
                tokens += sequences[rows.slot].tokens[rows.start : rows.stop]
        steps: list[SegmentStep] = []
        while True:
            frozen = tuple(_frozen(segment, ranges, sequences))
            steps.append(SegmentStep(segment, tuple(ranges), frozen))
            logit_rows = tuple(self._logit_rows(segment, ranges, sequences))
            if logit_rows or segment == self.num_segments - 1:
                break
            segment += 1
            ranges = self._ranges(segment, ranges)
        new_blocks = [entry for rows in ranges for entry in sequences[rows.slot].table_blocks()]
        zeroed = self.blocks.drain_to_zero()
        return SchedulerOutput(
            tuple(steps),
            tuple(tokens),
            logit_rows,
            tuple(new_blocks),
            zeroed,
            tuple(_early_queries(ranges, sequences)),
            tuple(_hidden_queries(segment, logit_rows, sequences)),
        )

    def _logit_rows(
        self, segment: int, ranges: Items[TokenRange], sequences: Mapping[int, Sequence]
    ) -> Iterator[TokenRange]:
        """Yield the rows that the exit at the end of `segment` decides about."""
        for rows in ranges:
            sequence = sequences[rows.slot]
            if segment == self.num_segments - 1:
                start = max(rows.start, sequence.num_confirmed - 1)
                if start < rows.stop:
                    yield TokenRange(rows.slot, start, rows.stop)
            elif rows.stop == len(sequence.tokens) and sequence.decides_at(segment):
                yield TokenRange(rows.slot, rows.stop - 1, rows.stop)


def _early_queries(
    ranges: Items[TokenRange], sequences: Mapping[int, Sequence]
) -> Iterator[EarlyQuery]:
    """Yield the newest rows of the sequences that contrast final logits with early ones."""
    for rows in ranges:
        sequence = sequences[rows.slot]
        if sequence.request.contrast is not None and rows.stop == len(sequence.tokens):
            yield make_early_query(sequence.request.contrast, rows.slot, rows.stop - 1)


def _hidden_queries(
    segment: int, logit_rows: Items[TokenRange], sequences: Mapping[int, Sequence]
) -> Iterator[HiddenQuery]:
    """Yield the rows whose confidence at the exit is known before its output projection."""
    first = 0
    for rows in logit_rows:
        sequence = sequences[rows.slot]
        measure = sequence.measure(segment)
        if is_hidden(measure, sequence.predicted):
            threshold, predicted = sequence.threshold(segment), sequence.predicted
            yield HiddenQuery(first, measure, threshold, predicted)
        first += len(rows)


def _frozen(
    segment: int, ranges: Items[TokenRange], sequences: Mapping[int, Sequence]
) -> Iterator[int]:
    """Yield the numbers of the rows that keep their state in `segment`."""
    first = 0
    for rows in ranges:
        sequence = sequences[rows.slot]
        if sequence.request.strategy == "propagate":
            for position in range(rows.start, rows.stop):
                if sequence.is_frozen(position, segment):
                    yield first + position - rows.start
        first += len(rows)
