"""Confidences of a sequence's rows at one exit after another, from the reference model.

Legend of shapes: n rows that draw a token, r rows of these, s sequence, h hidden, v vocabulary, k
candidates.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.choices import logit_measure
from ee_llm.inference.exits.confidence import (
    OF_LOGITS,
    agreement,
    candidates,
    saturation,
    shortlist,
)
from ee_llm.inference.exits.policy import ExitPolicy


class ExitRows(NamedTuple):
    """The rows of a sequence at an exit.

    Attributes:
        boundary: Boundary of the exit.
        hidden: Input [s, h] of its output weight.
        x: Residual stream [s, h] at the boundary.
        before: Residual stream [s, h] at the boundary before it.
    """

    boundary: int
    hidden: Tensor
    x: Tensor
    before: Tensor


def walk_exits(
    model: ReferenceModel,
    tokens: Tensor,
    frozen_at: Sequence[int] | None,
    boundaries: Sequence[int],
) -> Iterator[ExitRows]:
    """Yield the rows of a sequence at exits, from shallow to deep.

    Args:
        model: The reference model.
        tokens: Token ids [s].
        frozen_at: See `ReferenceModel.walk`.
        boundaries: Boundaries of the exits.
    """
    before = torch.empty(0)
    for boundary, x, attended in model.residuals(tokens, frozen_at):
        if boundary in boundaries:
            hidden = model.head_input(boundary, x, attended)
            yield ExitRows(boundary, hidden, x, before)
        before = x


class Confidence(NamedTuple):
    """The confidence of a row at an exit.

    Attributes:
        value: The confidence.
        other: The confidence if an error exchanges the two most probable tokens of the exit before,
            for the measure "agreement"; else `value`.
        error: The least such error, as an error of the confidence.
    """

    value: float
    other: float
    error: float


class ReferenceConfidences:
    """Measures the confidence of rows at the exits that may take them.

    Call `at` for these exits in order, since some measures compare an exit with earlier ones.
    """

    def __init__(self, model: ReferenceModel, policy: ExitPolicy, num_rows: int) -> None:
        """Start before the first exit.

        Args:
            model: The reference model.
            policy: The policy.
            num_rows: Number of rows that draw a token.
        """
        self._model, self._policy = model, policy
        self._previous: Tensor | None = None  # [n, v] logits of the exit before, for "agreement"
        self._shortlist: Tensor | None = None  # [n, k]
        self._num_rows = num_rows

    def at(self, exit: ExitRows, rows: Tensor, indices: Tensor, logits: Tensor) -> list[Confidence]:
        """Return the confidence of rows at an exit.

        Args:
            exit: All rows of the sequence at the exit.
            rows: Their numbers [r] in the sequence.
            indices: Their numbers [r] among the rows that draw a token.
            logits: Their logits [r, v].
        """
        measure = self._policy.measure
        if measure == "agreement":
            return self._agreement(indices, logits)
        if measure == "shortlist":
            if self._shortlist is None:
                chosen = candidates(logits)
                self._shortlist = chosen.new_zeros(self._num_rows, chosen.shape[1])
                self._shortlist[indices] = chosen
            values = shortlist(logits.gather(-1, self._shortlist[indices]))
        elif measure == "saturation":
            values = saturation(exit.x[rows], exit.before[rows])
        elif measure == "gate":
            values = self._model.gate(exit.boundary, exit.x[rows])
        else:
            values = OF_LOGITS[logit_measure(measure)](logits)
        return [Confidence(value, value, 0.0) for value in values.tolist()]

    def _agreement(self, indices: Tensor, logits: Tensor) -> list[Confidence]:
        if self._previous is None:
            self._previous = logits.new_zeros(self._num_rows, logits.shape[1])
            values = others = errors = logits.new_zeros(len(logits))
        else:
            best = self._previous[indices].topk(2, dim=-1)
            values, others = (agreement(logits, best.indices[:, rank]) for rank in (0, 1))
            # d p / d logit = p (1 - p) is at most 1/4.
            errors = (best.values[:, 0] - best.values[:, 1]) / 4
        self._previous[indices] = logits
        return list(map(Confidence, values.tolist(), others.tolist(), errors.tolist()))
