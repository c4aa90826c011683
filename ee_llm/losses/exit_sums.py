"""Sums of the losses and predictions of exits, and the results of a validation."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Validation(NamedTuple):
    """Results of every exit by boundary, over the valid tokens of the validation data.

    Attributes:
        losses: Mean cross entropy in nats.
        agreement: Share of tokens for which the most probable token of the exit is that of the
            final exit; without the final exit.
    """

    losses: dict[int, float]
    agreement: dict[int, float]


class ExitSums(NamedTuple):
    """Sums of an exit over valid tokens."""

    loss: float = 0.0
    tokens: float = 0.0
    agreeing: float = 0.0

    def mean_loss(self) -> float:
        """Return the loss per valid token, NaN without valid tokens."""
        return self.loss / self.tokens if self.tokens else math.nan

    def agreement(self) -> float:
        """Return the share of valid tokens that agree with the final exit, or NaN."""
        return self.agreeing / self.tokens if self.tokens else math.nan


def add_sums(totals: dict[int, ExitSums], sums: Mapping[int, ExitSums]) -> None:
    """Add the sums of each exit to `totals`."""
    for boundary, values in sums.items():
        totals[boundary] = ExitSums(*map(sum, zip(totals[boundary], values, strict=True)))


def validation_of(totals: Mapping[int, ExitSums]) -> Validation:
    """Return the results of a validation from the sums of each exit, the final one last."""
    return Validation(
        losses={boundary: sums.mean_loss() for boundary, sums in totals.items()},
        agreement={boundary: totals[boundary].agreement() for boundary in [*totals][:-1]},
    )
