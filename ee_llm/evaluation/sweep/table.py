"""The points of a sweep as a table."""

from collections.abc import Sequence

from ee_llm.evaluation.result import aligned
from ee_llm.evaluation.sweep.point import SweepPoint

_HEAD = (
    *("", "speed-up", "quartiles", "tested", "ideal", "agreement", "95 % interval"),
    *("perplexity", "layers", "heads", "tokens/s"),
)


def table_of(points: Sequence[SweepPoint], front: Sequence[SweepPoint]) -> list[str]:
    """Return the lines of a table with a row for each point; those of the front are marked."""
    return aligned([_HEAD, *(_row(point, point in front) for point in points)], is_named=True)


def _row(point: SweepPoint, is_on_front: bool) -> tuple[str, ...]:
    return (
        ("* " if is_on_front else "  ") + point.name,
        "not timed" if point.speedup is None else f"{point.speedup:.2f}",
        _interval(point.speedup_low, point.speedup_high, ".2f"),
        "-" if point.tested_speedup is None else f"{point.tested_speedup:.2f}",
        f"{point.ideal_speedup:.2f}",
        f"{point.agreement:.2%}",
        _interval(point.agreement_low, point.agreement_high, ".1%"),
        f"{point.perplexity:.4g}",
        f"{point.layers:.2f}",
        f"{point.heads:.2f}",
        "-" if point.tokens_per_second is None else f"{point.tokens_per_second:.1f}",
    )


def _interval(low: float | None, high: float | None, style: str) -> str:
    return "-" if low is None or high is None else f"{low:{style}} .. {high:{style}}"
