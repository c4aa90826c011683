"""Runs passes: plans in, logits of the judged rows out; it decides nothing.

Legend of shapes: t rows of a part, r judged rows, h hidden, v vocabulary.
"""

import time
from collections.abc import Sequence as Items
from itertools import accumulate

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.inference.execution.attention import Batch, Run, live_runs
from ee_llm.inference.execution.executor import ExecutionConfig, Executor
from ee_llm.inference.execution.stage import ModelStage
from ee_llm.inference.execution.wire import decode_scheduler_output, encode_scheduler_output
from ee_llm.inference.exits.decision import summarize
from ee_llm.inference.scheduling.deferral import LatencyProfile
from ee_llm.inference.scheduling.scheduler import (
    SchedulerConfig,
    SchedulerOutput,
    SegmentStep,
    TokenRange,
)

# What the leading rank tells the others: nothing, a pass, a pass whose logits it needs not, to
# forget everything.
_HEARTBEAT, _WHOLE, _SHORT, _CLEAR = b"-", b"w", b"s", b"c"
ROWS_PROFILED = (1, 2, 4, 8, 16, 32, 64, 128)


class Runner:
    """One model with its cache, and a ring for the pending rows of each slot at each boundary."""

    def __init__(
        self,
        stage: ModelStage,
        scheduler_config: SchedulerConfig,
        max_length: int,
        ranks: distributed.InferenceGrid | None = None,
        execution: ExecutionConfig | None = None,
    ) -> None:
        self.stage = stage
        self._ranks = ranks
        self._last_told = time.monotonic()
        self._num_slots, self._num_pending = (
            scheduler_config.max_num_seqs,
            scheduler_config.max_pending,
        )
        self._executor = Executor(stage, scheduler_config, max_length, execution)
        rows = scheduler_config.max_num_seqs * scheduler_config.max_pending
        hidden = stage.hidden_size
        self._rings = [
            torch.zeros(rows, hidden, dtype=stage.dtype, device=stage.device)
            for _ in stage.pieces[:-1]
        ]

    def run(self, scheduler_output: SchedulerOutput) -> Tensor:
        """Return the logits [r, v] of the rows that the plan's heads name, in their order."""
        if self._ranks is None:
            return self._run(scheduler_output)
        self._tell(_WHOLE + encode_scheduler_output(scheduler_output))
        return self._ranks.gather(self._run(scheduler_output))

    def run_summarized(self, scheduler_output: SchedulerOutput) -> Tensor:
        """Return summaries [r, 3 * ranks] of the logits in place of them, see `summarize`."""
        assert self._ranks is not None, "one rank has all logits"
        self._tell(_SHORT + encode_scheduler_output(scheduler_output))
        return self._ranks.gather(self._summary(scheduler_output))

    def clear(self) -> None:
        """Forget all keys, values and pending rows, on the ranks that follow too.

        What is not finite would spread: a masked value is multiplied with 0, not left out.
        """
        self._tell(_CLEAR)
        self._clear()

    def _clear(self) -> None:
        self.stage.clear()
        for ring in self._rings:
            ring.zero_()

    @property
    def has_followers(self) -> bool:
        """Return whether other ranks run what this one runs."""
        return self._ranks is not None and self._ranks.tensor_size > 1

    def follow(self) -> None:
        """Run what the leading rank runs, until it dismisses its followers."""
        assert self._ranks is not None, "there is nobody to follow"
        while message := self._ranks.broadcast():
            kind, scheduler_output = message[:1], message[1:]
            if kind == _WHOLE:
                self._ranks.gather(self._run(decode_scheduler_output(scheduler_output)))
            elif kind == _SHORT:
                self._ranks.gather(self._summary(decode_scheduler_output(scheduler_output)))
            elif kind == _CLEAR:
                self._clear()

    def dismiss(self) -> None:
        """Let the ranks that follow this one go."""
        self._tell(b"")

    def rest(self) -> None:
        """Tell the ranks that follow this one that it is there, if it is time to."""
        if self._ranks and time.monotonic() - self._last_told > self._ranks.timeout_s / 3:
            self._tell(_HEARTBEAT)

    def _tell(self, message: bytes) -> None:
        if self._ranks:
            self._ranks.broadcast(message)
            self._last_told = time.monotonic()

    def _summary(self, scheduler_output: SchedulerOutput) -> Tensor:
        return summarize(self._run(scheduler_output), self.stage.first_id)

    @torch.no_grad()
    def _run(self, scheduler_output: SchedulerOutput) -> Tensor:
        self._executor.prepare(scheduler_output.new_blocks, scheduler_output.zeroed)
        x = attended = torch.empty(0)
        ranges: tuple[TokenRange, ...] = ()
        batch: Batch | None = None
        for step in scheduler_output.steps:
            if batch is None or step.ranges != ranges or batch.live is not None or step.frozen:
                batch = self._batch(step.ranges, live_runs(runs_of(step.ranges), step.frozen))
            if step.segment == 0:
                tokens = torch.tensor(scheduler_output.tokens, device=self.stage.device)
                x = self.stage.embed(tokens, batch.positions)
            elif step.ranges != ranges:  # rows that were left at this boundary go along
                if ranges:
                    self._leave(step.segment - 1, x, ranges)
                ring = self._rings[step.segment - 1]
                x = ring[self._places(step.ranges)]
            ranges = step.ranges
            x, attended = self._executor.run(step.segment, x, batch)
            if step is not scheduler_output.steps[-1] and self.stage.has_block(step.segment):
                self.stage.run_block(step.segment, x, self._batch(step.ranges, ()))
        last = scheduler_output.last_segment
        if last < len(self._rings):
            self._leave(last, x, ranges)
        return self._judged(scheduler_output, x, attended)

    def profile(self, rows: Items[int] = ROWS_PROFILED) -> tuple[LatencyProfile, LatencyProfile]:
        """Return what passes of so many rows take without a head, and what the head adds.

        One row each of as many slots. For when nothing runs: it writes to the cache's block for
        padding, and to rings.
        """
        rows = tuple(count for count in rows if count <= self._num_slots) or (1,)
        passes, heads = [], []
        for segment in range(len(self.stage.pieces)):
            bare, judged = zip(*(self._seconds(segment, count) for count in rows), strict=True)
            passes.append(bare)
            heads.append(tuple(max(0.0, b - a) for a, b in zip(bare, judged, strict=True)))
        return LatencyProfile(rows, tuple(passes)), LatencyProfile(rows, tuple(heads))

    def _seconds(self, segment: int, num_rows: int) -> tuple[float, float]:
        """Return the least time of a few passes without and with the head, in turn.

        The first of each is for caches and allocators.
        """
        ranges = tuple(TokenRange(slot, 0, 1) for slot in range(num_rows))
        tokens = (0,) * num_rows if segment == 0 else ()
        times: list[list[float]] = [[], []]
        while len(times[0]) < 4 or (len(times[0]) < 20 and sum(map(sum, times)) < 0.04):
            for seconds, heads in zip(times, ((), ranges), strict=True):
                start = time.perf_counter()
                self.run(SchedulerOutput((SegmentStep(segment, ranges),), tokens, heads, ()))
                distributed.synchronize()
                seconds.append(time.perf_counter() - start)
        bare, judged = (min(seconds[1:]) for seconds in times)
        return bare, judged

    def _judged(self, scheduler_output: SchedulerOutput, x: Tensor, attended: Tensor) -> Tensor:
        """Return the logits of the judged rows; an exit's block sees all rows in any case."""
        last, ranges = scheduler_output.last_segment, scheduler_output.steps[-1].ranges
        first = {run.slot: run.first - run.start for run in runs_of(ranges)}
        judged = [
            Run(s.slot, s.start, s.stop, first[s.slot] + s.start)
            for s in scheduler_output.logit_rows
        ]
        batch = self._batch(ranges, judged) if self.stage.has_block(last) else None
        return self.stage.logits(last, x, attended, judged, batch)

    def _batch(self, ranges: Items[TokenRange], live: Items[Run] | None) -> Batch:
        return self._executor.batch(runs_of(ranges), live)

    def _leave(self, boundary: int, x: Tensor, ranges: Items[TokenRange]) -> None:
        self._rings[boundary].index_copy_(0, self._places(ranges), x)

    def _places(self, ranges: Items[TokenRange]) -> Tensor:
        """Return where in a ring the rows of `spans` are [t]."""
        size = self._num_pending
        places = [s.slot * size + p % size for s in ranges for p in range(s.start, s.stop)]
        return torch.tensor(places, dtype=torch.int64, device=self.stage.device)


def runs_of(ranges: Items[TokenRange]) -> list[Run]:
    """Return the rows of `spans`, numbered one after the other."""
    ends = accumulate(map(len, ranges))
    return [Run(s.slot, s.start, s.stop, end - len(s)) for s, end in zip(ranges, ends, strict=True)]
