"""Statistics of single positions from vocabulary-parallel logits.

Legend of shapes: r rows, v vocabulary, n tensor-parallel ranks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ee_llm.inference.choices import NUM_CANDIDATES, Measure
from ee_llm.inference.exits.confidence import shortlist
from ee_llm.inference.exits.decision import summarize

Gather = Callable[[Tensor], Tensor]
"""Concatenate the parts [r, x] of all tensor-parallel ranks to [r, n * x]."""


@dataclass(frozen=True)
class RowStatistics:
    """What an exit predicts at some positions.

    Attributes:
        logprobs: Log probabilities [r, v / n] of this rank's part of the vocabulary.
        loss: Negative log probability [r] of the next token, in nats.
        top: Id [r] of the most probable token; of equal ones, the least.
        confidence: Confidence [r] of the exit, by default the probability of that token.
        predicted: Token ids [r, k] that deeper exits of the same rows need, for the measures that
            compare exits.
    """

    logprobs: Tensor
    loss: Tensor
    top: Tensor
    confidence: Tensor
    predicted: Tensor | None = None


def row_statistics(
    logits: Tensor,
    targets: Tensor,
    first_id: int,
    gather: Gather,
    measure: Measure = "max_probability",
    predicted: Tensor | None = None,
) -> RowStatistics:
    """Return the statistics of rows; all tensor-parallel ranks must call this together.

    The ranks exchange four numbers per row and rank, and never logits.

    Args:
        logits: Logits [r, v / n] of the ids from `first_id` on.
        targets: Ids [r] of the next tokens.
        first_id: Vocabulary id of the first column.
        gather: Exchange between the ranks.
        measure: Measure of confidence; other than the probability, it takes another exchange.
            Measures of hidden states count as the probability.
        predicted: `predicted` of the exit before, None for the first exit.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    index = targets - first_id
    is_here = (index >= 0) & (index < logits.shape[1])
    target = logits.gather(-1, index.clamp(0, logits.shape[1] - 1)[:, None])
    target = target.masked_fill(~is_here[:, None], 0.0)
    summaries = gather(torch.cat([summarize(logits, first_id), target], dim=-1))
    tops, totals, ids, found = summaries.unflatten(-1, (-1, 4)).unbind(-1)  # [r, n] each
    greatest, shard = tops.max(dim=-1)
    total = (totals * (tops - greatest[:, None]).exp()).sum(dim=-1)
    normalizer = greatest + total.log()
    logprobs = logits - normalizer[:, None]
    top = ids.gather(-1, shard[:, None])[:, 0].long()
    passed_on: Tensor | None = None
    if measure == "entropy":
        information = gather(torch.special.entr(logprobs.exp()).sum(dim=-1, keepdim=True))
        vocab_size = logits.shape[1] * information.shape[1]
        confidence = (1 - information.sum(dim=-1) / math.log(vocab_size)).clamp(0.0, 1.0)
    elif measure == "margin":
        best = gather(logprobs.topk(2, dim=-1).values).topk(2, dim=-1).values.exp()
        confidence = best[:, 0] - best[:, 1]
    elif measure == "agreement":
        passed_on = top[:, None]
        confidence = torch.zeros_like(total)
        if predicted is not None:
            confidence = picked(logprobs, predicted, first_id, gather)[:, 0].exp()
    elif measure == "shortlist":
        passed_on = predicted if predicted is not None else _best(logits, first_id, gather)
        confidence = shortlist(picked(logprobs, passed_on, first_id, gather))
    else:
        confidence = 1 / total
    return RowStatistics(
        logprobs,
        normalizer - found.sum(dim=-1),
        top,
        confidence,
        passed_on,
    )


def picked(values: Tensor, ids: Tensor, first_id: int, gather: Gather) -> Tensor:
    """Return the values [r, k] of token ids [r, k], from each rank's values [r, v / n]."""
    index = ids - first_id
    is_here = (index >= 0) & (index < values.shape[1])
    found = values.gather(-1, index.clamp(0, values.shape[1] - 1)).masked_fill(~is_here, 0.0)
    return gather(found).unflatten(-1, (-1, ids.shape[1])).sum(dim=1)


def _best(logits: Tensor, first_id: int, gather: Gather) -> Tensor:
    """Return the ids [r, k] of the shortlist, from each rank's logits [r, v / n]."""
    here = logits.topk(min(NUM_CANDIDATES, logits.shape[1]), dim=-1)
    values, ids = gather(here.values), gather(here.indices + first_id)
    best = values.topk(min(NUM_CANDIDATES, values.shape[1]), dim=-1).indices
    return ids.gather(-1, best)


def divergence(final: Tensor, early: Tensor, gather: Gather) -> Tensor:
    """Return the Kullback-Leibler divergence KL(final || early) [r] in nats.

    Args:
        final: Log probabilities [r, v / n] of the final exit.
        early: Log probabilities [r, v / n] of another exit.
        gather: Exchange between the ranks: one number per row and rank.
    """
    part = (final.exp() * (final - early)).sum(dim=-1, keepdim=True)
    return gather(part).sum(dim=-1)
