"""Plans as bytes, for the ranks that run them: JSON, which can hold nothing that executes."""

import json

from ee_llm.inference.scheduler import Part, Plan, Span


def encode_plan(plan: Plan) -> bytes:
    """Return a plan as bytes, see `decode_plan`."""
    parts = [[part.segment, _pairs(part.spans), part.frozen] for part in plan.parts]
    return json.dumps([parts, plan.tokens, _pairs(plan.heads), plan.tables]).encode()


def decode_plan(message: bytes) -> Plan:
    """Return the plan that `encode_plan` made bytes of."""
    parts, tokens, heads, tables = json.loads(message)
    return Plan(
        tuple(Part(segment, _spans(spans), tuple(frozen)) for segment, spans, frozen in parts),
        tuple(tokens),
        _spans(heads),
        tuple((slot, index, block) for slot, index, block in tables),
    )


def _pairs(spans: tuple[Span, ...]) -> list[tuple[int, int, int]]:
    return [(span.slot, span.start, span.stop) for span in spans]


def _spans(rows: list[list[int]]) -> tuple[Span, ...]:
    return tuple(Span(*row) for row in rows)
