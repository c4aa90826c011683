"""The result of a sweep: points of speed and quality, the best of them, and how to use it."""

import csv
import io
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ee_llm.errors import RequestError
from ee_llm.evaluation.record import check_record
from ee_llm.evaluation.result import perplexity_of
from ee_llm.evaluation.sweep.candidates import Kind
from ee_llm.evaluation.sweep.plot import Mark, save_front
from ee_llm.inference.choices import Measure
from ee_llm.inference.strategies import Strategy

_TUPLES = ("arguments", "thresholds", "shares")


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
        agreement_low: Lower end of the 95 % confidence interval of `agreement`.
        agreement_high: Upper end of this interval.
        loss: Mean negative log probability of the generated tokens under the full model, in nats.
        layers: Mean number of layers per token; for self-speculative decoding, passes through
            layers, each of which checks several tokens.
        heads: Mean number of heads per token, counted likewise.
        shares: Share of the tokens that each exit decided, the final one last.
        acceptance: Share of drafted tokens that the full model confirmed; None without drafts.
        ideal_speedup: Speed-up over the full model if only reading weights took time, at batch 1.
        speedup: Measured speed-up over the full model: the ratio of medians over rounds.
        speedup_low: First quartile of the speed-ups of single rounds.
        speedup_high: Third quartile of these.
        tokens_per_second: Median speed of a batch after its first tokens.
    """

    family: Kind
    name: str
    arguments: tuple[str, ...]
    thresholds: tuple[float | None, ...]
    measure: Measure
    strategy: Strategy
    num_tokens: int
    agreement: float
    agreement_low: float
    agreement_high: float
    loss: float
    layers: float
    heads: float
    shares: tuple[float, ...]
    acceptance: float | None
    ideal_speedup: float
    speedup: float
    speedup_low: float
    speedup_high: float
    tokens_per_second: float

    @property
    def perplexity(self) -> float:
        """The exponential of the loss; infinite for a loss that is too large for a float."""
        return perplexity_of(self.loss)


@dataclass(frozen=True, repr=False)
class SweepResult:
    """The points of a sweep; `repr` returns them as a table.

    Attributes:
        checkpoint: The checkpoint or run directory, as it was given.
        fingerprint: Fingerprint of its model, 16 hexadecimal digits. It covers the gates if a point
            uses them.
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

    @property
    def recommended(self) -> SweepPoint:
        """The fastest point with an agreement of at least `min_agreement`, or the full model.

        The full model is returned if no other point is both good enough and faster in three
        quarters of the rounds. Without the latter, the luckiest of many equal points would win.
        """
        good = (
            point
            for point in self.points[1:]
            if point.agreement >= self.min_agreement and point.speedup_low > 1.0
        )
        return max(good, key=lambda point: point.speedup, default=self.full)

    @property
    def front(self) -> tuple[SweepPoint, ...]:
        """The points that no other point beats in both speed and agreement, fastest first."""
        found: list[SweepPoint] = []
        for point in sorted(self.points, key=lambda one: (-one.speedup, -one.agreement)):
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
            RequestError: A value is missing, or is not what a sweep writes. The error names it.
        """
        check_record(cls, values)
        found = {field.name: values[field.name] for field in fields(cls)}
        found |= {name: tuple(found[name]) for name in ("inputs", "boundaries")}
        points = []
        for point in found["points"]:
            kept = {field.name: point[field.name] for field in fields(SweepPoint)}
            points.append(SweepPoint(**{**kept, **{name: tuple(kept[name]) for name in _TUPLES}}))
        result = cls(**{**found, "points": tuple(points)})
        result._check()
        return result

    def _check(self) -> None:
        """Raise RequestError unless the points are those of a sweep of one model."""
        if not self.points or self.full.family != "full":
            raise RequestError("points must begin with the full model")
        num_exits = len(self.boundaries)
        for number, point in enumerate(self.points):
            if len(point.thresholds) != num_exits or len(point.shares) != num_exits + 1:
                raise RequestError(
                    f"points[{number}] has {len(point.thresholds)} thresholds and"
                    f" {len(point.shares)} shares, but the model has {num_exits} early exits"
                )

    def save_csv(self, path: str | Path) -> None:
        """Write a row for each point.

        Args:
            path: The file to write.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        names = [name for name in _values(self.full) if name not in ("shares", "thresholds")]
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
        """Return the points as they are drawn."""
        front = self.front
        return [
            Mark(
                point.family,
                point.name,
                (point.speedup_low, point.speedup, point.speedup_high),
                (point.agreement_low, point.agreement, point.agreement_high),
                point in front,
                point is self.recommended,
            )
            for point in self.points
        ]

    def __repr__(self) -> str:
        front = self.front
        rows = [
            (
                *("", "speed-up", "quartiles", "ideal", "agreement", "95 % interval"),
                *("perplexity", "layers", "heads", "tokens/s"),
            )
        ]
        for point in self.points:
            rows.append(
                (
                    ("* " if point in front else "  ") + point.name,
                    f"{point.speedup:.2f}",
                    f"{point.speedup_low:.2f} .. {point.speedup_high:.2f}",
                    f"{point.ideal_speedup:.2f}",
                    f"{point.agreement:.2%}",
                    f"{point.agreement_low:.1%} .. {point.agreement_high:.1%}",
                    f"{point.perplexity:.4g}",
                    f"{point.layers:.2f}",
                    f"{point.heads:.2f}",
                    f"{point.tokens_per_second:.1f}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        return "\n".join(
            [
                f"{self.checkpoint}: {self.num_prompts} prompts of {' '.join(self.inputs)}, up to"
                f" {self.max_tokens} tokens each",
                f"batches of {self.batch_size}, {self.rounds} rounds, {self.dtype}; * is on the"
                " front of speed and agreement",
                "",
                *lines,
                "",
                *self.advice(),
            ]
        )

    def advice(self) -> list[str]:
        """Return the recommendation as lines of text; the last one is the command."""
        best = self.recommended
        wanted = f"{100 * self.min_agreement:.6g}%"
        if best is self.full:
            lines = [f"Recommended: exits off ({self._no_gain(wanted)})."]
        else:
            lines = [
                f"Recommended: {best.name}, {best.speedup:.2f} times as fast as exits off,"
                f" with {best.agreement:.2%} of tokens equal to the full model's (at least {wanted}"
                " wanted)."
            ]
            if best.agreement_low < self.min_agreement:
                lines.append(
                    f"With {best.num_tokens:,} tokens, the agreement may be as low as"
                    f" {best.agreement_low:.1%}. Use more prompts to be surer."
                )
        return [*lines, f"  {self.command(best)}"]

    def _no_gain(self, wanted: str) -> str:
        """Return why no point but the full model can be recommended."""
        faster = [point for point in self.points if point.speedup > 1.0]
        good = [point for point in faster if point.agreement >= self.min_agreement]
        if good:
            best = max(good, key=lambda point: point.speedup)
            return (
                f"no good point is faster in three quarters of the rounds; {best.name} has a median"
                f" speed-up of {best.speedup:.2f} and a first quartile of {best.speedup_low:.2f}."
                " Use more rounds, on an idle machine, to tell them apart"
            )
        if faster:
            closest = max(faster, key=lambda point: point.agreement)
            return (
                f"no faster point agrees with the full model on {wanted} of tokens; the closest is"
                f" {closest.name} with {closest.agreement:.2%}"
            )
        return "nothing measured is faster than the full model"


def measure_of_fingerprint(points: Iterable[SweepPoint]) -> Measure:
    """Return the measure for which `policy_fingerprint` covers all that the points depend on."""
    measures = [point.measure for point in points]
    return "gate" if "gate" in measures else measures[0]


def _values(point: SweepPoint) -> dict[str, Any]:
    values = asdict(point)
    values |= {name: list(values[name]) for name in _TUPLES}
    values["perplexity"] = point.perplexity if point.perplexity < math.inf else None
    return values
