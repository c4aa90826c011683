"""Averages over positions, with errors that allow for the correlation of neighbours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

BLOCK = 128
"""Positions of a block: blocks, unlike positions, are treated as independent."""

MIN_BLOCKS = 8
"""Blocks from which an error is estimated."""

_FEW_DEGREES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469)


@dataclass(frozen=True)
class Estimate:
    """An average and its uncertainty.

    Attributes:
        value: The average.
        error: Its standard error, None with fewer than `MIN_BLOCKS` blocks.
        margin: Half the width of the 95 % confidence interval, None like `error`.
    """

    value: float
    error: float | None
    margin: float | None


@dataclass
class Average:
    """The average of a quantity over positions, from float64 sums of blocks.

    Losses of neighbouring tokens are correlated, so the error comes from the differences between
    blocks of `BLOCK` positions, which continue in the next window, since windows of one text are
    neighbours too. The estimate is a ratio of two sums, because the last block is shorter.
    """

    _sums: list[float] = field(default_factory=list)
    _counts: list[int] = field(default_factory=list)

    def add(self, values: Tensor) -> None:
        """Add a window's values [t], float64, in order."""
        while len(values):
            if not self._counts or self._counts[-1] == BLOCK:
                self._sums.append(0.0)
                self._counts.append(0)
            part, values = values.tensor_split([BLOCK - self._counts[-1]])
            self._sums[-1] += float(part.sum())
            self._counts[-1] += len(part)

    def estimate(self) -> Estimate:
        """Return the average of all values and its uncertainty."""
        mean, variance = ratio_of_sums(self._sums, self._counts)
        blocks = len(self._sums)
        if blocks < MIN_BLOCKS:
            return Estimate(mean, None, None)
        error = math.sqrt(variance)
        return Estimate(mean, error, error * student_quantile(blocks - 1))


def ratio_of_sums(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Return the mean of all values in groups, and its variance if groups are independent.

    The variance is that of a ratio (Cochran, Sampling Techniques, 1977, eq. 6.13); that of a single
    group is not known, and 0 here.

    Args:
        sums: Sum of the values of each group.
        counts: Number of values of each group.
    """
    count, groups = sum(counts), len(counts)
    mean = math.fsum(sums) / count
    residuals = ((total - mean * size) ** 2 for total, size in zip(sums, counts, strict=True))
    return mean, groups / max(1, groups - 1) * math.fsum(residuals) / count**2


def student_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution with 1 or more degrees of freedom.

    From 7 degrees on, this is the expansion of Abramowitz and Stegun (eq. 26.7.5), which is off by
    less than 0.0001. The values below are those of their table 26.10.
    """
    if freedom <= len(_FEW_DEGREES):
        return _FEW_DEGREES[freedom - 1]
    z = 1.959963984540054
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
