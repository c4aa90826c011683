"""The result of a sweep: points of speed and quality, the best of them, and how to use it."""

import csv
import io
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ee_llm.evaluation.result import perplexity_of
from ee_llm.evaluation.sweep.candidates import Kind
from ee_llm.evaluation.sweep.confirm import MAX_TRIES, MIN_ROUNDS, is_faster
from ee_llm.evaluation.sweep.plot import Mark, save_front
from ee_llm.evaluation.sweep.table import advice_of, table_of
from ee_llm.inference.choices import Measure

_TUPLES = ("arguments", "thresholds", "shares", "paired_speedups")
_NO_COLUMNS = ("thresholds", "shares", "paired_speedups")


@dataclass(frozen=True)
class SweepPoint:
    """The speed and the quality of one way to decode.

    Attributes:
        family: "full", "thresholds", "policy" or "self-speculative".
        name: Name in tables and plots, such as "exits 8+16 at 0.9".
        arguments: The options of `ee-llm generate` that select it.
        thresholds: Threshold of each early exit; None is off.
        measure: Measure of confidence of the thresholds.
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


@dataclass(frozen=True, repr=False)
class SweepResult:
    """The points of a sweep; `repr` returns them as a table.

    Attributes:
        checkpoint: The checkpoint or run directory, as it was given.
        fingerprint: Fingerprint of its model, 16 hexadecimal digits.
        inputs: The source of the prompts.
        num_layers: Number of layers of the model.
        boundaries: Boundaries of the early exits.
        head_cost: Cost of an exit's head, in layers: the ratio of their weights.
        num_prompts: Number of prompts.
        max_tokens: Greatest number of generated tokens of a prompt.
        batch_size: Number of prompts that were decoded together.
        rounds: Number of rounds.
        dtype: Name of the dtype of the computation.
        min_agreement: Least agreement of the recommended point.
        points: All points; the first one is the full model.
    """

    checkpoint: str
    fingerprint: str
    inputs: tuple[str, ...]
    num_layers: int
    boundaries: tuple[int, ...]
    head_cost: float
    num_prompts: int
    max_tokens: int
    batch_size: int
    rounds: int
    dtype: str
    min_agreement: float
    points: tuple[SweepPoint, ...]

    @property
    def full(self) -> SweepPoint:
        """The full model, the baseline of all speed-ups."""
        return self.points[0]

    def is_good(self, point: SweepPoint) -> bool:
        """Return whether a point agrees with the full model often enough.

        `min_agreement` is relative to the agreement of the generations of the full model itself,
        which rounding lowers. Drafts are checked by the full model, so they always agree.
        """
        least = self.min_agreement * self.full.agreement
        return point.family == "self-speculative" or point.agreement >= least

    @property
    def recommended(self) -> SweepPoint:
        """The fastest good point that the pairs of runs show to be faster, or the full model."""
        good = [
            (point.tested_speedup or 0.0, point)
            for point in self.points[1:]
            if self.is_good(point) and is_faster(point.paired_speedups)
        ]
        return max(good, key=lambda pair: pair[0])[1] if good else self.full

    @property
    def contenders(self) -> list[int]:
        """Numbers of the good points that seem faster than the full model, the fastest first.

        Few rounds show nothing. At batch 1, neither does a speed-up of a point that reads as many
        weights as the full model: it is noise.
        """
        if self.rounds < MIN_ROUNDS:
            return []
        found = [
            (point.speedup or 0.0, number)
            for number, point in enumerate(self.points)
            if number > 0
            and self.is_good(point)
            and (self.batch_size > 1 or point.ideal_speedup > 1.0)
            and (point.speedup_low or 0.0) > 1.0
        ]
        return [number for _, number in sorted(found, reverse=True)]

    def confirmed(self, run_pairs: Callable[[int], Sequence[float]]) -> "SweepResult":
        """Return the result after tests of the best contenders, up to the first that passes.

        Args:
            run_pairs: Returns the speed-ups of new pairs of runs of a point, by its number.
        """
        result = self
        for number in self.contenders[:MAX_TRIES]:
            points = list(result.points)
            points[number] = replace(points[number], paired_speedups=tuple(run_pairs(number)))
            result = replace(result, points=tuple(points))
            if result.recommended is not result.full:
                break
        return result

    @property
    def front(self) -> tuple[SweepPoint, ...]:
        """The points that no other point beats in both speed and agreement, fastest first."""
        found: list[SweepPoint] = []
        timed = [(point.speedup, point) for point in self.points if point.speedup is not None]
        for _, point in sorted(timed, key=lambda pair: (-pair[0], -pair[1].agreement)):
            if not found or point.agreement > found[-1].agreement:
                found.append(point)
        return tuple(found)

    def command(self, point: SweepPoint | None = None) -> str:
        """Return the command that generates as a point does; None for the recommended one."""
        arguments = (self.recommended if point is None else point).arguments
        return shlex.join(("ee-llm", "generate", "--checkpoint", self.checkpoint, *arguments))

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as values that JSON can represent, and the recommended point.

        An infinite perplexity is None.
        """
        values = asdict(self)
        values |= {name: list(values[name]) for name in ("inputs", "boundaries")}
        values["points"] = [_values(point) for point in self.points]
        return values | {"recommended": self.recommended.name, "command": self.command()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SweepResult":
        """Return the result that `to_dict` turned into these values.

        Raises:
            KeyError: A value is missing.
        """
        found = {field.name: values[field.name] for field in fields(cls)}
        found |= {name: tuple(found[name]) for name in ("inputs", "boundaries")}
        points = []
        for point in found["points"]:
            kept = {field.name: point[field.name] for field in fields(SweepPoint)}
            points.append(SweepPoint(**{**kept, **{name: tuple(kept[name]) for name in _TUPLES}}))
        return cls(**{**found, "points": tuple(points)})

    def save_csv(self, path: str | Path) -> None:
        """Write a row for each point.

        Args:
            path: The file to write.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        names = [name for name in _values(self.full) if name not in _NO_COLUMNS]
        ends = (*self.boundaries, self.num_layers)
        writer.writerow([*names, *(f"share_{end}" for end in ends), "on_front", "is_recommended"])
        front = self.front
        for point in self.points:
            values = _values(point) | {"arguments": shlex.join(point.arguments)}
            flags = (point in front, point is self.recommended)
            row = [values[name] for name in names]
            writer.writerow([*row, *point.shares, *(str(flag).lower() for flag in flags)])
        Path(path).write_text(text.getvalue(), encoding="utf-8")

    def save_plot(self, path: str | Path) -> None:
        """Draw agreement over measured speed-up.

        Args:
            path: File to write, .png or .svg.

        Raises:
            RequestError: The file has another suffix.
        """
        save_front(Path(path), self.marks(), self.min_agreement)

    def marks(self) -> list[Mark]:
        """Return the points as they are drawn: those that could be timed."""
        front = self.front
        return [
            Mark(
                point.family,
                point.name,
                _interval(point.speedup_low, point.speedup, point.speedup_high),
                _interval(point.agreement_low, point.agreement, point.agreement_high),
                point in front,
                point is self.recommended,
            )
            for point in self.points
            if point.speedup is not None
        ]

    def __repr__(self) -> str:
        return table_of(self)

    def advice(self) -> list[str]:
        """Return the recommendation as lines of text; the last one is the command."""
        return advice_of(self)


def _interval(low: float | None, value: float, high: float | None) -> tuple[float, float, float]:
    """Return an interval to draw; one that is not known has no width."""
    return value if low is None else low, value, value if high is None else high


def _values(point: SweepPoint) -> dict[str, Any]:
    values = asdict(point)
    values |= {name: list(values[name]) for name in _TUPLES}
    values["perplexity"] = point.perplexity if point.perplexity < math.inf else None
    values["tested_speedup"] = point.tested_speedup
    return values
