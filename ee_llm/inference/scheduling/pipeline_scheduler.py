"""Schedule which rows enter the pipeline next, and apply the results of its exits.

Passes go through all stages one behind another, so a row always finds the keys and values of the
rows before it. A token that exits returns to the first stage at once, and its row
goes on to the last stage only for its keys and values. No row waits at a boundary. The first
watermark of a sequence counts the rows sent, the second those that the last stage has processed.
"""

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ee_llm.inference.decoding.settings import Contrast
from ee_llm.inference.request import ExitResult
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.base import SchedulerBase
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.output import TokenRange
from ee_llm.inference.scheduling.prefix_cache import publish_prefix
from ee_llm.inference.sequence import Sequence

if TYPE_CHECKING:
    from ee_llm.inference.choices import Measure


@dataclass(frozen=True)
class Frontier:
    """A row that the exits on its way decide about.

    Attributes:
        slot: Slot of its sequence.
        position: Position of the row.
        row: Number of the row in the pass.
        thresholds: For each exit, the least confidence that exits; None if the exit is skipped.
        is_draft: A token that exits before the final exit is a draft; the final exit decides too.
        freezes: The row keeps its state from its exit on.
        measure: Measure of confidence.
        sampling_params: How the token is drawn.
        history: Distinct tokens up to `position`, only for a repetition penalty.
        banned: Ids that may not be drawn.
        contrast: Settings by which the final logits are contrasted with early ones.
    """

    slot: int
    position: int
    row: int
    thresholds: tuple[float | None, ...]
    is_draft: bool
    freezes: bool
    measure: "Measure"
    sampling_params: SamplingParams
    history: tuple[int, ...]
    banned: tuple[int, ...] = ()
    contrast: Contrast | None = None


@dataclass(frozen=True)
class PipelineSchedulerOutput:
    """One pass through all stages; the fields are those of `SchedulerOutput`."""

    id: int
    ranges: tuple[TokenRange, ...] = ()
    tokens: tuple[int, ...] = ()
    frontiers: tuple[Frontier, ...] = ()
    new_blocks: tuple[tuple[int, int, int], ...] = ()
    zeroed: tuple[int, ...] = ()


@dataclass(frozen=True)
class StageResult:
    """The result of the exit at the end of `segment` for frontier number `frontier` of a pass."""

    frontier: int
    segment: int
    result: ExitResult


@dataclass
class _PassInFlight:
    """A pass that stages still work on.

    Attributes:
        output: The pass.
        sequences: The sequence of each range, and how often its drafts had been rejected when the
            pass was sent; its rows are void after another rejection.
        num_missing: Number of stages that have not reported yet.
    """

    output: PipelineSchedulerOutput
    sequences: list[tuple[Sequence, int]]
    num_missing: int


