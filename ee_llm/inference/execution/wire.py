"""Plans and answers as bytes, between ranks: JSON, which can hold nothing that executes."""

import json
from collections.abc import Sequence as Items
from dataclasses import astuple, dataclass
from typing import Any

from ee_llm.inference.request import ExitResult
from ee_llm.inference.sampling.sampler import SamplingParams
from ee_llm.inference.scheduling.pipeline_scheduler import (
    Frontier,
    PipelineSchedulerOutput,
    StageResult,
)
from ee_llm.inference.scheduling.scheduler import SchedulerOutput, SegmentStep, TokenRange


def encode_scheduler_output(scheduler_output: SchedulerOutput) -> bytes:
    """Return a plan as bytes, see `decode_scheduler_output`."""
    steps = [[step.segment, _pairs(step.ranges), step.frozen] for step in scheduler_output.steps]
    fields = [
        steps,
        scheduler_output.tokens,
        _pairs(scheduler_output.logit_rows),
        scheduler_output.new_blocks,
        scheduler_output.zeroed,
    ]
    return json.dumps(fields).encode()


def decode_scheduler_output(message: bytes) -> SchedulerOutput:
    """Return the plan that `encode_scheduler_output` made bytes of."""
    steps, tokens, heads, tables, zeroed = json.loads(message)
    return SchedulerOutput(
        tuple(
            SegmentStep(segment, _spans(ranges), tuple(frozen)) for segment, ranges, frozen in steps
        ),
        tuple(tokens),
        _spans(heads),
        tuple((slot, index, block) for slot, index, block in tables),
        tuple(zeroed),
    )


def encode_pass(scheduler_output: PipelineSchedulerOutput) -> bytes:
    """Return a pass through a pipeline as bytes, see `decode_pass`."""
    frontiers = [vars(one) | {"sampling": vars(one.sampling)} for one in scheduler_output.frontiers]
    fields = [
        scheduler_output.id,
        _pairs(scheduler_output.ranges),
        scheduler_output.tokens,
        frontiers,
        scheduler_output.new_blocks,
        scheduler_output.zeroed,
    ]
    return json.dumps(fields).encode()


def decode_pass(message: bytes) -> PipelineSchedulerOutput:
    """Return the pass that `encode_pass` made bytes of."""
    id, ranges, tokens, frontiers, tables, zeroed = json.loads(message)
    return PipelineSchedulerOutput(
        id,
        _spans(ranges),
        tuple(tokens),
        tuple(_frontier(**fields) for fields in frontiers),
        tuple((slot, index, block) for slot, index, block in tables),
        tuple(zeroed),
    )


@dataclass
class PassEnvelope:
    """An encoded pass, and where its frontiers have left; it is encoded once for all stages.

    left: of each frontier the segment at whose end its token left for good, -1 before that.
    is_late: whether `left` is sent once more, after the last exit of the stage before was asked.
    """

    exited: list[int]
    encoded: bytes
    is_late: bool = False

    def message(self, *, is_late: bool = False) -> bytes:
        """Return it as bytes, see `of`."""
        return json.dumps([self.exited, is_late]).encode() + b"\n" + self.encoded

    @classmethod
    def of(cls, message: bytes) -> "PassEnvelope":
        """Return what `message` made bytes of."""
        route, encoded = message.split(b"\n", 1)
        left, is_late = json.loads(route)
        return cls(left, encoded, is_late)


def encode_results(plan_id: int, answers: Items[StageResult]) -> bytes:
    """Return a stage's answers to a pass as bytes, see `decode_results`."""
    return json.dumps([plan_id, [astuple(answer) for answer in answers]]).encode()


def decode_results(message: bytes) -> tuple[int, list[StageResult]]:
    """Return the pass and the answers that `encode_results` made bytes of."""
    plan_id, answers = json.loads(message)
    return plan_id, [
        StageResult(number, segment, ExitResult(*said)) for number, segment, said in answers
    ]


def _frontier(
    sampling: dict[str, Any],
    thresholds: list[float | None],
    history: list[int],
    **fields: Any,
) -> Frontier:
    return Frontier(
        sampling=SamplingParams(**sampling),
        thresholds=tuple(thresholds),
        history=tuple(history),
        **fields,
    )


def _pairs(ranges: tuple[TokenRange, ...]) -> list[tuple[int, int, int]]:
    return [(token_range.slot, token_range.start, token_range.stop) for token_range in ranges]


def _spans(rows: list[list[int]]) -> tuple[TokenRange, ...]:
    return tuple(TokenRange(*row) for row in rows)
