"""Tests whether the mean of bounded losses is below a limit, valid for any number of samples.

The test bets against the hypothesis that the mean is at the limit or above (Waudby-Smith and
Ramdas, Estimating means of bounded random variables by betting, arXiv 2010.09686, section 4). A
gambler who stakes a share b on each loss L_i has the capital prod_i (1 + b (limit - L_i)). Under
the hypothesis its expectation is at most 1, whatever b is, and so is that of the mean over several
b. By Markov's inequality, the capital exceeds 1 / delta with a probability of at most delta.

This uses the variance of the losses. For losses that vary little, such as means over windows, it
therefore rejects much earlier than tests for 0/1 losses (Hoeffding and Bentkus).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

NUM_STAKES = 8
"""Number of stakes over which the capital is averaged, each half of the one before."""


def p_value(losses: Iterable[float] | Tensor, limit: float) -> float:
    """Return a p-value of the hypothesis that the expected loss is at least `limit`.

    The p-value is valid for independent and identically distributed losses, for any number of them.
    It does not depend on their order.

    Args:
        losses: Losses in [0, 1], one per independent sample.
        limit: The limit, between 0 and 1.

    Raises:
        ValueError: A loss is outside [0, 1], or the limit is not between 0 and 1.
    """
    values = torch.as_tensor(
        losses if isinstance(losses, Tensor) else list(losses), dtype=torch.float64
    )
    if not 0.0 < limit < 1.0:
        raise ValueError(f"limit = {limit} is not between 0 and 1")
    if len(values) and not (values.min() >= 0.0 and values.max() <= 1.0):  # NaN fails too
        raise ValueError("a loss is outside [0, 1]")
    # A stake of 1 / (1 - limit) loses everything at a loss of 1. For small risks large stakes are
    # best, so their share of the first capital is larger: a half, a quarter, and so on.
    shares = 0.5 ** torch.arange(NUM_STAKES, dtype=torch.float64)
    stakes = shares / (1.0 - limit)
    logs = torch.log1p(stakes[:, None] * (limit - values)).sum(dim=1)
    capital = (logs + (shares / shares.sum()).log()).logsumexp(dim=0)
    return math.exp(min(0.0, -float(capital)))


def samples_needed(limit: float, delta: float) -> int:
    """Return the number of samples with which even losses of 0 have a p-value of at most `delta`.

    With fewer samples, nothing can be shown about a risk of `limit`.
    """
    # The capital of n losses of 0 is the mean of (1 + b limit)^n, which the largest stake bounds.
    low = max(1, math.floor(math.log(1 / delta) / math.log1p(limit / (1 - limit))))
    count = low
    while p_value(torch.zeros(count), limit) > delta:
        count += max(1, low // 100)
    return count
