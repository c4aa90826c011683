"""Fit an exit to every boundary, and measure on other text what each of them predicts.

Legend of shapes: e boundaries, t tokens, r rows of a chunk, h hidden, v vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm.data.windows import check_counted, check_window, counted_positions
from ee_llm.errors import RunError
from ee_llm.evaluation.measure import MAX_LOGITS
from ee_llm.evaluation.probe.backbone import Backbone
from ee_llm.evaluation.row_statistics import RowStatistics, row_statistics
from ee_llm.inference.exits.least_squares import Regression, normalized

OnTokens = Callable[[int], object]


class Translator(NamedTuple):
    """The affine map of an exit: weight [h, h] and bias [h]."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Measured:
    """What the exits predict for the tokens of the test.

    Attributes:
        boundaries: Boundaries of the exits.
        losses: Negative log probability [e, t] of the token, in nats, float64.
        confidence: Probability [e, t] of the exit's most probable token, float32.
        agrees: Whether [e, t] this is the final exit's most probable token.
        bare_agrees: The same for the final exit's head on the residual stream, without a fit.
        final_losses: Negative log probability [t] of the token at the final exit, float64.
        previous: Ids [t] of the tokens before the predicted ones.
        tokens: Ids [t] of the predicted tokens.
    """

    boundaries: tuple[int, ...]
    losses: Tensor
    confidence: Tensor
    agrees: Tensor
    bare_agrees: Tensor
    final_losses: Tensor
    previous: Tensor
    tokens: Tensor


def fit(
    backbone: Backbone,
    boundaries: Iterable[int],
    windows: Iterable[Tensor],
    vocab_size: int,
    hidden_size: int,
    norm_eps: float,
    on_tokens: OnTokens,
) -> dict[int, Translator]:
    """Return the translator of each boundary, as `least_squares` computes it, in the model's dtype.

    Args:
        backbone: The model.
        boundaries: The boundaries.
        windows: Token ids, int64 [t + 1] each.
        vocab_size, hidden_size, norm_eps: Options of the model.
        on_tokens: Called with the number of tokens of each window.

    Raises:
        DataError: The data has a token id outside the vocabulary.
        RunError: The hidden states at a boundary are not finite.
    """
    sums = {boundary: Regression(hidden_size) for boundary in boundaries}
    for window in windows:
        check_window(window, vocab_size)
        *early, (_, last) = backbone.streams(window[:-1]).items()
        final = normalized(last, norm_eps)
        for boundary, hidden in early:
            sums[boundary].add(normalized(hidden, norm_eps), final)
        on_tokens(len(window) - 1)
    dtype = backbone.model.dtype
    translators = {}
    for boundary in list(sums):
        weight, bias = sums.pop(boundary).solve(boundary, dtype)
        device = last.device
        translators[boundary] = Translator(weight.to(device, dtype), bias.to(device, dtype))
    return translators


@torch.no_grad()
def measure(
    backbone: Backbone,
    translators: Mapping[int, Translator],
    windows: Iterable[Tensor],
    vocab_size: int,
    norm_eps: float,
    eos_token_id: int | None,
    on_tokens: OnTokens,
    max_logits: int = MAX_LOGITS,
) -> Measured:
    """Return what the exits predict in the windows of the test.

    Args:
        backbone: The model.
        translators: The translator of each boundary.
        windows: Token ids, int64 [t + 1] each.
        vocab_size, norm_eps: Options of the model.
        eos_token_id: Id of the end token: its successors do not count. None counts all tokens.
        on_tokens: Called with the number of tokens of each window.
        max_logits: Number of logits that are computed at once.

    Raises:
        DataError: The data has a token id outside the vocabulary, or no token counts.
        RunError: The loss of an exit is not finite.
    """
    num_rows = max(1, max_logits // vocab_size)
    parts: list[dict[str, Tensor]] = []
    for window in windows:
        check_window(window, vocab_size)
        rows = counted_positions(window, eos_token_id).nonzero()[:, 0]
        streams = backbone.streams(window[:-1])
        for chunk in rows.split(num_rows) if len(rows) else ():
            targets = window[1:][chunk]
            here = {b: hidden[chunk.to(hidden.device)] for b, hidden in streams.items()}
            part = _columns(backbone, translators, here, targets, norm_eps)
            part |= {"previous": window[:-1][chunk], "tokens": targets}
            parts.append(part)
        on_tokens(len(window) - 1)
    check_counted(sum(len(part["tokens"]) for part in parts))
    columns = {name: torch.cat([part[name] for part in parts], dim=-1) for name in parts[0]}
    measured = Measured(tuple(translators), **columns)
    _check_finite(measured, backbone.model.dtype)
    return measured


def _columns(
    backbone: Backbone,
    translators: Mapping[int, Translator],
    streams: Mapping[int, Tensor],
    targets: Tensor,
    norm_eps: float,
) -> dict[str, Tensor]:
    """Return the columns of `Measured` for a few rows."""
    *_, last = streams
    targets = targets.to(streams[last].device)

    def statistics(hidden: Tensor) -> RowStatistics:
        logits = backbone.model.early_logits(hidden)
        return row_statistics(logits, targets, 0, lambda part: part)

    final = statistics(streams[last])
    columns: dict[str, list[Tensor]] = {
        name: [] for name in ("losses", "confidence", "agrees", "bare_agrees")
    }
    for boundary, translator in translators.items():
        one = statistics(F.linear(normalized(streams[boundary], norm_eps), *translator))
        columns["losses"].append(one.loss.double())
        columns["confidence"].append(one.confidence.float())
        columns["agrees"].append(one.top == final.top)
        columns["bare_agrees"].append(statistics(streams[boundary]).top == final.top)
    found = {name: torch.stack(values).cpu() for name, values in columns.items()}
    return found | {"final_losses": final.loss.double().cpu()}


def _check_finite(measured: Measured, dtype: torch.dtype) -> None:
    for where, losses in (
        ("final exit", measured.final_losses),
        *zip((f"exit after layer {b}" for b in measured.boundaries), measured.losses, strict=True),
    ):
        if not losses.isfinite().all():
            name = str(dtype).removeprefix("torch.")
            raise RunError(
                f"the loss of the {where} is not finite in {name}. The weights are damaged. Check"
                " the checkpoint."
            )
