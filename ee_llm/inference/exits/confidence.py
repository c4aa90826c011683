"""Measures of confidence: numbers in [0, 1] that grow with an exit's certainty.

An early exit takes a token if its confidence reaches a threshold. An exit that takes every token,
as the final one does, measures it by logits (see `choices.logit_measure`).

Legend of shapes: r rows, v vocabulary, h hidden, k candidates.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ee_llm.inference.choices import NUM_CANDIDATES, LogitMeasure
from ee_llm.inference.sampling.top_k import top_k_ids


def max_probability(logits: Tensor) -> Tensor:
    """Return the probability [...] of the most probable token (CALM, arXiv 2207.07061)."""
    return _log_probabilities(logits).amax(dim=-1).exp()


def entropy(logits: Tensor) -> Tensor:
    """Return 1 - H(p) / log v [...]: 1 for a certain distribution, 0 for the uniform one."""
    information = torch.special.entr(_log_probabilities(logits).exp()).sum(dim=-1)
    return (1.0 - information / math.log(logits.shape[-1])).clamp(0.0, 1.0)


def margin(logits: Tensor) -> Tensor:
    """Return the greatest probability minus the second greatest [...] (CALM)."""
    best = _log_probabilities(logits).topk(2, dim=-1).values.exp()
    return best[..., 0] - best[..., 1]


OF_LOGITS: dict[LogitMeasure, Callable[[Tensor], Tensor]] = {
    "max_probability": max_probability,
    "entropy": entropy,
    "margin": margin,
}


def agreement(logits: Tensor, previous: Tensor) -> Tensor:
    """Return the probability [r] that an exit gives to the previous exit's most probable token.

    It is high only if the previous exit that decided about the row predicts the same token and this
    exit is certain of it: a continuous version of the patience of early-exit classifiers (PABEE,
    arXiv 2006.04152).

    Args:
        logits: Logits [r, v] of this exit.
        previous: Most probable token [r] of the previous exit, -1 at the first exit, which has a
            confidence of 0.
    """
    found = _log_probabilities(logits).gather(-1, previous.clamp(min=0)[:, None])[:, 0].exp()
    return found.masked_fill(previous < 0, 0.0)


def candidates(logits: Tensor) -> Tensor:
    """Return the shortlist [r, k] of rows: the ids of their most probable tokens, increasing.

    Args:
        logits: Logits [r, v] of the first exit that decides about the rows.
    """
    return top_k_ids(logits, min(NUM_CANDIDATES, logits.shape[-1]))


def shortlist(candidate_logits: Tensor) -> Tensor:
    """Return the greatest probability [r] among a shortlist of tokens only.

    The first exit computes all logits and draws up the shortlist; deeper exits compute the logits
    of its tokens alone, which costs next to nothing (SpecEE, arXiv 2504.08850, section 4, with the
    first exit instead of a draft model).

    Args:
        candidate_logits: Logits [r, k] of the tokens on the shortlist.
    """
    return max_probability(candidate_logits)


def saturation(hidden: Tensor, before: Tensor) -> Tensor:
    """Return the cosine similarity [r] of rows after and before the last layer, at least 0.

    A hidden state that a layer hardly turns is saturated (CALM, arXiv 2207.07061, section 3.3).

    Args:
        hidden: Residual stream [r, h] at the boundary of the exit.
        before: Residual stream [r, h] at the boundary before it.
    """
    precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    similarity = F.cosine_similarity(hidden.to(precise), before.to(precise), dim=-1)
    return similarity.clamp(0.0, 1.0)


def _log_probabilities(logits: Tensor) -> Tensor:
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.log_softmax(dim=-1, dtype=precise)
