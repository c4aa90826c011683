"""Report the results of decode.py: a row per batch size and side, tables, JSON and figures."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ee_llm.inference.exits.policy import ExitPolicy
from tools.bench import report
from tools.bench.decode_costs import (
    Costs,
    Regime,
    best_regime,
    declining,
    ideal,
    regime,
    shares,
)
from tools.bench.decode_quality import Certificate, Control
from tools.bench.decode_trace import Steady, Trace, deferral_times, fill_share, steady
from tools.bench.report import Ratio

FULL, EXACT, DEFERRED = "full", "exact, no deferral", "exact, deferral"
SELF_SPECULATIVE, PROPAGATE, TRUNCATED = "self-speculative", "propagate", "truncated"
PEER, ASSISTED = "transformers", "transformers, drafting"


class Sample(NamedTuple):
    """One batch decoded by one side: seconds, new tokens by prompt, and our engine's trace."""

    seconds: float
    prompts: list[tuple[int, ...]]
    tokens: list[tuple[int, ...]]
    trace: Trace | None = None


@dataclass(frozen=True)
class Row:
    """The results of one side at one batch size. Ratios have the quartiles of single rounds.

    `tokens_per_s` counts new tokens; its time includes the prompts. `over_*` are ratios of
    `tokens_per_s`. `steady` is the speed-up over full while all sequences decode (see
    `decode_trace.steady`). `efficiency` is `steady` divided by `ideal`, and `regime_efficiency`
    is `steady` divided by `regime_ideal`. `hold_steps` and `hold_ms` are the mean passes and
    milliseconds for which rows that declined an exit were deferred.
    """

    batch: int
    side: str
    tokens_per_s: Ratio
    over_full: Ratio | None = None
    over_transformers: Ratio | None = None
    over_assisted: Ratio | None = None
    steady: Ratio | None = None
    steady_share: float | None = None
    mean_depth: float | None = None
    ideal: float | None = None
    efficiency: Ratio | None = None
    regime_ideal: float | None = None
    regime_passes: tuple[int, ...] | None = None
    regime_efficiency: Ratio | None = None
    ttft_ms: float | None = None
    gap_p50_ms: float | None = None
    gap_p99_ms: float | None = None
    heads_per_token: float | None = None
    drafts_kept: float | None = None
    hold_steps: float | None = None
    hold_ms: float | None = None
    fill_share: float | None = None
    agreement: float | None = None
    common_prefix: float | None = None
    divergence_rate: float | None = None
    largest_token_margin: float | None = None
    largest_exit_margin: float | None = None
    certificate_pass_rate: float | None = None

    def record(self) -> dict[str, Any]:
        """Return the row for JSON. The quartiles of a ratio have the suffixes _low and _high."""
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Ratio):
                found |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            else:
                found[name] = value
        return found


def make_rows(
    batch: int, samples: Mapping[str, Sequence[Sample]], costs: Costs, num_layers: int
) -> list[Row]:
    """Return the rows of all sides of a batch size, without the quality of the text.

    Args:
        batch: The number of sequences.
        samples: By side, one sample per round; the same index is the same round.
        costs: The measured costs of passes.
        num_layers: The number of layers of the model.
    """
    seconds = {side: [sample.seconds for sample in own] for side, own in samples.items()}
    steady_parts = {
        side: [steady(sample.trace) for sample in own if sample.trace]
        for side, own in samples.items()
    }
    assisted = [own for side, own in seconds.items() if side.startswith(ASSISTED)]
    rows = []
    for side, own in samples.items():
        speeds = [sum(map(len, sample.tokens)) / sample.seconds for sample in own]
        fields: dict[str, Any] = {
            "tokens_per_s": Ratio(statistics.median(speeds), *report.quartiles(speeds)),
            "over_full": report.ratio_of_medians(seconds[FULL], seconds[side]),
        }
        if PEER in seconds:
            fields["over_transformers"] = report.ratio_of_medians(seconds[PEER], seconds[side])
        if side == SELF_SPECULATIVE and assisted:
            fastest = min(assisted, key=statistics.median)
            fields["over_assisted"] = report.ratio_of_medians(fastest, seconds[side])
        traces = [sample.trace for sample in own if sample.trace]
        if traces:
            fields |= _passes(traces, side)
            fields |= _steady(steady_parts[FULL], steady_parts[side])
        if side in (EXACT, DEFERRED, PROPAGATE):
            policy = traces[0].generations[0].policy
            parts = steady_parts[FULL], steady_parts[side]
            fields |= _ideals(batch, policy, *parts, costs, num_layers, side)
        rows.append(Row(batch, side, **fields))
    return rows


