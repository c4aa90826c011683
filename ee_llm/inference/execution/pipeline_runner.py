"""One stage of a pipeline: runs its pieces for a pass, and asks its exits.

Legend of shapes: t rows, h hidden.
"""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from ee_llm import distributed
from ee_llm.inference.execution.attention import Run, live_runs
from ee_llm.inference.execution.executor import ExecutionConfig, Executor
from ee_llm.inference.execution.runner import runs_of
from ee_llm.inference.execution.stage import ModelStage
from ee_llm.inference.execution.wire import PassEnvelope, decode_pass, encode_pass, encode_results
from ee_llm.inference.exits.decision import (
    ExitQuery,
    decide_exits,
    decide_from_summaries,
    is_short,
    summarize,
)
from ee_llm.inference.scheduling.pipeline_scheduler import PipelineSchedulerOutput, StageResult
from ee_llm.inference.scheduling.scheduler import SchedulerConfig


class PipelineRunner:
    """Runs passes through one stage; every rank of the stage does the same."""

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
        # Of each piece: the number of the exit after it among all exits, None if there is none.
        self._segments = [
            boundaries.index(piece.last) if piece.has_exit else None for piece in stage.pieces
        ]
        self._last_segment = len(boundaries) - 1
        self._executor = Executor(stage, scheduler_config, max_length, execution)

    @torch.no_grad()
    def run(
        self, scheduler_output: PipelineSchedulerOutput, passed: PassEnvelope, x: Tensor
    ) -> list[StageResult]:
        """Run a pass through this stage and hand it on; return what the exits here say.

        x [t, h]: from the stage before. Who is behind gets the rows before the last exit here is
        asked, and hears afterwards who left, unless it has to know that first.
        """
        left, is_late = passed.exited, passed.is_late
        self._executor.prepare(scheduler_output.new_blocks, scheduler_output.zeroed)
        answers: list[StageResult] = []
        runs = runs_of(scheduler_output.ranges)
        is_ahead = False
        for piece, segment in enumerate(self._segments if scheduler_output.ranges else ()):
            frozen = [
                one.row
                for one, where in zip(scheduler_output.frontiers, left, strict=True)
                if one.freezes and where >= 0
            ]
            live = live_runs(runs, frozen)
            batch = self._executor.batch(runs, live)
            if piece == 0 and self._ranks.stage == 0:
                tokens = torch.tensor(scheduler_output.tokens, device=self._stage.device)
                x = self._stage.embed(tokens, batch.positions)
            x, attended = self._executor.run(piece, x, batch)
            if piece == len(self._segments) - 1:
                is_ahead = self._may_hand_on(scheduler_output) and (is_late or segment is not None)
            if is_ahead:
                self._hand_on(passed.message(is_late=True), x)
            if segment is not None:
                if is_late:
                    left[:], is_late = self._ranks.receive_previous_numbers(len(left)), False
                answers += self._ask(piece, segment, scheduler_output, left, runs, x, attended)
        if is_late:
            left[:] = self._ranks.receive_previous_numbers(len(left))
        if is_ahead:
            self._ranks.send_next_numbers(left)
        else:
            self._hand_on(passed.message(), x)
        return answers

    def follow(self) -> None:
        """Run the passes that come from the leader, until it dismisses its followers."""
        ranks = self._ranks
        while True:
            message, x = self._next_pass()
            if not message:
                self._hand_on(message, x)
                break
            passed = PassEnvelope.of(message)
            scheduler_output = decode_pass(passed.encoded)
            answers = self.run(scheduler_output, passed, x)
            if ranks.stage > 0 and ranks.tensor_rank == 0:
                ranks.send_result(encode_results(scheduler_output.id, answers))
        if ranks.stage > 0 and ranks.tensor_rank == 0:
            ranks.send_result(b"")
        ranks.flush()

    def lead(self, scheduler_output: PipelineSchedulerOutput) -> list[StageResult]:
        """Send a pass through all stages; return what the exits of the first one say."""
        passed = PassEnvelope([-1] * len(scheduler_output.frontiers), encode_pass(scheduler_output))
        if self._ranks.tensor_size > 1:
            self._ranks.broadcast(passed.message())
        return self.run(scheduler_output, passed, self._no_rows())

    def dismiss(self) -> None:
        """Let the ranks that follow this one go."""
        self._ranks.broadcast(b"")
        self._hand_on(b"", self._no_rows())
        self._ranks.flush()
        self._ranks.join_listeners()

    def _next_pass(self) -> tuple[bytes, Tensor]:
        if self._ranks.stage == 0:
            return self._ranks.broadcast(), self._no_rows()
        return self._ranks.receive_previous(self._stage.hidden_size, self._stage.dtype)

    def _hand_on(self, message: bytes, x: Tensor) -> None:
        if self._ranks.stage < self._ranks.num_stages - 1:
            if self._executor.reuses_buffers:  # the send may end after the next replay
                x = x.clone()
            self._ranks.send_next(message, x)

    def _may_hand_on(self, scheduler_output: PipelineSchedulerOutput) -> bool:
        """Return whether the next stage can begin before it is known who leaves here."""
        is_last = self._ranks.stage == self._ranks.num_stages - 1
        freezes = any(one.freezes for one in scheduler_output.frontiers)
        return not is_last and bool(scheduler_output.frontiers) and not freezes

    def _no_rows(self) -> Tensor:
        shape = (0, self._stage.hidden_size)
        return torch.empty(shape, dtype=self._stage.dtype, device=self._stage.device)

    def _ask(
        self,
        piece: int,
        segment: int,
        scheduler_output: PipelineSchedulerOutput,
        left: list[int],
        runs: Items[Run],
        x: Tensor,
        attended: Tensor,
    ) -> list[StageResult]:
        """Return what the exit at the end of `segment` says about those who may leave there."""
        asked, queries, judged = [], [], []
        for number, (one, where) in enumerate(zip(scheduler_output.frontiers, left, strict=True)):
            threshold = one.thresholds[segment]
            if where < 0 and threshold is not None:
                asked.append(number)
                judged.append(Run(one.slot, one.position, one.position + 1, one.row))
                queries.append(
                    ExitQuery(
                        one.slot, one.position, threshold, one.measure, one.sampling, one.history
                    )
                )
        batch = None
        if self._stage.has_block(piece):
            batch = self._executor.batch(runs, judged)
        logits = self._stage.logits(piece, x, attended, judged, batch)
        if self._ranks.tensor_size > 1 and is_short(queries):
            summaries = self._ranks.gather(summarize(logits, self._stage.first_id))
            results = decide_from_summaries(summaries, queries)
        else:
            results = decide_exits(self._ranks.gather(logits), queries)
        answers = []
        for number, result in zip(asked, results, strict=True):
            is_draft = scheduler_output.frontiers[number].is_draft and segment != self._last_segment
            if is_draft and not result.is_finite:
                continue  # the final exit decides whether this row counts at all
            if result.exited:
                answers.append(StageResult(number, segment, result))
                if not is_draft:
                    left[number] = segment
        return answers
