"""SLED: final logits that follow what the early layers know (arXiv 2411.02433, algorithm 1).

Legend of shapes: r rows, b boundaries, v vocabulary, k evolution scale.
"""

import torch
from torch import Tensor

from ee_llm.inference.decoding.settings import SLED
from ee_llm.inference.sampling.top_k import top_k_ids


def evolve(final: Tensor, early: Tensor, settings: SLED, ids: Tensor | None = None) -> Tensor:
    """Return the evolved logits [r, v], in float64.

    With p = softmax(final / tau) and, for each boundary n, q_n = softmax(early_n / tau), a token i
    of the k most probable ones gets

        m_n,i = max(cos(early_n - final, q_n - onehot_i), 0)
        m_i = sum_n m_n,i / sum_n,j m_n,j
        final_i - rate / tau (p_i - m_i)

    where the vectors of the cosine are restricted to the k tokens. The released variant restricts
    nothing, squares m_n,i and has tau = 1. If all m_n,i are 0, m_i is p_i, so the k logits stay as
    they are; in the released variant, m_i is 0. All other tokens get `final_i + low_value`. Of
    equal logits, those with the lowest ids evolve. Each row depends on its own logits only.

    Args:
        final: Final logits [r, v].
        early: Early logits [r, b, v].
        settings: The settings.
        ids: The k tokens [r, k] that evolve, instead of the most probable ones.
    """
    is_released = settings.variant == "released"
    tau = 1.0 if is_released else settings.tau
    final = final.double()
    ids = top_k_ids(final, settings.scale) if ids is None else ids
    share = torch.zeros_like(ids, dtype=torch.float64)  # [r, k]
    for logits in early.unbind(dim=1):  # Only one boundary at a time needs [r, v] in float64.
        if is_released:
            share += _similarities(final, logits.double(), ids, is_restricted=False, tau=1.0) ** 2
        else:
            share += _similarities(final, logits.double(), ids, is_restricted=True, tau=tau)
    total = share.sum(dim=-1, keepdim=True)
    p = (final / tau).softmax(dim=-1).gather(-1, ids)
    target = (share / total).where(total > 0.0, 0.0 if is_released else p)
    evolved = final.gather(-1, ids) - settings.rate / tau * (p - target)
    return (final + settings.low_value).scatter(-1, ids, evolved)


def _similarities(
    final: Tensor, early: Tensor, ids: Tensor, *, is_restricted: bool, tau: float
) -> Tensor:
    """Return max(cos(early - final, q - onehot_i), 0), [r, k], for the tokens `ids` [r, k].

    Args:
        final: Final logits [r, v].
        early: Early logits [r, v] at one boundary.
        ids: The tokens.
        is_restricted: Whether the vectors of the cosine have the entries of `ids` only.
        tau: Temperature of q.
    """
    own_delta = early.gather(-1, ids) - final.gather(-1, ids)
    scaled = early if tau == 1.0 else early / tau
    if is_restricted:
        own_q = (scaled.gather(-1, ids) - scaled.logsumexp(dim=-1, keepdim=True)).exp()
        delta, q = own_delta, own_q
    else:
        delta, q = early - final, scaled.softmax(dim=-1)
        own_q = q.gather(-1, ids)
    # cos(delta, q - onehot_i) for all i at once, without a tensor [r, k, v].
    product = (delta * q).sum(dim=-1, keepdim=True) - own_delta
    other = (q.square().sum(dim=-1, keepdim=True) - own_q.square()).clamp_min(0.0)
    length = delta.square().sum(dim=-1, keepdim=True).sqrt()
    length = length * ((1.0 - own_q).square() + other).sqrt()
    return (product / length).masked_fill(length == 0.0, 0.0).clamp_min(0.0)
