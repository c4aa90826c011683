"""One stage of a pipeline: runs its pieces for a pass, and asks its exits.

Legend of shapes: t rows, h hidden.
"""

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from ee_llm import platform
from ee_llm.inference.attention import Run, live_runs
from ee_llm.inference.execution import Execution, Executor
from ee_llm.inference.judge import Question, is_short, judge, judge_summaries, summarize
from ee_llm.inference.pipeline_scheduler import Answer, PipelinePlan
from ee_llm.inference.runner import runs_of
from ee_llm.inference.scheduler import Limits
from ee_llm.inference.stage import Stage
from ee_llm.inference.wire import Passed, decode_pass, encode_answers, encode_pass


class PipelineRunner:
    """Runs passes through one stage; every rank of the stage does the same."""

    def __init__(
        self,
        stage: Stage,
        boundaries: Items[int],
        limits: Limits,
        max_length: int,
        ranks: platform.ServingGrid,
        execution: Execution | None = None,
    ) -> None:
        self._stage = stage
        self._ranks = ranks
        # Of each piece: the number of the exit after it among all exits, None if there is none.
        self._segments = [
            boundaries.index(piece.last) if piece.has_exit else None for piece in stage.pieces
        ]
        self._last_segment = len(boundaries) - 1
        self._executor = Executor(stage, limits, max_length, execution)

    @torch.no_grad()
    def run(self, plan: PipelinePlan, passed: Passed, x: Tensor) -> list[Answer]:
        """Run a pass through this stage and hand it on; return what the exits here say.

        x [t, h]: from the stage before. Who is behind gets the rows before the last exit here is
        asked, and hears afterwards who left, unless it has to know that first.
        """
        left, is_late = passed.left, passed.is_late
        self._executor.prepare(plan.tables, plan.zeroed)
        answers: list[Answer] = []
        runs = runs_of(plan.spans)
        is_ahead = False
        for piece, segment in enumerate(self._segments if plan.spans else ()):
            frozen = [
                one.row
                for one, where in zip(plan.frontiers, left, strict=True)
                if one.freezes and where >= 0
            ]
            live = live_runs(runs, frozen)
            batch = self._executor.batch(runs, live)
            if piece == 0 and self._ranks.stage == 0:
                tokens = torch.tensor(plan.tokens, device=self._stage.device)
                x = self._stage.embed(tokens, batch.positions)
            x, attended = self._executor.run(piece, x, batch)
            if piece == len(self._segments) - 1:
                is_ahead = self._may_hand_on(plan) and (is_late or segment is not None)
            if is_ahead:
                self._hand_on(passed.message(is_late=True), x)
            if segment is not None:
                if is_late:
                    left[:], is_late = self._ranks.take_over_numbers(len(left)), False
                answers += self._ask(piece, segment, plan, left, runs, x, attended)
        if is_late:
            left[:] = self._ranks.take_over_numbers(len(left))
        if is_ahead:
            self._ranks.pass_on_numbers(left)
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
            passed = Passed.of(message)
            plan = decode_pass(passed.encoded)
            answers = self.run(plan, passed, x)
            if ranks.stage > 0 and ranks.tensor_rank == 0:
                ranks.answer(encode_answers(plan.id, answers))
        if ranks.stage > 0 and ranks.tensor_rank == 0:
            ranks.answer(b"")
        ranks.flush()

    def lead(self, plan: PipelinePlan) -> list[Answer]:
        """Send a pass through all stages; return what the exits of the first one say."""
        passed = Passed([-1] * len(plan.frontiers), encode_pass(plan))
        if self._ranks.tensor_size > 1:
            self._ranks.tell(passed.message())
        return self.run(plan, passed, self._no_rows())

    def dismiss(self) -> None:
        """Let the ranks that follow this one go."""
        self._ranks.tell(b"")
        self._hand_on(b"", self._no_rows())
        self._ranks.flush()
        self._ranks.await_farewells()

    def _next_pass(self) -> tuple[bytes, Tensor]:
        if self._ranks.stage == 0:
            return self._ranks.tell(), self._no_rows()
        return self._ranks.take_over(self._stage.hidden_size, self._stage.dtype)

    def _hand_on(self, message: bytes, x: Tensor) -> None:
        if self._ranks.stage < self._ranks.num_stages - 1:
            if self._executor.reuses_buffers:  # the send may end after the next replay
                x = x.clone()
            self._ranks.pass_on(message, x)

    def _may_hand_on(self, plan: PipelinePlan) -> bool:
        """Return whether the next stage can begin before it is known who leaves here."""
        is_last = self._ranks.stage == self._ranks.num_stages - 1
        freezes = any(one.freezes for one in plan.frontiers)
        return not is_last and bool(plan.frontiers) and not freezes

    def _no_rows(self) -> Tensor:
        shape = (0, self._stage.hidden_size)
        return torch.empty(shape, dtype=self._stage.dtype, device=self._stage.device)

    def _ask(
        self,
        piece: int,
        segment: int,
        plan: PipelinePlan,
        left: list[int],
        runs: Items[Run],
        x: Tensor,
        attended: Tensor,
    ) -> list[Answer]:
        """Return what the exit at the end of `segment` says about those who may leave there."""
        asked, questions, judged = [], [], []
        for number, (one, where) in enumerate(zip(plan.frontiers, left, strict=True)):
            threshold = one.thresholds[segment]
            if where < 0 and threshold is not None:
                asked.append(number)
                judged.append(Run(one.slot, one.position, one.position + 1, one.row))
                questions.append(
                    Question(
                        one.slot, one.position, threshold, one.measure, one.sampling, one.history
                    )
                )
        batch = None
        if self._stage.has_block(piece):
            batch = self._executor.batch(runs, judged)
        logits = self._stage.logits(piece, x, attended, judged, batch)
        if self._ranks.tensor_size > 1 and is_short(questions):
            summaries = self._ranks.gather(summarize(logits, self._stage.first_id))
            verdicts = judge_summaries(summaries, questions)
        else:
            verdicts = judge(self._ranks.gather(logits), questions)
        answers = []
        for number, verdict in zip(asked, verdicts, strict=True):
            is_draft = plan.frontiers[number].is_draft and segment != self._last_segment
            if is_draft and not verdict.is_finite:
                continue  # the final exit decides whether this row counts at all
            if verdict.left:
                answers.append(Answer(number, segment, verdict))
                if not is_draft:
                    left[number] = segment
        return answers
