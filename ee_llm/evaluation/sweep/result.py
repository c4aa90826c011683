"""The result of a sweep: points of speed and quality, the best of them, and how to use it."""

import csv
import io
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ee_llm.errors import RequestError
from ee_llm.evaluation.options import shown_inputs
from ee_llm.evaluation.record import check_record
from ee_llm.evaluation.sweep.confirm import (
    MAX_TRIES,
    MIN_ROUNDS,
    is_faster,
    needed_wins,
    num_wins,
)
from ee_llm.evaluation.sweep.plot import Mark, save_front
from ee_llm.evaluation.sweep.point import TUPLES, SweepPoint
from ee_llm.evaluation.sweep.table import table_of
from ee_llm.inference.choices import Measure

_LISTS = ("inputs", "boundaries", "execution")
_NO_COLUMNS = ("thresholds", "shares", "paired_speedups")


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
        execution: Options of `ee-llm generate` for the same execution, without default values.
        min_agreement: Least agreement of the recommended point, relative to that of the full model.
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
    execution: tuple[str, ...]
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
        """Return a command that generates as a point does; None for the recommended one."""
        arguments = (self.recommended if point is None else point).arguments
        words = ("--checkpoint", self.checkpoint, *arguments, *self.execution, "--prompt", "Hello")
        return shlex.join(("ee-llm", "generate", *words))

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as values that JSON can represent, and the recommended point.

        An infinite perplexity is None.
        """
        values = asdict(self)
        values |= {name: list(values[name]) for name in _LISTS}
        values["points"] = [point.to_dict() for point in self.points]
        return values | {"recommended": self.recommended.name, "command": self.command()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SweepResult":
        """Return the result that `to_dict` turned into these values.

        Raises:
            RequestError: A value is missing, or is not what a sweep writes. The error names it.
        """
        check_record(cls, values)
        found = {field.name: values[field.name] for field in fields(cls)}
        found |= {name: tuple(found[name]) for name in _LISTS}
        points = []
        for point in found["points"]:
            kept = {field.name: point[field.name] for field in fields(SweepPoint)}
            points.append(SweepPoint(**{**kept, **{name: tuple(kept[name]) for name in TUPLES}}))
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
        names = [name for name in self.full.to_dict() if name not in _NO_COLUMNS]
        ends = (*self.boundaries, self.num_layers)
        writer.writerow([*names, *(f"share_{end}" for end in ends), "on_front", "is_recommended"])
        front = self.front
        for point in self.points:
            values = point.to_dict() | {"arguments": shlex.join(point.arguments)}
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
        return "\n".join(
            [
                f"{self.checkpoint}: {self.num_prompts} prompts of {shown_inputs(self.inputs)},"
                f" up to {self.max_tokens} tokens each",
                f"batches of {self.batch_size}, {self.rounds} rounds, {self.dtype}; * is on the"
                " front of speed and agreement",
                "",
                *table_of(self.points, self.front),
                "",
                *self.advice(),
            ]
        )

    def advice(self) -> list[str]:
        """Return the recommendation as lines of text; the last one is the command."""
        best = self.recommended
        if best is self.full:
            lines = [f"Recommended: exits off ({self._no_gain()})."]
        else:
            pairs = best.paired_speedups
            lines = [
                f"Recommended: {best.name}, {best.tested_speedup:.2f} times as fast as exits off"
                f" (faster in {num_wins(pairs)} of {len(pairs)} pairs of runs after the choice),"
                f" with {best.agreement:.2%} of tokens equal to the full model's (at least"
                f" {self._wanted()} wanted)."
            ]
            low = best.agreement_low
            if best.family != "self-speculative" and (low is None or low < self.min_agreement):
                bound = "is not known" if low is None else f"may be as low as {low:.1%}"
                lines.append(
                    f"With {best.num_tokens:,} tokens, the agreement on other text {bound}."
                    " Use more prompts to be surer."
                )
        return [*lines, f"  {self.command(best)}"]

    def _wanted(self) -> str:
        wanted = f"{100 * self.min_agreement:.6g}%"
        full = self.full.agreement
        return wanted if full == 1.0 else f"{wanted} of the {full:.2%} of the full model itself"

    def _no_gain(self) -> str:
        """Return why no point but the full model can be recommended."""
        faster = [(point.speedup, point) for point in self.points if (point.speedup or 0.0) > 1.0]
        good = [pair for pair in faster if self.is_good(pair[1])]
        if good:
            return self._not_shown(max(good, key=lambda pair: pair[0] or 0.0)[1])
        if faster:
            closest = max((point for _, point in faster), key=lambda point: point.agreement)
            return (
                f"no faster point agrees with the full model on {self._wanted()} of tokens; the"
                f" closest is {closest.name} with {closest.agreement:.2%}"
            )
        return "nothing measured is faster than the full model"

    def _not_shown(self, best: SweepPoint) -> str:
        """Return why a good point, of which `best` is the fastest, is not shown to be faster."""
        seen = f"{best.name} has a median speed-up of {best.speedup:.2f}"
        if self.rounds < MIN_ROUNDS:
            return f"{seen}, but {self.rounds} rounds show little. Use {MIN_ROUNDS} rounds or more"
        tested = [point for point in self.points if point.paired_speedups]
        if tested:
            last = max(tested, key=lambda point: num_wins(point.paired_speedups))
            pairs = last.paired_speedups
            return (
                f"no good point is reliably faster; in {len(pairs)} pairs of runs, {last.name} was"
                f" faster in {num_wins(pairs)}, and {needed_wins(len(pairs))} are needed. Use more"
                " rounds, on an idle machine, to find small differences"
            )
        if self.batch_size == 1 and best.ideal_speedup <= 1.0:
            return (
                f"{seen}, but that is noise: it reads as many weights as the full model, with an"
                f" ideal speed-up of {best.ideal_speedup:.2f}"
            )
        return (
            f"no good point seems faster in three quarters of the rounds; {seen} and a first"
            f" quartile of {best.speedup_low:.2f}. Use more rounds, on an idle machine, to tell"
            " them apart"
        )


def measure_of_fingerprint(points: Iterable[SweepPoint]) -> Measure:
    """Return the measure for which `policy_fingerprint` covers all that the points depend on."""
    measures = [point.measure for point in points]
    return "gate" if "gate" in measures else measures[0]


def _interval(low: float | None, value: float, high: float | None) -> tuple[float, float, float]:
    """Return an interval to draw; one that is not known has no width."""
    return value if low is None else low, value, value if high is None else high