class PipelineScheduler(SchedulerBase):
    """Admits sequences, sends their rows, and applies the results of the stages."""

    def __init__(self, config: SchedulerConfig, num_stages: int) -> None:
        super().__init__(config)
        self.num_stages = num_stages
        self._finished: list[Sequence] = []  # finished, with rows in flight
        self._in_flight: deque[_PassInFlight] = deque()
        self._num_passes = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished, or any pass in flight."""
        return super().has_work or bool(self._in_flight)

    @property
    def num_in_flight(self) -> int:
        """Number of passes that stages still work on."""
        return len(self._in_flight)

    def schedule(self) -> PipelineSchedulerOutput | None:
        """Return the next pass; None if no row is ready, or enough passes are in flight."""
        # Each stage has one pass to work on and the next one ready.
        if len(self._in_flight) >= 2 * self.num_stages:
            return None
        self._admit()
        scheduled: list[tuple[Sequence, TokenRange]] = []
        budget = self.config.max_num_batched_tokens
        ready = [one for one in self.running if one.watermarks[0] < len(one.tokens)]
        ready.sort(key=lambda one: len(one.tokens) - one.watermarks[0] > 1)  # prompts last
        for sequence in ready:
            start = sequence.watermarks[0]
            stop = min(len(sequence.tokens), start + min(budget, self.config.max_pending))
            if stop > start:
                scheduled.append((sequence, TokenRange(sequence.slot, start, stop)))
                budget -= stop - start
        return self._send(scheduled) if scheduled else None

    def apply(self, pass_id: int, results: Items[StageResult]) -> list[Sequence]:
        """Apply the results of a stage, once per stage and pass; return the changed sequences."""
        sent = next(one for one in self._in_flight if one.output.id == pass_id)
        sequences = {one.slot: (one, rejections) for one, rejections in sent.sequences}
        changed = []
        for stage_result in results:
            slot = sent.output.frontiers[stage_result.frontier].slot
            sequence, num_rejections = sequences[slot]
            if sequence.finish_reason or sequence.num_rejections != num_rejections:
                continue
            # Stages report on separate channels: the final exit's token may arrive first.
            is_draft = (
                sequence.request.speculation is not None
                and stage_result.segment < sequence.last_segment
            )
            if is_draft and stage_result.result.position + 1 != len(sequence.tokens):
                continue
            sequence.apply(stage_result.segment, stage_result.result)
            changed.append(sequence)
            if sequence.finish_reason:
                self._vacate(sequence)
        sent.num_missing -= 1
        while self._in_flight and self._in_flight[0].num_missing == 0:
            self._complete(self._in_flight.popleft())
        return changed

    def _slot_holders(self) -> list[Sequence]:
        return [*self.running, *self._finished]

    def _num_reserved(self, sequence: Sequence, num_shared: int) -> int:
        # All blocks at once: a sequence with rows in flight cannot be preempted.
        return self.blocks.num_needed(sequence.max_rows) - num_shared

    def _start(self, sequence: Sequence) -> None:
        needed = self._num_reserved(sequence, len(sequence.blocks))
        sequence.blocks = sequence.blocks + [self.blocks.allocate() for _ in range(needed)]
        sequence.watermarks = [sequence.num_cached, sequence.num_cached]

    def _vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._finished.append(sequence)
        self._free_finished()

    def _send(self, scheduled: Items[tuple[Sequence, TokenRange]]) -> PipelineSchedulerOutput:
        new_blocks: list[tuple[int, int, int]] = []
        frontiers, tokens = [], []
        for sequence, rows in scheduled:
            new_blocks += sequence.table_blocks()
            sequence.watermarks[0] = rows.stop
            tokens += sequence.tokens[rows.start : rows.stop]
            if rows.stop == len(sequence.tokens):
                frontiers.append(_frontier(sequence, row=len(tokens) - 1))
        output = PipelineSchedulerOutput(
            self._num_passes,
            tuple(rows for _, rows in scheduled),
            tuple(tokens),
            tuple(frontiers),
            tuple(new_blocks),
            self.blocks.drain_to_zero(),
        )
        self._num_passes += 1
        sequences = [(one, one.num_rejections) for one, _ in scheduled]
        self._in_flight.append(_PassInFlight(output, sequences, self.num_stages))
        return output

    def _complete(self, sent: _PassInFlight) -> None:
        """Move the watermarks of a pass that all stages have processed."""
        pairs = zip(sent.output.ranges, sent.sequences, strict=True)
        for rows, (sequence, num_rejections) in pairs:
            if sequence.num_rejections == num_rejections and not sequence.finish_reason:
                sequence.watermarks[1] = rows.stop
                publish_prefix(self.blocks, sequence, rows.stop)
        self._free_finished()

    def _free_finished(self) -> None:
        """Free finished sequences that have no row in flight any more."""
        in_flight = {id(one) for sent in self._in_flight for one, _ in sent.sequences}
        for sequence in [one for one in self._finished if id(one) not in in_flight]:
            self._finished.remove(sequence)
            self._free(sequence)


def _frontier(sequence: Sequence, row: int) -> Frontier:
    request, position = sequence.request, len(sequence.tokens) - 1
    return Frontier(
        slot=sequence.slot,
        position=position,
        row=row,
        thresholds=tuple(_thresholds(sequence)),
        is_draft=request.speculation is not None,
        freezes=request.strategy == "propagate",
        measure=request.policy.measure,
        sampling_params=request.sampling_params,
        history=sequence.history(position),
        banned=sequence.banned(position),
        contrast=request.contrast,
    )


def _thresholds(sequence: Sequence) -> Iterator[float | None]:
    """Yield the least confidence that exits at each exit; None if it does not decide."""
    for segment in range(len(sequence.boundaries)):
        yield sequence.threshold(segment) if sequence.decides_at(segment) else None
