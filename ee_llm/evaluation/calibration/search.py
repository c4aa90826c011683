"""A path of thresholds, from no exits at all to ever more and riskier ones.

A path is chosen on one part of the held-out text and tested on the other (Laufer-Goldenberg et al.,
Efficiently controlling multiple risks with Pareto testing, arXiv 2210.07913), so that the test
needs no correction for the choice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ee_llm.evaluation.calibration.records import Records
from ee_llm.inference.choices import HIDDEN_MEASURES, Measure

NUM_LEVELS = 40
"""Thresholds per exit that the search considers, at quantiles of the exit's confidence."""

MAX_EXITS = 6
"""Number of early exits up to which all subsets of them are searched."""

Thresholds = tuple[float | None, ...]


@dataclass(frozen=True)
class Costs:
    """The cost of a token by its exit, in layers.

    Attributes:
        boundaries: Boundaries of the early exits.
        num_layers: Number of layers of the model.
        head: Cost of computing the logits of one early exit.
        measure: Measure of confidence, which decides which exits compute logits: those of hidden
            states only the exit that the token takes, the shortlist the first exit as well, others
            every exit that the token reaches.
        final_head: The cost of the final exit's head, which lacks the other parts of early ones;
            None if it is that of `head`.
    """

    boundaries: tuple[int, ...]
    num_layers: int
    head: float = 0.0
    measure: Measure = "max_probability"
    final_head: float | None = None

    def of(self, exits: Tensor, thresholds: Thresholds) -> Tensor:
        """Return the cost [t] of tokens that take these exits (as in `Outcome`), float64.

        thresholds: those of the early exits; exits that are off compute nothing.
        """
        depths = torch.tensor([*self.boundaries, self.num_layers], dtype=torch.float64)
        heads = self.heads(thresholds)
        heads[-1] -= 1  # The final exit's own head may cost less.
        costs = depths + self.head * heads
        costs[-1] += self._final_head
        return costs[exits]

    def heads(self, thresholds: Thresholds) -> Tensor:
        """Return how many heads a token computes by its exit [e + 1], the final one last."""
        is_on = torch.tensor([threshold is not None for threshold in (*thresholds, 1.0)])
        num_on = is_on.double().cumsum(0)
        if self.measure in HIDDEN_MEASURES:
            return torch.ones_like(num_on)
        return num_on.clamp(max=2.0) if self.measure == "shortlist" else num_on

    @property
    def full(self) -> float:
        """Cost of a token without early exits."""
        return self.num_layers + self._final_head

    @property
    def _final_head(self) -> float:
        return self.head if self.final_head is None else self.final_head


@dataclass(frozen=True)
class Point:
    """Thresholds with their outcome on the text of the search.

    Attributes:
        thresholds: One per early exit.
        loss: Mean loss of a window.
        cost: Mean cost of a token, in layers.
    """

    thresholds: Thresholds
    loss: float
    cost: float


def find_path(records: Records, costs: Costs, limit: float) -> list[Point]:
    """Return the path that reaches the least cost with a mean loss of at most `limit`.

    The path starts without exits and ends beyond the limit, so that a test may go further if it
    can. Each step lowers the threshold that saves most per additional loss.

    Args:
        records: The text of the search.
        costs: The cost of each exit.
        limit: Greatest mean loss of a window.
    """
    off: Thresholds = (None,) * len(records.boundaries)
    best, best_cost = [_point(records, costs, off)], costs.full
    count = len(records.boundaries)
    for used in [tuple(range(count))] if records.compares_exits else _subsets(count):
        path = _greedy(records, costs, used, 2 * limit)
        reached = min(point.cost for point in path if point.loss <= limit)
        if reached < best_cost:
            best, best_cost = path, reached
    return best


def uniform_path(records: Records, costs: Costs, limit: float) -> list[Point]:
    """Return the path of a single threshold for all exits; see `find_path`."""
    count = len(records.boundaries)
    path = [_point(records, costs, (None,) * count)]
    for level in _levels(records.confidence.flatten(), NUM_LEVELS):
        path.append(_point(records, costs, (level,) * count))
        if path[-1].loss > 2 * limit:
            break
    return path


def best_point(records: Records, costs: Costs, used: tuple[int, ...], limit: float) -> Point:
    """Return the thresholds of the exits `used` with the least cost that the search finds.

    Args:
        records: The text of the search.
        costs: The cost of each exit.
        used: Indices of the exits that have a threshold; the others are off. If nothing is saved,
            all are off.
        limit: Greatest mean loss of a token.
    """
    path = _greedy(records, costs, used, limit)
    return min((point for point in path if point.loss <= limit), key=lambda point: point.cost)


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    """Yield the sets of exits that a path may use, each with at least one exit."""
    if count > MAX_EXITS:
        yield tuple(range(count))
        yield from ((index,) for index in range(count))
        return
    for size in range(1, count + 1):
        yield from combinations(range(count), size)


def _greedy(records: Records, costs: Costs, used: tuple[int, ...], limit: float) -> list[Point]:
    levels = {index: _levels(records.confidence[index], NUM_LEVELS) for index in used}
    off: Thresholds = (None,) * len(records.boundaries)
    path = [_point(records, costs, off)]
    # All exits are evaluated from the first step on, so that a step only adds tokens that exit.
    current = tuple(levels[i].pop(0) if i in used else None for i in range(len(off)))
    path.append(_point(records, costs, current))
    while path[-1].loss <= limit and any(levels.values()):
        steps = []
        for index in used:
            if levels[index]:
                lowered = list(path[-1].thresholds)
                lowered[index] = levels[index][0]
                steps.append((index, _point(records, costs, tuple(lowered))))
        last = path[-1]
        index, point = max(steps, key=lambda step: _worth(last, step[1]))
        levels[index].pop(0)
        path.append(point)
    return path


def _worth(before: Point, after: Point) -> float:
    """Return what a step saves per additional loss; steps that lose nothing come first."""
    saved, lost = before.cost - after.cost, after.loss - before.loss
    return saved / max(lost, 1e-9)


def _levels(confidence: Tensor, count: int) -> list[float]:
    """Return thresholds in decreasing order, from one that hardly any token reaches."""
    shares = torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:]
    ordered = confidence.double().sort(descending=True).values
    places = (shares * (len(ordered) - 1)).long()
    found = dict.fromkeys(ordered[places].tolist())
    return [level for level in found if level > 0.0] or [1.0]


def _point(records: Records, costs: Costs, thresholds: Thresholds) -> Point:
    outcome = records.outcome(thresholds)
    loss = float(records.window_losses(outcome.losses).mean())
    return Point(thresholds, loss, float(costs.of(outcome.exits, thresholds).mean()))
