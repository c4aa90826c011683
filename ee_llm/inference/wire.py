"""Plans and answers as bytes, between ranks: JSON, which can hold nothing that executes."""

import json
from collections.abc import Sequence as Items
from dataclasses import astuple, dataclass
from typing import Any

from ee_llm.inference.pipeline_scheduler import Answer, Frontier, PipelinePlan
from ee_llm.inference.request import Verdict
from ee_llm.inference.sampling import Sampling
from ee_llm.inference.scheduler import Part, Plan, Span


def encode_plan(plan: Plan) -> bytes:
    """Return a plan as bytes, see `decode_plan`."""
    parts = [[part.segment, _pairs(part.spans), part.frozen] for part in plan.parts]
    fields = [parts, plan.tokens, _pairs(plan.heads), plan.tables, plan.zeroed]
    return json.dumps(fields).encode()


def decode_plan(message: bytes) -> Plan:
    """Return the plan that `encode_plan` made bytes of."""
    parts, tokens, heads, tables, zeroed = json.loads(message)
    return Plan(
        tuple(Part(segment, _spans(spans), tuple(frozen)) for segment, spans, frozen in parts),
        tuple(tokens),
        _spans(heads),
        tuple((slot, index, block) for slot, index, block in tables),
        tuple(zeroed),
    )


def encode_pass(plan: PipelinePlan) -> bytes:
    """Return a pass through a pipeline as bytes, see `decode_pass`."""
    frontiers = [vars(one) | {"sampling": vars(one.sampling)} for one in plan.frontiers]
    fields = [plan.id, _pairs(plan.spans), plan.tokens, frontiers, plan.tables, plan.zeroed]
    return json.dumps(fields).encode()


def decode_pass(message: bytes) -> PipelinePlan:
    """Return the pass that `encode_pass` made bytes of."""
    id, spans, tokens, frontiers, tables, zeroed = json.loads(message)
    return PipelinePlan(
        id,
        _spans(spans),
        tuple(tokens),
        tuple(_frontier(**fields) for fields in frontiers),
        tuple((slot, index, block) for slot, index, block in tables),
        tuple(zeroed),
    )


@dataclass
class Passed:
    """An encoded pass, and where its frontiers have left; it is encoded once for all stages.

    left: of each frontier the segment at whose end its token left for good, -1 before that.
    is_late: whether `left` is sent once more, after the last exit of the stage before was asked.
    """

    left: list[int]
    encoded: bytes
    is_late: bool = False

    def message(self, *, is_late: bool = False) -> bytes:
        """Return it as bytes, see `of`."""
        return json.dumps([self.left, is_late]).encode() + b"\n" + self.encoded

    @classmethod
    def of(cls, message: bytes) -> "Passed":
        """Return what `message` made bytes of."""
        route, encoded = message.split(b"\n", 1)
        left, is_late = json.loads(route)
        return cls(left, encoded, is_late)


def encode_answers(plan_id: int, answers: Items[Answer]) -> bytes:
    """Return a stage's answers to a pass as bytes, see `decode_answers`."""
    return json.dumps([plan_id, [astuple(answer) for answer in answers]]).encode()


def decode_answers(message: bytes) -> tuple[int, list[Answer]]:
    """Return the pass and the answers that `encode_answers` made bytes of."""
    plan_id, answers = json.loads(message)
    return plan_id, [Answer(number, segment, Verdict(*said)) for number, segment, said in answers]


def _frontier(
    sampling: dict[str, Any],
    thresholds: list[float | None],
    history: list[int],
    **fields: Any,
) -> Frontier:
    return Frontier(
        sampling=Sampling(**sampling),
        thresholds=tuple(thresholds),
        history=tuple(history),
        **fields,
    )


def _pairs(spans: tuple[Span, ...]) -> list[tuple[int, int, int]]:
    return [(span.slot, span.start, span.stop) for span in spans]


def _spans(rows: list[list[int]]) -> tuple[Span, ...]:
    return tuple(Span(*row) for row in rows)
