"""Confidences of rows at one exit after another, for passes that compute all of them.

Legend of shapes: n rows that draw a token, r rows of these, s sequence, h hidden, v vocabulary, k
candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.inference.choices import Measure, logit_measure
from ee_llm.inference.exits.confidence import (
    OF_LOGITS,
    agreement,
    candidates,
    saturation,
    shortlist,
)


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
            for the measure "agreement", or the last token on the shortlist and the next one, for
            "shortlist"; else `value`.
        error: The least such error, as an error of the confidence.
    """

    value: float
    other: float
    error: float


class RowConfidences:
    """Measures the confidence of rows at the exits that may take them.

    Call `at` for the exits in order, since some measures compare an exit with the one before.
    """

    def __init__(
        self, measure: Measure, num_rows: int, gate: Callable[[int, Tensor], Tensor]
    ) -> None:
        """Start before the first exit.

        Args:
            measure: The measure.
            num_rows: Number n of rows that draw a token.
            gate: Returns the confidence [r] of the gate at a boundary for its rows [r, h].
        """
        self._measure, self._gate = measure, gate
        self._best = torch.full((num_rows, 2), -1)  # tokens of the exit before, for "agreement"
        self._gaps = torch.zeros(num_rows, dtype=torch.float64)  # of logits that an error exchanges
        self._candidates = torch.empty(num_rows, 0, dtype=torch.int64)
        self._edge = torch.zeros(num_rows, 2, dtype=torch.int64)  # last candidate and the next one
        self._has_candidates = torch.zeros(num_rows, dtype=torch.bool)

    def at(
        self, boundary: int, x: Tensor, before: Tensor, indices: Tensor, logits: Tensor
    ) -> list[Confidence]:
        """Return the confidences of rows at an exit.

        Args:
            boundary: Boundary of the exit.
            x: Residual stream [r, h] of the rows at the boundary.
            before: Residual stream [r, h] of the rows at the boundary before it.
            indices: Numbers [r] of the rows.
            logits: Their logits [r, v].
        """
        if self._measure == "agreement":
            return self._agreement(indices, logits)
        if self._measure == "shortlist":
            return self._shortlist(indices, logits)
        elif self._measure == "saturation":
            values = saturation(x, before)
        elif self._measure == "gate":
            values = self._gate(boundary, x)
        else:
            values = OF_LOGITS[logit_measure(self._measure)](logits)
        return [Confidence(value, value, 0.0) for value in values.tolist()]

    def _agreement(self, indices: Tensor, logits: Tensor) -> list[Confidence]:
        tokens = self._best[indices].to(logits.device)
        values, others = (agreement(logits, tokens[:, rank]) for rank in (0, 1))
        errors = self._gaps[indices] / 4  # since d p / d logit = p (1 - p) is at most 1/4
        best = logits.topk(2, dim=-1)
        self._best[indices] = best.indices.cpu()
        self._gaps[indices] = (best.values[:, 0] - best.values[:, 1]).double().cpu()
        return list(map(Confidence, values.tolist(), others.tolist(), errors.tolist()))

    def _shortlist(self, indices: Tensor, logits: Tensor) -> list[Confidence]:
        is_new = ~self._has_candidates[indices]
        if bool(is_new.any()):  # The first exit of a row draws up its shortlist.
            self._draw_up(indices[is_new], logits[is_new.to(logits.device)])
        ids = self._candidates[indices].to(logits.device)
        last, following = (self._edge[indices, n].to(logits.device)[:, None] for n in (0, 1))
        values = shortlist(logits.gather(-1, ids))
        others = shortlist(logits.gather(-1, torch.where(ids == last, following, ids)))
        errors = self._gaps[indices] / 4
        return list(map(Confidence, values.tolist(), others.tolist(), errors.tolist()))

    def _draw_up(self, indices: Tensor, logits: Tensor) -> None:
        """Keep the shortlist of rows, its last token and the next one, and their gap."""
        ids = candidates(logits)
        if not self._candidates.shape[1]:
            self._candidates = self._candidates.new_zeros(len(self._candidates), ids.shape[1])
        best = logits.topk(min(ids.shape[1] + 1, logits.shape[1]), dim=-1)
        last, following = best.indices[:, ids.shape[1] - 1], best.indices[:, -1]
        self._candidates[indices] = ids.cpu()
        self._edge[indices] = torch.stack([last, following], dim=1).cpu()
        self._gaps[indices] = (best.values[:, ids.shape[1] - 1] - best.values[:, -1]).double().cpu()
        self._has_candidates[indices] = True
