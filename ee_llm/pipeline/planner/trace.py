"""Convert a simulated or measured pipeline timeline for chrome://tracing and Perfetto."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from ee_llm.pipeline.plan import Op
from ee_llm.pipeline.simulate import Span

Part = tuple[float, float]

_KINDS = {Op.FORWARD: "forward", Op.BACKWARD: "backward", Op.WEIGHT: "weight"}


def chrome_trace(
    ranks: Sequence[Sequence[Span]],
    *,
    filling: Collection[int] = (),
    exit_part: Callable[[Span], Part | None] = lambda span: None,
    seconds: float = 1.0,
    notes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the spans of every rank as a trace in Chrome's JSON format, one thread per rank.

    Args:
        ranks: The spans of each rank, from a simulated `Timeline` or from synchronized clocks. The
            earliest start becomes 0.
        filling: The microbatches that fill bubbles, which get a separate category.
        exit_part: Returns the time of the exits within a span, which become a slice inside it.
        seconds: Duration of one unit of the spans' time.
        notes: Further data for the file.
    """
    origin = min((span.start for spans in ranks for span in spans), default=0.0)

    def slice_(name: str, category: str, rank: int, part: Part, **arguments: int) -> dict[str, Any]:
        return {
            "name": name,
            "cat": category,
            "ph": "X",
            "ts": 1e6 * seconds * (part[0] - origin),
            "dur": 1e6 * seconds * (part[1] - part[0]),
            "pid": 0,
            "tid": rank,
            "args": arguments,
        }

    events = [_metadata("process_name", 0, name="pipeline")]
    for rank, spans in enumerate(ranks):
        events.append(_metadata("thread_name", rank, name=f"rank {rank}"))
        events.append(_metadata("thread_sort_index", rank, sort_index=rank))
        for span in spans:
            stage, op, microbatch = span.action
            kind = f"{'filling ' if microbatch in filling else ''}{_KINDS[op]}"
            where = {"stage": stage, "microbatch": microbatch}
            events.append(slice_(str(span.action), kind, rank, (span.start, span.end), **where))
            part = exit_part(span)
            if part is not None:
                events.append(slice_(f"exits of {span.action}", "exit", rank, part, **where))
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": notes or {}}


def _metadata(kind: str, rank: int, **arguments: Any) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 0, "tid": rank, "args": arguments}