def _passes(traces: Sequence[Trace], side: str) -> dict[str, float | None]:
    """Return the fields that summarize the passes and arrivals of all rounds."""
    made = [generation for trace in traces for generation in trace.generations]
    num_prompt = len(made[0].prompt_token_ids)
    gaps = [gap for trace in traces for gap in trace.gaps]
    deferrals = [deferral_times(trace.passes) for trace in traces]
    steps = [n for one in deferrals for n in one.steps]
    times = [n for one in deferrals for n in one.seconds]
    num_drafted = sum(generation.num_drafted for generation in made)
    num_accepted = sum(generation.num_accepted for generation in made)
    return {
        "mean_depth": statistics.mean(exit for one in made for exit in one.exits),
        "ttft_ms": 1e3 * statistics.median(s for t in traces for s in t.first_token_seconds),
        "gap_p50_ms": 1e3 * percentile(gaps, 50) if gaps else None,
        "gap_p99_ms": 1e3 * percentile(gaps, 99) if gaps else None,
        "heads_per_token": statistics.mean(trace.heads_per_token for trace in traces),
        "drafts_kept": num_accepted / num_drafted if num_drafted else None,
        "hold_steps": statistics.mean(steps) if steps else None,
        "hold_ms": 1e3 * statistics.mean(times) if times else None,
        "fill_share": None
        if side == SELF_SPECULATIVE
        else statistics.mean(fill_share(trace.passes, num_prompt) for trace in traces),
    }


def _steady(full: Sequence[Steady], own: Sequence[Steady]) -> dict[str, Any]:
    return {
        "steady": report.ratio_of_medians(_per_token(full), _per_token(own)),
        "steady_share": statistics.mean(one.share for one in own),
    }


class _Bounds(NamedTuple):
    ideal: float
    regime: Regime


def _ideals(
    batch: int,
    policy: ExitPolicy,
    full: Sequence[Steady],
    own: Sequence[Steady],
    costs: Costs,
    num_layers: int,
    side: str,
) -> dict[str, Any]:
    """Return the ideals at the exits of all rounds, and the efficiencies round by round."""

    def bounds(steadies: Sequence[Steady]) -> _Bounds:
        exited = shares([exit for one in steadies for exit in one.exits], policy, num_layers)
        rates = declining(exited)
        no_deferral = (1,) * len(rates)
        found = Regime(regime(costs, rates, batch, no_deferral), no_deferral)
        if side == DEFERRED:
            found = best_regime(costs, rates, batch)
        return _Bounds(ideal(costs, exited, batch), found)

    def efficiency(ideals: Sequence[float]) -> Ratio:
        seconds = [s * bound for s, bound in zip(_per_token(own), ideals, strict=True)]
        return report.ratio_of_medians(_per_token(full), seconds)

    total, each = bounds(own), [bounds([one]) for one in own]
    fields = {"ideal": total.ideal, "efficiency": efficiency([one.ideal for one in each])}
    if side == PROPAGATE:  # S(k) does not apply: above their exit, its rows cost less
        return fields
    return fields | {
        "regime_ideal": total.regime.speedup,
        "regime_passes": total.regime.passes,
        "regime_efficiency": efficiency([one.regime.speedup for one in each]),
    }


