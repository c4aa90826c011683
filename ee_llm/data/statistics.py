"""Figures of prepared data: how many tokens, and how surprising they are one by one."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ee_llm.data.indexed import IndexedTokens, Tokens
from ee_llm.errors import DataError

_CHUNK = 1 << 22  # tokens
_MAX_IDS = 1 << 31  # more than any vocabulary has; each id is a counter in memory


@dataclass(frozen=True)
class StatisticsOptions:
    """Print what prepared data consist of."""

    prefix: Path
    """Prefix of the data, for example data/corpus for data/corpus.bin and .idx."""


class Statistics(NamedTuple):
    """Figures of a data set; as text, one line for people."""

    prefix: str
    num_documents: int
    num_tokens: int
    num_distinct: int
    """Different token ids that occur."""
    largest_id: int
    longest_document: int
    """Its length in tokens."""
    unigram_entropy: float
    """In nats per token: the loss of a model that knows the frequencies and nothing else."""

    def __str__(self) -> str:
        return (
            f"{self.prefix}: {self.num_documents:,} documents of at most "
            f"{self.longest_document:,} tokens, {self.num_tokens:,} tokens, "
            f"{self.num_distinct:,} different ids up to {self.largest_id:,}, "
            f"unigram entropy {self.unigram_entropy:.3f} nats/token"
        )


def statistics(options: StatisticsOptions) -> Statistics:
    """Return the figures of the data at `options.prefix`; reads all of them once."""
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
    """Return how often each id from 0 to the largest occurs in `tokens` [t], read in chunks.

    Raises DataError, naming the file `path` that they are of, for what can be no token id.
    """
    counts = np.zeros(0, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK):
        ids = tokens[start : start + _CHUNK]
        for extreme in (int(ids.min()), int(ids.max())):
            if not 0 <= extreme < _MAX_IDS:
                raise DataError(
                    f"{path}: holds {extreme}, which is no token id: these are 0 to {_MAX_IDS - 1}"
                )
        chunk = np.bincount(ids, minlength=len(counts))
        chunk[: len(counts)] += counts
        counts = chunk
    return counts


def entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy, in nats, of the distribution that `counts` are of; of none it is 0."""
    seen = counts[counts > 0].astype(np.float64)
    if not seen.size:
        return 0.0
    total = float(seen.sum())
    return max(0.0, math.log(total) - float(seen @ np.log(seen)) / total)
