"""One way to decode, with its speed and its quality."""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from ee_llm.evaluation.result import perplexity_of
from ee_llm.evaluation.sweep.candidates import Kind
from ee_llm.inference.choices import Measure
from ee_llm.inference.strategies import Strategy

TUPLES = ("arguments", "thresholds", "shares", "paired_speedups")
"""Attributes of a point that are tuples, and lists in JSON."""


@dataclass(frozen=True)
class SweepPoint:
    """The speed and the quality of one way to decode.

    Attributes:
        family: "full", "thresholds", "policy" or "self-speculative".
        name: Name in tables and plots, such as "exits 8+16 at 0.9".
        arguments: The options of `ee-llm generate` that select it.
        thresholds: Threshold of each early exit; None is off.
        measure: Measure of confidence of the thresholds.
        strategy: The decoding strategy.
        num_tokens: Number of generated tokens that were compared with the full model.
        agreement: Share of them that are the full model's most probable token, given the prompt and
            the generated tokens before it.
        agreement_low: Lower end of the 95 % confidence interval of `agreement`; None for a single
            generation.
        agreement_high: Upper end of this interval, None likewise.
        loss: Mean negative log probability of the generated tokens under the full model, in nats.
        layers: Mean number of layers per token; for self-speculative decoding, passes through
            layers, each of which checks several tokens.
        heads: Mean number of heads per token, counted likewise.
        shares: Share of the tokens that each exit decided, the final one last.
        acceptance: Share of drafted tokens that the full model confirmed; None without drafts.
        ideal_speedup: Speed-up over the full model if only reading weights took time, at batch 1.
        speedup: Measured speed-up over the full model: the ratio of medians over rounds; None if
            nothing followed the first step of any generation, so that there was nothing to time.
        speedup_low: First quartile of the speed-ups of single rounds, None likewise.
        speedup_high: Third quartile of these, None likewise.
        tokens_per_second: Median speed of a batch after its first tokens, None likewise.
        paired_speedups: Speed-ups in pairs of runs made after the rounds, which decide whether the
            point is recommended; empty for a point that was not tested in this way.
    """

    family: Kind
    name: str
    arguments: tuple[str, ...]
    thresholds: tuple[float | None, ...]
    measure: Measure
    strategy: Strategy
    num_tokens: int
    agreement: float
    agreement_low: float | None
    agreement_high: float | None
    loss: float
    layers: float
    heads: float
    shares: tuple[float, ...]
    acceptance: float | None
    ideal_speedup: float
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    tokens_per_second: float | None
    paired_speedups: tuple[float, ...] = ()

    @property
    def tested_speedup(self) -> float | None:
        """Median of `paired_speedups`, which no choice of the luckiest point biases."""
        return statistics.median(self.paired_speedups) if self.paired_speedups else None

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite for a loss that is too large for a float."""
        return perplexity_of(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes and derived figures for JSON; an infinite perplexity is None."""
        values = asdict(self)
        values |= {name: list(values[name]) for name in TUPLES}
        values["perplexity"] = self.perplexity if self.perplexity < math.inf else None
        values["tested_speedup"] = self.tested_speedup
        return values