def percentile(samples: Sequence[float], percent: int) -> float:
    """Return the smallest sample that at least `percent` % of all samples do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def speed_cells(row: Row) -> dict[str, str]:
    """Return the cells of a row in the first table."""
    passes = ",".join(map(str, row.regime_passes or ()))
    return {
        "B, side": f"{row.batch:>2}  {row.side}",
        "tokens/s": f"{row.tokens_per_s.value:,.0f}",
        "over full [quartiles]": _shown(row.over_full),
        "over transformers": _shown(row.over_transformers),
        "depth": _number(row.mean_depth, 2),
        "steady": _number(row.steady and row.steady.value, 3),
        "ideal": _number(row.ideal, 3),
        "efficiency": _number(row.efficiency and row.efficiency.value, 3),
        "S(k)": f"{_number(row.regime_ideal, 3)} ({passes})" if row.regime_ideal else "",
        "of S(k)": _number(row.regime_efficiency and row.regime_efficiency.value, 3),
    }


def latency_cells(row: Row) -> dict[str, str]:
    """Return the cells of a row in the second table."""
    margins = (row.largest_token_margin, row.largest_exit_margin)
    return {
        "B, side": f"{row.batch:>2}  {row.side}",
        "first ms": _number(row.ttft_ms, 1),
        "gap p50": _number(row.gap_p50_ms, 2),
        "p99 ms": _number(row.gap_p99_ms, 2),
        "heads": _number(row.heads_per_token, 2),
        "kept": _percent(row.drafts_kept, 0),
        "deferred": _number(row.hold_steps, 2),
        "ms": _number(row.hold_ms, 2),
        "fill rows": _percent(row.fill_share, 1),
        "as dense": _number(row.agreement, 3),
        "prefix": _number(row.common_prefix, 1),
        "diverging": _percent(row.divergence_rate, 2),
        "margins": "" if margins[0] is None else " / ".join(f"{m or 0:.1g}" for m in margins),
    }


def control_cells(control: Control) -> dict[str, str]:
    """Return the cells of a control in the third table."""
    return {
        "exits chosen by": control.name,
        "text": control.text,
        "mean depth": f"{control.mean_depth:.2f}",
        "as dense": f"{control.agreement:.3f}",
    }


def make_figures(rows: Iterable[Row], certificates: Iterable[Certificate]) -> dict[str, float]:
    """Return the figures of the batch sizes and sides that were measured."""
    by_name = {(row.batch, row.side): row for row in rows}
    figures: dict[str, float] = {}

    def put(name: str, batch: int, side: str, field: str) -> None:
        ratio = getattr(by_name.get((batch, side)), field, None)
        if ratio is not None:
            figures[name] = ratio.value

    put("full_vs_hf_b1", 1, FULL, "over_transformers")
    put("full_vs_hf_b16", 16, FULL, "over_transformers")
    put("exact_efficiency_b1", 1, EXACT, "efficiency")
    for batch in (8, 16, 32):
        put(f"exact_regime_efficiency_b{batch}", batch, DEFERRED, "regime_efficiency")
    deferred = [row for row in by_name.values() if row.side == DEFERRED]
    figures["exact_vs_full_min"] = min(row.over_full.value for row in deferred if row.over_full)
    figures["exact_vs_full_steady_min"] = min(row.steady.value for row in deferred if row.steady)
    put("verify_vs_hf_assisted_b1", 1, SELF_SPECULATIVE, "over_assisted")
    found = list(certificates)
    num_generations = sum(one.num_generations for one in found)
    figures["certificate_pass_rate"] = sum(one.num_passed for one in found) / num_generations
    num_tokens = sum(one.num_tokens for one in found)
    figures["divergence_rate"] = sum(one.num_divergent for one in found) / num_tokens
    return figures


def _per_token(steadies: Sequence[Steady]) -> list[float]:
    return [one.seconds_per_token for one in steadies]


def _shown(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.value:.2f} [{ratio.low:.2f} .. {ratio.high:.2f}]"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int) -> str:
    return "" if value is None else f"{100 * value:.{digits}f} %"
