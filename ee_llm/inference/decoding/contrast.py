"""Compute the logits of `sled` and `dola` from final and early logits, row by row.

The result goes through the usual sampler. No row affects another one.

Legend of shapes: r rows, n some of them, b boundaries, v vocabulary.
"""

import math
from collections.abc import Iterable
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from ee_llm.inference.decoding.dola import contrast
from ee_llm.inference.decoding.settings import SLED, Contrast
from ee_llm.inference.decoding.sled import evolve

EarlyLogits = tuple[Items[int], Tensor]
"""Numbers of n rows, and their early logits [n, b, v]."""


def contrast_logits(final: Tensor, early: Tensor, settings: Items[Contrast]) -> Tensor:
    """Return the contrasted logits [r, v], in float64.

    A row whose early logits are not all finite is NaN.

    Args:
        final: Final logits [r, v].
        early: Early logits [r, b, v] at the boundaries of the settings.
        settings: The settings of each row.
    """
    rows_by_settings: dict[Contrast, list[int]] = {}
    for row, of_row in enumerate(settings):
        rows_by_settings.setdefault(of_row, []).append(row)
    result = torch.empty_like(final, dtype=torch.float64)
    for shared, rows in rows_by_settings.items():
        parts = (final, early) if len(rows) == len(settings) else (final[rows], early[rows])
        if isinstance(shared, SLED):
            result[rows] = evolve(*parts, shared)
        else:
            result[rows] = contrast(*parts, shared)
    # Summing is a quick first check: the sum is not finite if any logit is not.
    if not torch.isfinite(early.sum()):
        is_finite = early.isfinite().flatten(1).all(dim=-1)
        result = result.masked_fill(~is_finite[:, None], math.nan)
    return result


def contrast_rows(
    logits: Tensor, early_logits: Iterable[EarlyLogits], settings: Items[Contrast | None]
) -> Tensor:
    """Return logits [r, v] in which the rows with settings are contrasted.

    Args:
        logits: Final logits [r, v].
        early_logits: The early logits of all rows with settings, in parts.
        settings: The settings of each row; None for rows that keep their logits.
    """
    result = logits if logits.dtype == torch.float64 else logits.float()
    result = result.clone() if result is logits else result
    for rows, early in early_logits:
        of_rows = [s for s in (settings[row] for row in rows) if s is not None]
        result[list(rows)] = contrast_logits(logits[list(rows)], early, of_rows).to(result.dtype)
    return result
