"""Run the passes of a scheduler on a model, and return logits.

Legend of shapes: t rows of a step, r rows with logits, h hidden, v vocabulary.
"""

import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import accumulate

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.inference.execution.attention import Batch, Run, live_runs
from ee_llm.inference.execution.early_rows import (
    EarlyRows,
    QueriedRow,
    run_with_early,
    split_queries,
)
from ee_llm.inference.execution.executor import ExecutionConfig, Executor
from ee_llm.inference.execution.head import HiddenRows
from ee_llm.inference.execution.stage import ModelStage
from ee_llm.inference.exits.decision import summarize
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.deferral import LatencyProfile
from ee_llm.inference.scheduling.output import SchedulerOutput, SegmentStep, TokenRange
from ee_llm.inference.scheduling.wire import decode_scheduler_output, encode_scheduler_output

# Messages of the leading rank: a pass that returns logits, one that returns summaries, and a reset.
_LOGITS, _SUMMARIES, _CLEAR = b"w", b"s", b"c"
PROFILED_NUM_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Runner:
    """A model with its K/V cache, and ring buffers for the pending rows at each boundary.

    Attributes:
        is_in_step: Whether the worker ranks wait for the next message; false within a pass, and
            after one that failed.
    """

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
        self.is_in_step = True
        self._num_slots, self._num_pending = (
            scheduler_config.max_num_seqs,
            scheduler_config.max_pending,
        )
        self._executor = Executor(stage, scheduler_config, max_length, execution)
        self._early = EarlyRows(stage, scheduler_config.max_num_seqs)
        rows = scheduler_config.max_num_seqs * scheduler_config.max_pending
        hidden = stage.hidden_size
        self._rings = [
            torch.zeros(rows, hidden, dtype=stage.dtype, device=stage.device)
            for _ in stage.layer_ranges[:-1]
        ]

    def run(self, output: SchedulerOutput) -> tuple[Tensor, dict[int, float]]:
        """Run a pass and evaluate the exit at its end for its `logit_rows`.

        Returns:
            The logits [r, v] of the rows that need them, in order, and the confidences of those
            with a hidden query, by number of the row. A row below its threshold needs no logits.
        """
        if self._ranks is None:
            return self._run(output)
        self._start(_LOGITS, output)
        logits, confidences = self._run(output)
        logits = self._ranks.gather(logits)
        self.is_in_step = True
        return logits, confidences

    @torch.no_grad()
    def early_logits(self, output: SchedulerOutput) -> Iterator[tuple[list[int], Tensor]]:
        """Yield numbers of rows and their early logits [n, b, v], for the early queries of a pass.

        Rows are numbered as in the logits that `run` returned for the pass just before. Exhaust the
        iterator, since the worker ranks do. It is empty if the pass ends before the final exit.
        """
        if output.last_segment < len(self.stage.layer_ranges) - 1:
            return
        slots = [rows.slot for rows in output.logit_rows for _ in range(len(rows))]
        for numbers in split_queries(
            output.early_queries, self.stage.num_logits * self.stage.num_ranks
        ):
            queries = [output.early_queries[number] for number in numbers]
            logits = self._early.logits(queries)
            if self._ranks is not None:
                logits = self._ranks.gather(logits)
            yield (
                [slots.index(query.slot) for query in queries],
                logits.unflatten(0, (len(queries), -1)),
            )

    def run_summarized(self, output: SchedulerOutput) -> tuple[Tensor, dict[int, float]]:
        """Do as `run`, with summaries [r, 3 * ranks] instead of logits (see `summarize`)."""
        assert self._ranks is not None, "a single rank has all logits"
        self._start(_SUMMARIES, output)
        logits, confidences = self._run(output)
        summaries = self._ranks.gather(summarize(logits, self.stage.first_id))
        self.is_in_step = True
        return summaries, confidences

    def clear(self) -> None:
        """Zero all keys, values and pending rows, on the worker ranks too.

        Otherwise, values that are not finite would spread, since attention multiplies masked values
        by 0 and does not skip them.
        """
        self._broadcast(_CLEAR)
        self._clear()

    def _clear(self) -> None:
        self.stage.clear()
        for ring in self._rings:
            ring.zero_()

    @property
    def has_workers(self) -> bool:
        """Whether other ranks share the model with this one."""
        return self._ranks is not None and self._ranks.tensor_size > 1

    def worker_loop(self) -> None:
        """Run the passes of the leading rank until it shuts down."""
        assert self._ranks is not None, "a worker needs a leading rank"
        while message := self._ranks.broadcast():
            kind, output = message[:1], message[1:]
            if kind == _LOGITS:
                decoded = decode_scheduler_output(output)
                self._ranks.gather(self._run(decoded)[0])
                deque(self.early_logits(decoded), maxlen=0)
            elif kind == _SUMMARIES:
                logits, _ = self._run(decode_scheduler_output(output))
                self._ranks.gather(summarize(logits, self.stage.first_id))
            elif kind == _CLEAR:
                self._clear()

    def shutdown(self) -> None:
        """Shut down the worker ranks."""
        if self._ranks:
            self._ranks.broadcast(b"")
            self._ranks.flush()

    def _start(self, kind: bytes, output: SchedulerOutput) -> None:
        self.is_in_step = False
        self._broadcast(kind + encode_scheduler_output(output))

    def _broadcast(self, message: bytes) -> None:
        if self._ranks:
            self._ranks.broadcast(message)

    @torch.no_grad()
    def _run(self, output: SchedulerOutput) -> tuple[Tensor, dict[int, float]]:
        self._executor.prepare(output.new_blocks, output.zeroed)
        x = torch.empty(0)
        hidden = HiddenRows(x, x, x)
        ranges: tuple[TokenRange, ...] = ()
        batch: Batch | None = None
        for step in output.steps:
            if batch is None or step.ranges != ranges or batch.live is not None or step.frozen:
                batch = self._batch(step.ranges, live_runs(runs_of(step.ranges), step.frozen))
            if step.segment == 0:
                tokens = torch.tensor(output.tokens, device=self.stage.device)
                x = self.stage.embed(tokens, batch.positions)
            elif step.ranges != ranges:  # The pending rows of this boundary join.
                if ranges:
                    self._store(step.segment - 1, x, ranges)
                ring = self._rings[step.segment - 1]
                x = ring[self._ring_rows(step.ranges)]
            ranges = step.ranges
            if output.early_queries:
                hidden = self._run_with_early(output, step, x, batch)
            else:
                hidden = self._executor.run(step.segment, x, batch)
            x = hidden.x
            if step is not output.steps[-1] and self.stage.has_block(step.segment):
                self.stage.run_block(step.segment, x, self._batch(step.ranges, ()))
        last = output.last_segment
        if last < len(self._rings):
            self._store(last, x, ranges)
        return self._evaluate_exit(output, hidden)

    def profile(
        self, rows: Items[int] = PROFILED_NUM_ROWS
    ) -> tuple[LatencyProfile, LatencyProfile]:
        """Return the measured latency of passes without a head, and of the head itself.

        Call this when nothing runs: it writes to the padding block of the cache and to the rings.

        Args:
            rows: Row counts to measure; each row is in a slot of its own.
        """
        rows = tuple(count for count in rows if count <= self._num_slots) or (1,)
        passes, heads = [], []
        for segment in range(len(self.stage.layer_ranges)):
            bare, full = zip(*(self._seconds(segment, count) for count in rows), strict=True)
            passes.append(bare)
            heads.append(tuple(max(0.0, b - a) for a, b in zip(bare, full, strict=True)))
        return LatencyProfile(rows, tuple(passes)), LatencyProfile(rows, tuple(heads))

    def _seconds(self, segment: int, num_rows: int) -> tuple[float, float]:
        """Return the least seconds of a few passes without and with the head, measured in turn.

        The first pass of each kind warms up caches and allocators and does not count.
        """
        ranges = tuple(TokenRange(slot, 0, 1) for slot in range(num_rows))
        tokens = (0,) * num_rows if segment == 0 else ()
        times: list[list[float]] = [[], []]
        while len(times[0]) < 4 or (len(times[0]) < 20 and sum(map(sum, times)) < 0.04):
            for seconds, logit_rows in zip(times, ((), ranges), strict=True):
                start = time.perf_counter()
                self.run(SchedulerOutput((SegmentStep(segment, ranges),), tokens, logit_rows, ()))
                distributed.synchronize()
                seconds.append(time.perf_counter() - start)
        bare, full = (min(seconds[1:]) for seconds in times)
        return bare, full

    def _run_with_early(
        self, output: SchedulerOutput, step: SegmentStep, x: Tensor, batch: Batch
    ) -> HiddenRows:
        """Run a step and keep the rows that the early queries of the pass need."""
        newest = {run.slot: run.first + run.num_rows - 1 for run in runs_of(step.ranges)}
        queried = [
            QueriedRow(query, newest[query.slot])
            for query in output.early_queries
            if query.slot in newest
        ]
        return run_with_early(
            self.stage,
            step.segment,
            x,
            batch,
            queried,
            lambda live: self._batch(step.ranges, live),
            self._early.keep,
        )

    def _evaluate_exit(
        self, output: SchedulerOutput, hidden: HiddenRows
    ) -> tuple[Tensor, dict[int, float]]:
        """Return what `run` returns, with this rank's logits."""
        last, ranges = output.last_segment, output.steps[-1].ranges
        first = {run.slot: run.first - run.start for run in runs_of(ranges)}
        rows = [Run(s.slot, s.start, s.stop, first[s.slot] + s.start) for s in output.logit_rows]
        return self.stage.evaluate_exit(
            last,
            hidden,
            rows,
            output.hidden_queries,
            lambda live: self._batch(ranges, live),
            self._gather,
        )

    def _gather(self, part: Tensor) -> Tensor:
        return part if self._ranks is None else self._ranks.gather(part)

    def _batch(self, ranges: Items[TokenRange], live: Items[Run] | None) -> Batch:
        return self._executor.batch(runs_of(ranges), live)

    def _store(self, boundary: int, x: Tensor, ranges: Items[TokenRange]) -> None:
        self._rings[boundary].index_copy_(0, self._ring_rows(ranges), x)

    def _ring_rows(self, ranges: Items[TokenRange]) -> Tensor:
        """Return the indices [t] of rows in a ring."""
        size = self._num_pending
        indices = [s.slot * size + p % size for s in ranges for p in range(s.start, s.stop)]
        return torch.tensor(indices, dtype=torch.int64, device=self.stage.device)


def runs_of(ranges: Items[TokenRange]) -> list[Run]:
    """Return the given rows as runs whose rows are numbered consecutively."""
    ends = accumulate(map(len, ranges))
    return [Run(s.slot, s.start, s.stop, end - len(s)) for s, end in zip(ranges, ends, strict=True)]
