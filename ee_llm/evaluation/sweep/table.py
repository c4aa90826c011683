"""The result of a sweep as text: its table, and what to set."""

from typing import TYPE_CHECKING

from ee_llm.evaluation.sweep.confirm import MIN_ROUNDS, needed_wins, num_wins

if TYPE_CHECKING:
    from ee_llm.evaluation.sweep.result import SweepPoint, SweepResult

_HEAD = (
    *("", "speed-up", "quartiles", "tested", "ideal", "agreement", "95 % interval"),
    *("perplexity", "layers", "heads", "tokens/s"),
)


def table_of(result: "SweepResult") -> str:
    """Return a table with a row for each point, and the advice."""
    front = result.front
    rows = [_HEAD, *(_row(point, point in front) for point in result.points)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join(
        [
            f"{result.checkpoint}: {result.num_prompts} prompts of {' '.join(result.inputs)}, up to"
            f" {result.max_tokens} tokens each",
            f"batches of {result.batch_size}, {result.rounds} rounds, {result.dtype}; * is on the"
            " front of speed and agreement",
            "",
            *lines,
            "",
            *result.advice(),
        ]
    )


def _row(point: "SweepPoint", is_on_front: bool) -> tuple[str, ...]:
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


def advice_of(result: "SweepResult") -> list[str]:
    """Return the recommendation as lines of text; the last one is the command."""
    best = result.recommended
    if best is result.full:
        lines = [f"Recommended: exits off ({_no_gain(result)})."]
    else:
        pairs = best.paired_speedups
        lines = [
            f"Recommended: {best.name}, {best.tested_speedup:.2f} times as fast as exits off"
            f" (faster in {num_wins(pairs)} of {len(pairs)} pairs of runs after the choice), with"
            f" {best.agreement:.2%} of tokens equal to the full model's (at least"
            f" {_wanted(result)} wanted)."
        ]
        low = best.agreement_low
        if best.family != "self-speculative" and (low is None or low < result.min_agreement):
            bound = "is not known" if low is None else f"may be as low as {low:.1%}"
            lines.append(
                f"With {best.num_tokens:,} tokens, the agreement on other text {bound}."
                " Use more prompts to be surer."
            )
    return [*lines, f"  {result.command(best)}"]


def _wanted(result: "SweepResult") -> str:
    wanted = f"{100 * result.min_agreement:.6g}%"
    full = result.full.agreement
    return wanted if full == 1.0 else f"{wanted} of the {full:.2%} of the full model itself"


def _no_gain(result: "SweepResult") -> str:
    """Return why no point but the full model can be recommended."""
    faster = [(point.speedup, point) for point in result.points if (point.speedup or 0.0) > 1.0]
    good = [pair for pair in faster if result.is_good(pair[1])]
    if good:
        return _not_shown(result, max(good, key=lambda pair: pair[0] or 0.0)[1])
    if faster:
        closest = max((point for _, point in faster), key=lambda point: point.agreement)
        return (
            f"no faster point agrees with the full model on {_wanted(result)} of tokens; the"
            f" closest is {closest.name} with {closest.agreement:.2%}"
        )
    return "nothing measured is faster than the full model"


def _not_shown(result: "SweepResult", best: "SweepPoint") -> str:
    """Return why a good point, of which `best` is the fastest, is not shown to be faster."""
    seen = f"{best.name} has a median speed-up of {best.speedup:.2f}"
    if result.rounds < MIN_ROUNDS:
        return f"{seen}, but {result.rounds} rounds show little. Use {MIN_ROUNDS} rounds or more"
    tested = [point for point in result.points if point.paired_speedups]
    if tested:
        last = max(tested, key=lambda point: num_wins(point.paired_speedups))
        pairs = last.paired_speedups
        return (
            f"no good point is reliably faster; in {len(pairs)} pairs of runs, {last.name} was"
            f" faster in {num_wins(pairs)}, and {needed_wins(len(pairs))} are needed. Use more"
            " rounds, on an idle machine, to find small differences"
        )
    if result.batch_size == 1 and best.ideal_speedup <= 1.0:
        return (
            f"{seen}, but that is noise: it reads as many weights as the full model, with an ideal"
            f" speed-up of {best.ideal_speedup:.2f}"
        )
    return (
        f"no good point seems faster in three quarters of the rounds; {seen} and a first quartile"
        f" of {best.speedup_low:.2f}. Use more rounds, on an idle machine, to tell them apart"
    )
