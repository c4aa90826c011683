"""The most probable tokens, of which those with the lowest ids win among equals, on any device.

Legend of shapes: r rows, v vocabulary.
"""

import torch
from torch import Tensor


def greatest(logits: Tensor, lowest: Tensor, num_kept: Tensor) -> Tensor:
    """Return a mask [r, v] of the greatest logits of each row.

    Args:
        logits: Logits [r, v].
        lowest: The lowest logit [r, 1] of the mask.
        num_kept: Number [r, 1] of tokens in the mask, which leaves out equal ones with higher ids.
    """
    kept = logits >= lowest
    if bool((kept.sum(dim=-1, keepdim=True) > num_kept).any()):  # Ties exceed the set.
        is_tied = logits == lowest
        num_tied = num_kept - (kept & ~is_tied).sum(dim=-1, keepdim=True)
        kept &= ~is_tied | (is_tied.cumsum(dim=-1) <= num_tied)
    return kept


def top_k_ids(logits: Tensor, k: int) -> Tensor:
    """Return the ids [r, k] of the k greatest logits [r, v] of each row, in increasing order."""
    values, ids = logits.topk(k, dim=-1)  # which chooses any among equals
    lowest = values[:, -1:]
    is_tied = (logits >= lowest).sum(dim=-1) > k
    if bool(is_tied.any()):
        num_kept = torch.full_like(ids[is_tied, :1], k)
        kept = greatest(logits[is_tied], lowest[is_tied], num_kept)
        ids[is_tied] = kept.nonzero()[:, 1].view(-1, k)
    return ids.sort(dim=-1).values
