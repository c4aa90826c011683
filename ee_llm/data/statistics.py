"""Statistics of prepared data: token counts and unigram entropy."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ee_llm.data.indexed import IndexedTokens, Tokens
from ee_llm.errors import DataError

_CHUNK = 1 << 22  # tokens
_MAX_IDS = 1 << 31  # larger than any vocabulary; each id needs a counter in memory


@dataclass(frozen=True)
class StatisticsOptions:
    """Print statistics of prepared data."""

    prefix: Path
    """Path of the data without .bin or .idx, for example data/corpus."""


class Statistics(NamedTuple):
    """Statistics of a data set; `str` gives a readable line."""

    prefix: str
    num_documents: int
    num_tokens: int
    num_distinct: int
    """Number of distinct token ids."""
    largest_id: int
    longest_document: int
    """Length of the longest document, in tokens."""
    unigram_entropy: float
    """In nats per token: the loss of a model that knows only the token frequencies."""

    def __str__(self) -> str:
        return (
            f"{self.prefix}: {self.num_documents:,} documents of at most "
            f"{self.longest_document:,} tokens, {self.num_tokens:,} tokens, "
            f"{self.num_distinct:,} distinct ids up to {self.largest_id:,}, "
            f"unigram entropy {self.unigram_entropy:.3f} nats/token"
        )


def statistics(options: StatisticsOptions) -> Statistics:
    """Return the statistics of the data at `options.prefix`, reading all tokens once."""
    data = IndexedTokens(options.prefix)
    counts = token_counts(data.tokens, f"{data.prefix}.bin")
    return Statistics(
        prefix=data.prefix,
        num_documents=data.num_documents,
        num_tokens=data.num_tokens,
        num_distinct=int(np.count_nonzero(counts)),
        largest_id=len(counts) - 1,
        longest_document=int(np.diff(data.bounds).max()),
        unigram_entropy=entropy(counts),
    )


def token_counts(tokens: Tokens, path: str) -> NDArray[np.int64]:
    """Return the number of occurrences of each id, from 0 to the largest, in `tokens` [t].

    The tokens are read in chunks.

    Raises:
        DataError: A number is not a token id; the message names the file `path`.
    """
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK):
        ids = tokens[start : start + _CHUNK]
        for extreme in (int(ids.min()), int(ids.max())):
            if not 0 <= extreme < _MAX_IDS:
                raise DataError(
                    f"{path} has {extreme}, which is not a token id from 0 to {_MAX_IDS - 1}."
                )
        chunk = np.bincount(ids, minlength=len(counts))
        chunk[: len(counts)] += counts
        counts = chunk
    return counts


def entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy, in nats, of the distribution of `counts`; 0 if all are 0."""
    seen = counts[counts > 0].astype(np.float64)
    if not seen.size:
        return 0.0
    total = float(seen.sum())
    return max(0.0, math.log(total) - float(seen @ np.log(seen)) / total)
