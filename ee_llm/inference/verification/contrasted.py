"""Compute `sled` and `dola` in one teacher-forced forward, and the errors that explain a token.

Legend of shapes: s sequence, h hidden, b boundaries, v vocabulary.
"""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_llm.architecture.reference import ReferenceModel
from ee_llm.errors import RequestError
from ee_llm.inference.decoding.contrast import contrast_logits
from ee_llm.inference.decoding.dola import LOW_VALUE, jensen_shannon
from ee_llm.inference.decoding.settings import SLED, Contrast, DoLa, resolve_contrast
from ee_llm.inference.decoding.sled import evolve
from ee_llm.inference.sampling.params import SamplingParams
from ee_llm.inference.sampling.sampler import mask_banned, token_margin
from ee_llm.inference.sampling.top_k import top_k_ids

# Errors of the logits that `contrast_margin` tries, besides 0.
_ERRORS = tuple(2.0**exponent for exponent in range(-24, 7, 2))


@dataclass(frozen=True)
class ContrastedRow:
    """The contrasted logits [v] of a row, its final logits [v] and its early logits [b, v]."""

    logits: Tensor
    final: Tensor
    early: Tensor


def finite_logits(model: ReferenceModel, boundary: int, hidden: Tensor) -> Tensor:
    """Return the exit's logits [..., v]; raises RequestError if one is NaN or infinite."""
    logits = model.logits(boundary, hidden)
    if not torch.isfinite(logits).all():
        raise RequestError(
            f"The exit at boundary {boundary} computes logits that are not finite in {model.dtype}."
            " The weights are damaged, or this dtype is too narrow for them."
        )
    return logits


def contrasted_logits(
    model: ReferenceModel, tokens: Tensor, contrast: Contrast, rows: slice
) -> Iterator[ContrastedRow]:
    """Yield the contrasted logits of the given rows of a sequence.

    Args:
        model: The reference model.
        tokens: Token ids [s].
        contrast: The settings.
        rows: The rows.

    Raises:
        RequestError: The settings do not fit the model, or a logit is not finite.
    """
    contrast = resolve_contrast(contrast, model.config)
    assert isinstance(contrast.layers, tuple), "resolved settings list their boundaries"
    last = model.num_layers
    early: list[tuple[int, Tensor]] = []  # the exit whose output weight applies, and its input
    for boundary, x, attended in model.residuals(tokens):
        if boundary in contrast.layers and contrast.head == "exits":
            early.append((boundary, model.head_input(boundary, x, attended)[rows]))
        elif boundary in contrast.layers:
            early.append(
                (last, (model.head_input(last, x, x) if contrast.head == "final" else x)[rows])
            )
        if boundary == last:
            final = model.head_input(last, x, attended)[rows]
    for row, hidden in enumerate(final):
        logits = finite_logits(model, last, hidden)
        at_layers = torch.stack([finite_logits(model, exit, part[row]) for exit, part in early])
        contrasted = contrast_logits(logits[None], at_layers[None], [contrast])[0]
        yield ContrastedRow(contrasted, logits, at_layers)


def contrast_margin(
    row: ContrastedRow,
    contrast: Contrast,
    params: SamplingParams,
    position: int,
    token: int,
    history: Items[int],
    banned: Items[int],
) -> float:
    """Return an error of the final and early logits that explains `token` in a contrasted row.

    An error can put the token into the set that may be drawn, put its rivals out of DoLa's, and let
    DoLa choose another premature layer. It also moves the contrasted logits: by twice as much for
    DoLa. For SLED, it moves them by up to 1 + rate / tau times as much through the final logits and
    p. The move through the weights m has no simple bound, so it is measured for some errors.
    """
    if isinstance(contrast, SLED):
        factor = 1.0 + contrast.rate / (contrast.tau if contrast.variant == "paper" else 1.0)
        alternatives = _evolved_under_errors(row, contrast, token, factor)
    else:
        factor = 2.0
        alternatives = _contrasted_under_errors(row, contrast, token)
    margin = math.inf
    for error, logits, moved in alternatives:
        if error >= margin:
            break
        masked = mask_banned(logits[None], [banned])[0]
        found = token_margin(masked, params, position, token, history)
        margin = min(margin, max(error, (found - moved) / factor))
    return margin


def _evolved_under_errors(
    row: ContrastedRow, contrast: SLED, token: int, factor: float
) -> Iterator[tuple[float, Tensor, float]]:
    """Yield errors, the evolved logits [v] if an error favours `token` in the top-k set, and moves.

    The last value is how much farther than `factor` times the error two logits of the set move
    relative to each other, under the worst of a few errors with other signs for each token id.
    """
    for error in (0.0, *_ERRORS):
        favoured = row.final.double().clone()
        favoured[token] += error
        ids = top_k_ids(favoured[None], contrast.scale)
        evolved = evolve(row.final[None], row.early[None], contrast, ids)
        moved = 0.0
        for signs in _signs(len(favoured), row.final.device) if error else ():
            final, early = row.final + signs * error / 2, row.early - signs * error / 2
            moves = (evolve(final[None], early[None], contrast, ids) - evolved).gather(-1, ids)
            moved = max(moved, float(moves.max() - moves.min()))
        yield error, evolved[0], max(0.0, moved - factor * error)


def _signs(size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield vectors [size] of 1 and -1, which alternate at different rates, and their opposites."""
    ids = torch.arange(size, device=device)
    for bit in range(2):
        signs = 1.0 - 2.0 * (ids >> bit & 1)
        yield signs
        yield -signs


def _contrasted_under_errors(
    row: ContrastedRow, contrast: DoLa, token: int
) -> Iterator[tuple[float, Tensor, float]]:
    """Yield errors, the contrasted logits [v] if an error favours `token`, and 0."""
    log_p, log_q = row.final.double().log_softmax(dim=-1), row.early.double().log_softmax(dim=-1)
    divergences = jensen_shannon(log_p[None], log_q[None])[0]
    above = log_p - (log_p.max() + math.log(contrast.alpha))
    for error in (0.0, *_ERRORS):
        kept = above >= error
        kept[log_p.argmax()] = True
        kept[token] = above[token] >= -error
        for base in log_q[divergences >= divergences.max() - error]:
            yield error, (log_p - base).where(kept, log_p + LOW_VALUE), 0.0
