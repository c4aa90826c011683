"""Run passes through one stage of a pipeline and evaluate its exits.

Legend of shapes: t rows, h hidden.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.inference.choices import logit_measure
from ee_llm.inference.decoding.contrast import EarlyLogits, contrast_rows
from ee_llm.inference.execution.attention import Batch, Run, live_runs
from ee_llm.inference.execution.early_rows import (
    EarlyRows,
    QueriedRow,
    run_with_early,
    split_queries,
)
from ee_llm.inference.execution.executor import ExecutionConfig, Executor
from ee_llm.inference.execution.head import HiddenRows
from ee_llm.inference.execution.runner import runs_of
from ee_llm.inference.execution.stage import ModelStage
from ee_llm.inference.exits.decision import (
    ExitQuery,
    can_decide_from_summaries,
    decide_exits,
    decide_from_summaries,
    join_results,
    split_by_confidence,
    summarize,
)
from ee_llm.inference.scheduling.config import SchedulerConfig
from ee_llm.inference.scheduling.output import (
    EarlyQuery,
    HiddenQuery,
    is_hidden,
    make_early_query,
)
from ee_llm.inference.scheduling.pipeline_scheduler import (
    PipelineSchedulerOutput,
    StageResult,
)
from ee_llm.inference.scheduling.wire import (
    PassEnvelope,
    decode_pass,
    encode_results,
    num_predicted,
)


class PipelineRunner:
    """Runs passes through one stage; every tensor-parallel rank of the stage has one."""

    def __init__(
        self,
        stage: ModelStage,
        boundaries: Items[int],
        scheduler_config: SchedulerConfig,
        max_length: int,
        ranks: distributed.InferenceGrid,
        execution: ExecutionConfig | None = None,
    ) -> None:
        self._stage = stage
        self._ranks = ranks
        # For each layer range, the segment that its exit ends; None without an exit.
        self._segments = [
            boundaries.index(layer_range.last) if layer_range.has_exit else None
            for layer_range in stage.layer_ranges
        ]
        self._last_segment = len(boundaries) - 1
        self._early = EarlyRows(stage, scheduler_config.max_num_seqs)
        self._executor = Executor(stage, scheduler_config, max_length, execution)

    @torch.no_grad()
    def run(
        self, output: PipelineSchedulerOutput, passed: PassEnvelope, x: Tensor
    ) -> list[StageResult]:
        """Run a pass through this stage, send it on, and return the results of the stage's exits.

        Send hidden states downstream before evaluating this stage's last exit, and the exits taken
        afterwards, unless the next stage has to know them first.

        Args:
            output: The pass.
            passed: The pass as received, with the exits taken so far, which are updated.
            x: Hidden states [t, h] from the previous stage.
        """
        exited, is_late = passed.exited, passed.is_late
        self._executor.prepare(output.new_blocks, output.zeroed)
        stage_results: list[StageResult] = []
        runs = runs_of(output.ranges)
        queried = [
            QueriedRow(
                make_early_query(frontier.contrast, frontier.slot, frontier.position), frontier.row
            )
            for frontier in output.frontiers
            if frontier.contrast is not None
        ]
        early_queries = [one.query for one in queried]
        if early_queries and self._ranks.stage > 0:
            self._receive_early(early_queries)
        is_early = False
        for index, segment in enumerate(self._segments):
            frozen = [
                frontier.row
                for frontier, exit in zip(output.frontiers, exited, strict=True)
                if frontier.freezes and exit >= 0
            ]
            live = live_runs(runs, frozen)
            batch = self._executor.batch(runs, live)
            if index == 0 and self._ranks.stage == 0:
                tokens = torch.tensor(output.tokens, device=self._stage.device)
                x = self._stage.embed(tokens, batch.positions)
            if queried:
                hidden = self._run_with_early(index, x, batch, queried, runs)
            else:
                hidden = self._executor.run(index, x, batch)
            x = hidden.x
            if index == len(self._segments) - 1:
                is_early = self._may_send_on(output) and (is_late or segment is not None)
            if is_early:
                self._send_on(passed.message(is_late=True), x, early_queries)
            if segment is not None:
                if is_late:
                    self._receive_states(output, passed)
                    is_late = False
                stage_results += self._evaluate_exit(index, segment, output, passed, runs, hidden)
        if is_late:
            self._receive_states(output, passed)
        if is_early:
            self._ranks.send_next_numbers(passed.numbers(num_predicted(output)))
        else:
            self._send_on(passed.message(), x, early_queries)
        return stage_results

    def worker_loop(self) -> None:
        """Run the passes of the leader until it shuts down."""
        ranks = self._ranks
        while True:
            message, x = self._next_pass()
            if not message:
                self._send_on(message, x)
                break
            passed = PassEnvelope.of(message)
            output = decode_pass(passed.encoded)
            stage_results = self.run(output, passed, x)
            if ranks.stage > 0 and ranks.tensor_rank == 0:
                ranks.send_result(encode_results(output.id, stage_results))
        if ranks.stage > 0 and ranks.tensor_rank == 0:
            ranks.send_result(b"")
        ranks.flush()

    def run_first_stage(self, output: PipelineSchedulerOutput) -> list[StageResult]:
        """Start a pass through all stages and return the results of the first stage's exits."""
        passed = PassEnvelope.of_new(output)
        if self._ranks.tensor_size > 1:
            self._ranks.broadcast(passed.message())
        return self.run(output, passed, self._no_rows())

    def shutdown(self) -> None:
        """Shut down the worker ranks."""
        self._ranks.broadcast(b"")
        self._send_on(b"", self._no_rows())
        self._ranks.flush()
        self._ranks.join_listeners()

    def _next_pass(self) -> tuple[bytes, Tensor]:
        if self._ranks.stage == 0:
            return self._ranks.broadcast(), self._no_rows()
        return self._ranks.receive_previous(self._stage.hidden_size, self._stage.dtype)

    def _send_on(self, message: bytes, x: Tensor, early_queries: Items[EarlyQuery] = ()) -> None:
        if self._ranks.stage < self._ranks.num_stages - 1:
            if self._executor.reuses_buffers:  # The send may outlast the next replay.
                x = x.clone()
            self._ranks.send_next(message, x)
            if early_queries:
                for rows in self._early.pack(early_queries, self._stage.layer_ranges[-1].last):
                    self._ranks.send_next(b"", rows)

    def _receive_early(self, early_queries: Items[EarlyQuery]) -> None:
        """Receive the queried rows of the previous stages, which follow the pass."""
        widths = (self._stage.hidden_size, self._stage.num_logits)
        hidden, logits = (
            self._ranks.receive_previous(width, self._stage.dtype)[1] for width in widths
        )
        self._early.unpack(early_queries, self._stage.layer_ranges[0].first - 1, hidden, logits)

    def _run_with_early(
        self, index: int, x: Tensor, batch: Batch, queried: Items[QueriedRow], runs: Items[Run]
    ) -> HiddenRows:
        """Run a layer range and keep the queried rows at its boundaries."""
        return run_with_early(
            self._stage,
            index,
            x,
            batch,
            queried,
            lambda live: self._executor.batch(runs, live),
            self._early.keep,
        )

    def _may_send_on(self, output: PipelineSchedulerOutput) -> bool:
        """Return whether the next stage can start before it knows the exits taken here."""
        is_last = self._ranks.stage == self._ranks.num_stages - 1
        freezes = any(frontier.freezes for frontier in output.frontiers)
        return not is_last and bool(output.frontiers) and not freezes

    def _receive_states(self, output: PipelineSchedulerOutput, passed: PassEnvelope) -> None:
        """Receive what the previous stage's last exit decided after it sent the hidden states."""
        width = num_predicted(output)
        count = len(passed.exited) * (1 + width)
        passed.update(self._ranks.receive_previous_numbers(count), width)

    def _no_rows(self) -> Tensor:
        shape = (0, self._stage.hidden_size)
        return torch.empty(shape, dtype=self._stage.dtype, device=self._stage.device)

    def _evaluate_exit(
        self,
        index: int,
        segment: int,
        output: PipelineSchedulerOutput,
        passed: PassEnvelope,
        runs: Items[Run],
        hidden: HiddenRows,
    ) -> list[StageResult]:
        """Return the results of the exit that ends `segment` for the rows that may exit.

        The segments of rows that exit, and what the others need to know at deeper exits, are
        entered in `passed`.
        """
        numbers: list[int] = []
        queries: list[ExitQuery] = []
        rows: list[Run] = []
        hidden_queries: list[HiddenQuery] = []
        for number, frontier in enumerate(output.frontiers):
            threshold, position = frontier.thresholds[segment], frontier.position
            if passed.exited[number] < 0 and threshold is not None:
                measure = frontier.measure if threshold > 0.0 else logit_measure(frontier.measure)
                predicted = passed.predicted[number]
                if is_hidden(measure, predicted):
                    hidden_queries.append(HiddenQuery(len(rows), measure, threshold, predicted))
                numbers.append(number)
                rows.append(Run(frontier.slot, position, position + 1, frontier.row))
                queries.append(
                    ExitQuery(
                        frontier.slot,
                        position,
                        threshold,
                        measure,
                        frontier.sampling_params,
                        frontier.history,
                        frontier.banned,
                        frontier.contrast,
                        predicted,
                    )
                )
        logits, confidences = self._stage.evaluate_exit(
            index,
            hidden,
            rows,
            hidden_queries,
            lambda live: self._executor.batch(runs, live),
            self._ranks.gather,
        )
        declined, others = split_by_confidence(queries, confidences)
        if self._ranks.tensor_size > 1 and can_decide_from_summaries(queries, hidden_queries):
            summaries = self._ranks.gather(summarize(logits, self._stage.first_id))
            results = decide_from_summaries(summaries, others)
        else:
            logits = self._ranks.gather(logits)
            if any(query.contrast is not None for query in others):
                logits = self._contrast(logits, others)
            results = decide_exits(logits, others)
        stage_results = []
        for number, result in zip(numbers, join_results(declined, results), strict=True):
            is_draft = output.frontiers[number].is_draft and segment != self._last_segment
            if is_draft and not result.is_finite:
                continue  # The final exit decides whether this row counts.
            if result.exited:
                stage_results.append(StageResult(number, segment, result))
                if not is_draft:
                    passed.exited[number] = segment
            else:
                passed.predicted[number] = result.predicted
        return stage_results

    def _contrast(self, logits: Tensor, queries: Items[ExitQuery]) -> Tensor:
        """Return the final logits [r, v] in which the rows of `sled` and `dola` are contrasted."""
        rows = [row for row, query in enumerate(queries) if query.contrast is not None]
        settings = [query.contrast for query in queries]
        early_queries = [
            make_early_query(query.contrast, query.slot, query.position)
            for query in queries
            if query.contrast is not None
        ]

        def early_logits() -> Iterator[EarlyLogits]:
            for numbers in split_queries(early_queries, logits.shape[1]):
                part = self._early.logits([early_queries[number] for number in numbers])
                early = self._ranks.gather(part).unflatten(0, (len(numbers), -1))
                yield [rows[number] for number in numbers], early

        return contrast_rows(logits, early_logits(), settings)
