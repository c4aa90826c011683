"""Choose the exits that save most for a number of exits and a risk."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch

from ee_llm.evaluation.calibration.records import Records
from ee_llm.evaluation.calibration.search import Costs, Point, best_point

MAX_SETS = 100
"""Number of sets of one size up to which all of them are searched."""


@dataclass(frozen=True)
class Recommendation:
    """The best exits for a number of exits, and what they save on the text of the test.

    The thresholds are chosen on the same text, so these figures are estimates, and there is no
    guarantee about other text.

    Attributes:
        num_exits: Greatest number of exits.
        exits: Boundaries of the exits: `num_exits` of them, or fewer if more save nothing.
        thresholds: The least max_probability with which a token takes each of them.
        saving: Share of the cost of a token that they save.
        mean_depth: Mean number of layers of a token.
        final_share: Share of the tokens that take the final exit.
        disagreement: Share of the tokens whose exit disagrees with the final exit.
    """

    num_exits: int
    exits: tuple[int, ...]
    thresholds: tuple[float, ...]
    saving: float
    mean_depth: float
    final_share: float
    disagreement: float


def recommend(
    records: Records,
    costs: Costs,
    limit: float,
    num_exits: int,
    on_size: Callable[[], object] = lambda: None,
    max_sets: int = MAX_SETS,
) -> tuple[Recommendation, ...]:
    """Return the exits to choose for 1, 2, ... `num_exits` of them.

    All sets of exits are searched if there are few. Otherwise, the exit that saves most is added to
    the ones before it, and as long as this saves more, one exit is exchanged for another one.

    Args:
        records: The text of the search, with an exit at each boundary that is possible.
        costs: The cost of each exit.
        limit: Greatest share of tokens that disagree.
        num_exits: Greatest number of exits.
        on_size: Called after each number of exits.
        max_sets: Greatest number of sets of one size that are all searched.
    """
    search = _Search(records, costs, limit)
    best: tuple[int, ...] = ()
    found = []
    for size in range(1, num_exits + 1):
        if comb(len(search.indices), size) <= max_sets:
            larger = search.best(list(combinations(search.indices, size)))
        else:
            larger = search.exchanged(search.best(_with_one_more(best, search.indices)))
        if search.cost(larger) < search.cost(best):
            best = larger
        found.append(_describe(size, records, costs, search.point(best)))
        on_size()
    return tuple(found)


def _with_one_more(used: tuple[int, ...], indices: range) -> list[tuple[int, ...]]:
    return [tuple(sorted((*used, index))) for index in indices if index not in used]


def _with_another(used: tuple[int, ...], indices: range) -> list[tuple[int, ...]]:
    smaller = [tuple(one for one in used if one != left) for left in used]
    sets = (one for rest in smaller for one in _with_one_more(rest, indices))
    return [one for one in sets if one != used]


class _Search:
    """The best thresholds of sets of exits, each searched once."""

    def __init__(self, records: Records, costs: Costs, limit: float) -> None:
        self._records, self._costs, self._limit = records, costs, limit
        self._points: dict[tuple[int, ...], Point] = {}
        self.indices = range(len(records.boundaries))

    def point(self, used: tuple[int, ...]) -> Point:
        if used not in self._points:
            self._points[used] = best_point(self._records, self._costs, used, self._limit)
        return self._points[used]

    def cost(self, used: tuple[int, ...]) -> float:
        return self.point(used).cost

    def best(self, sets: list[tuple[int, ...]]) -> tuple[int, ...]:
        return min(sets, key=self.cost)

    def exchanged(self, used: tuple[int, ...]) -> tuple[int, ...]:
        """Return `used` after exchanges of one exit at a time, as long as they save more."""
        while True:
            better = self.best([used, *_with_another(used, self.indices)])
            if better == used:
                return used
            used = better


def _describe(size: int, records: Records, costs: Costs, point: Point) -> Recommendation:
    outcome = records.outcome(point.thresholds)
    depths = torch.tensor([*records.boundaries, costs.num_layers], dtype=torch.float64)
    pairs = zip(records.boundaries, point.thresholds, strict=True)
    used = {boundary: threshold for boundary, threshold in pairs if threshold is not None}
    return Recommendation(
        size,
        tuple(used),
        tuple(used.values()),
        1 - point.cost / costs.full if used else 0.0,
        float(depths[outcome.exits].mean()),
        float((outcome.exits == len(records.boundaries)).double().mean()),
        point.loss,
    )
