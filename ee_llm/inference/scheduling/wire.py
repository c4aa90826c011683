"""Encode scheduler outputs and results for other ranks as JSON, which cannot contain code."""

import json
from collections.abc import Sequence as Items
from dataclasses import astuple, dataclass, replace
from typing import Any

from ee_llm.inference.choices import NUM_PREDICTED
from ee_llm.inference.decoding.settings import CONTRASTS, contrast_fields, strategy_of
from ee_llm.inference.request import ExitResult
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.scheduling.output import (
    EarlyQuery,
    HiddenQuery,
    SchedulerOutput,
    SegmentStep,
    TokenRange,
)
from ee_llm.inference.scheduling.pipeline_scheduler import (
    Frontier,
    PipelineSchedulerOutput,
    StageResult,
)


def encode_scheduler_output(output: SchedulerOutput) -> bytes:
    """Return a scheduler output as bytes for `decode_scheduler_output`."""
    steps = [[step.segment, _pairs(step.ranges), step.frozen] for step in output.steps]
    fields = [
        steps,
        output.tokens,
        _pairs(output.logit_rows),
        output.new_blocks,
        output.zeroed,
        [astuple(query) for query in output.early_queries],
        [astuple(query) for query in output.hidden_queries],
    ]
    return json.dumps(fields).encode()


def decode_scheduler_output(message: bytes) -> SchedulerOutput:
    """Return the scheduler output that `encode_scheduler_output` encoded."""
    steps, tokens, logit_rows, new_blocks, zeroed, early_queries, hidden_queries = json.loads(
        message
    )
    return SchedulerOutput(
        tuple(
            SegmentStep(segment, _ranges(ranges), tuple(frozen))
            for segment, ranges, frozen in steps
        ),
        tuple(tokens),
        _ranges(logit_rows),
        tuple((slot, index, block) for slot, index, block in new_blocks),
        tuple(zeroed),
        tuple(
            EarlyQuery(slot, position, tuple(at), head)
            for slot, position, at, head in early_queries
        ),
        tuple(
            HiddenQuery(row, measure, threshold, tuple(predicted))
            for row, measure, threshold, predicted in hidden_queries
        ),
    )


def encode_pass(output: PipelineSchedulerOutput) -> bytes:
    """Return a pass through a pipeline as bytes for `decode_pass`."""
    frontiers = [
        vars(frontier)
        | {
            "sampling_params": vars(frontier.sampling_params),
            "contrast": frontier.contrast
            and [strategy_of(frontier.contrast), contrast_fields(frontier.contrast)],
        }
        for frontier in output.frontiers
    ]
    fields = [
        output.id,
        _pairs(output.ranges),
        output.tokens,
        frontiers,
        output.new_blocks,
        output.zeroed,
    ]
    return json.dumps(fields).encode()


def decode_pass(message: bytes) -> PipelineSchedulerOutput:
    """Return the pass that `encode_pass` encoded."""
    id, ranges, tokens, frontiers, new_blocks, zeroed = json.loads(message)
    return PipelineSchedulerOutput(
        id,
        _ranges(ranges),
        tuple(tokens),
        tuple(_frontier(**fields) for fields in frontiers),
        tuple((slot, index, block) for slot, index, block in new_blocks),
        tuple(zeroed),
    )


@dataclass
class PassEnvelope:
    """A pass, encoded once for all stages, and what its frontiers have met so far.

    Attributes:
        encoded: The encoded pass.
        exited: For each frontier, the segment at whose end its token exited; -1 before that.
        predicted: For each frontier, the token ids that deeper exits need (see `ExitResult`).
        is_late: Whether `numbers` are sent again once the previous stage has evaluated its last
            exit.
    """

    encoded: bytes
    exited: list[int]
    predicted: list[tuple[int, ...]]
    is_late: bool = False

    @classmethod
    def of_new(cls, output: PipelineSchedulerOutput) -> "PassEnvelope":
        """Return the envelope of a pass that enters the first stage."""
        count = len(output.frontiers)
        return cls(encode_pass(output), [-1] * count, [()] * count)

    @classmethod
    def of(cls, message: bytes) -> "PassEnvelope":
        """Return the envelope that `message` encoded."""
        header, encoded = message.split(b"\n", 1)
        exited, predicted, is_late = json.loads(header)
        return cls(encoded, exited, [tuple(ids) for ids in predicted], is_late)

    def message(self, *, is_late: bool = False) -> bytes:
        """Return the envelope as bytes for `of`."""
        header = json.dumps([self.exited, self.predicted, is_late])
        return header.encode() + b"\n" + self.encoded

    def numbers(self, num_predicted: int) -> list[int]:
        """Return `exited` and `predicted` as numbers, as many as `update` expects.

        num_predicted: greatest number of token ids of a frontier.
        """
        found = list(self.exited)
        for ids in self.predicted:
            found += [*ids, *[-1] * (num_predicted - len(ids))]
        return found

    def update(self, numbers: Items[int], num_predicted: int) -> None:
        """Take over the `numbers` of the previous stage."""
        count = len(self.exited)
        self.exited[:] = numbers[:count]
        for index in range(count):
            start = count + index * num_predicted
            ids = numbers[start : start + num_predicted]
            self.predicted[index] = tuple(token for token in ids if token >= 0)


def num_predicted(output: PipelineSchedulerOutput) -> int:
    """Return how many token ids the measures of a pass's frontiers compare at most."""
    return max((NUM_PREDICTED.get(one.measure, 0) for one in output.frontiers), default=0)


def encode_results(pass_id: int, results: Items[StageResult]) -> bytes:
    """Return a stage's results for a pass as bytes for `decode_results`."""
    return json.dumps([pass_id, [astuple(result) for result in results]]).encode()


def decode_results(message: bytes) -> tuple[int, list[StageResult]]:
    """Return the id of the pass and the results that `encode_results` encoded."""
    pass_id, results = json.loads(message)
    return pass_id, [
        StageResult(frontier, segment, _exit_result(*fields))
        for frontier, segment, fields in results
    ]


def _exit_result(*fields: Any) -> ExitResult:
    *simple, top_logprobs, predicted = fields
    top = tuple((token, logprob) for token, logprob in top_logprobs)
    return replace(ExitResult(*simple), top_logprobs=top, predicted=tuple(predicted))


def _frontier(
    sampling_params: dict[str, Any],
    thresholds: list[float | None],
    history: list[int],
    banned: list[int],
    contrast: list[Any] | None,
    **fields: Any,
) -> Frontier:
    return Frontier(
        sampling_params=SamplingParams(**sampling_params),
        thresholds=tuple(thresholds),
        history=tuple(history),
        banned=tuple(banned),
        contrast=None if contrast is None else CONTRASTS[contrast[0]](**contrast[1]),
        **fields,
    )


def _pairs(ranges: tuple[TokenRange, ...]) -> list[tuple[int, int, int]]:
    return [(token_range.slot, token_range.start, token_range.stop) for token_range in ranges]


def _ranges(rows: list[list[int]]) -> tuple[TokenRange, ...]:
    return tuple(TokenRange(*row) for row in rows)
