"""DoLa: final logits contrasted with those of a premature layer (arXiv 2309.03883).

Legend of shapes: r rows, b boundaries, v vocabulary.
"""

import math

import torch
from torch import Tensor

from ee_llm.inference.decoding.settings import DoLa

# Added to the log probabilities of tokens that may not be drawn. They keep their order, so that
# it decides if all others are banned.
LOW_VALUE = -1000.0


def contrast(final: Tensor, early: Tensor, settings: DoLa) -> Tensor:
    """Return the contrasted logits [r, v], in float64.

    A token i whose final probability p_i is at least alpha max(p) gets log p_i - log q_i, where q
    is the distribution at the row's premature layer: the boundary with the greatest Jensen-Shannon
    divergence from p, the shallowest one if several are equal. All other tokens get
    `log p_i + LOW_VALUE`. Each row depends on its own logits only.

    Args:
        final: Final logits [r, v].
        early: Early logits [r, b, v] at the candidate boundaries.
        settings: The settings.
    """
    log_p = final.double().log_softmax(dim=-1)
    base, *others = early.unbind(dim=1)
    base = base.double().log_softmax(dim=-1)
    if others:
        greatest = jensen_shannon(log_p, base[:, None])
    for logits in others:  # Only one boundary at a time needs [r, v] in float64.
        log_q = logits.double().log_softmax(dim=-1)
        divergence = jensen_shannon(log_p, log_q[:, None])
        base = log_q.where(divergence > greatest, base)
        greatest = greatest.maximum(divergence)
    least = log_p.amax(dim=-1, keepdim=True) + math.log(settings.alpha)
    return (log_p - base).where(log_p >= least, log_p + LOW_VALUE)


def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergences [r, b], in nats, of distributions p and q.

    Args:
        log_p: Log probabilities [r, v].
        log_q: Log probabilities [r, b, v].
    """
    log_p = log_p[:, None]
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2.0)
    from_p = (log_p.exp() * (log_p - log_mean)).sum(dim=-1)
    from_q = (log_q.exp() * (log_q - log_mean)).sum(dim=-1)
    return (from_p + from_q) / 2.0
