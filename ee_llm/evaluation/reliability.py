"""How well the confidence of an exit predicts that it is right: bins and calibration error."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ee_llm.evaluation.measure import COLUMNS

NUM_BINS = 15
"""Number of equal-width bins of the confidence, as in Guo et al. (arXiv 1706.04599)."""


@dataclass(frozen=True)
class ReliabilityBin:
    """Tokens whose confidence is within one interval.

    Attributes:
        num_tokens: Number of tokens.
        confidence: Mean confidence of the exit.
        agreement: Share of them where the exit's most probable token is that of the final exit.
    """

    num_tokens: int
    confidence: float
    agreement: float


def calibration_error(bins: Iterable[ReliabilityBin]) -> float | None:
    """Return the expected calibration error, sum_b n_b / n |agreement_b - confidence_b|.

    It is that of Guo et al., On calibration of modern neural networks, 2017 (arXiv 1706.04599),
    with agreement with the final exit in place of accuracy. None without tokens.
    """
    found = list(bins)
    total = sum(one.num_tokens for one in found)
    if total == 0:
        return None
    gaps = (one.num_tokens * abs(one.agreement - one.confidence) for one in found)
    return math.fsum(gaps) / total


class Reliability:
    """Collects the bins of every early exit; see `measure.Collector`.

    Empty bins are left out. The final exit has no bins, because it always agrees with itself.
    """

    def __init__(self, num_bins: int = NUM_BINS) -> None:
        self._num_bins = num_bins
        self._sums: dict[int, Tensor] = {}  # of each exit: count, confidence, agreement [3, bins]

    def add(self, columns: dict[int, Tensor]) -> None:
        for boundary in sorted(columns)[:-1]:
            found = columns[boundary]
            confidence = found[COLUMNS.index("confidence")]
            self.add_tokens(boundary, confidence, found[COLUMNS.index("agreement")])

    def add_tokens(self, boundary: int, confidence: Tensor, agreement: Tensor) -> None:
        """Take the tokens of an early exit.

        Args:
            boundary: Boundary of the exit.
            confidence: Its confidence [t], float64.
            agreement: 1 [t] if it agrees with the final exit, else 0, float64.
        """
        places = (confidence * self._num_bins).long().clamp(0, self._num_bins - 1)
        values = torch.stack([torch.ones_like(confidence), confidence, agreement])
        sums = self._sums.setdefault(boundary, values.new_zeros(3, self._num_bins))
        sums.index_add_(1, places, values)

    def check(self, num_windows: int) -> None:
        pass  # One window is enough.

    def bins(self) -> dict[int, list[ReliabilityBin]]:
        """Return the bins of each early exit, least confident first."""
        return {
            boundary: [
                ReliabilityBin(int(count), confidence / count, agreement / count)
                for count, confidence, agreement in sums.T.tolist()
                if count
            ]
            for boundary, sums in self._sums.items()
        }

    def result(self) -> list[dict[str, Any]]:
        return [
            {
                "boundary": boundary,
                "bins": [[one.num_tokens, one.confidence, one.agreement] for one in found],
            }
            for boundary, found in self.bins().items()
        ]
