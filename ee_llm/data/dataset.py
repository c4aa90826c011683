"""Token streams that are cut into samples, blended and shuffled.

Shapes: s sequence length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ee_llm.data.indexed import IndexedTokens, Tokens
from ee_llm.data.order import BlendPattern, integer_weights, shuffled
from ee_llm.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Row(NamedTuple):
    """One sample of a batch as numpy arrays [s]."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class RowOptions:
    """Options for turning a window of tokens into a row."""

    eos_token_id: int
    """Id of the end-of-document token, which is also the padding token."""
    vocab_size: int
    """Number of token ids of the model."""
    mask_after_eos: bool = False
    """Mask the loss at end-of-document tokens, whose next token belongs to an unrelated
    document."""
    reset_positions: bool = False
    """Restart positions at 0 after an end-of-document token."""

    def __post_init__(self) -> None:
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise DataError(
                f"model.vocab_size = {self.vocab_size} does not include the tokenizer's "
                f"end-of-document token {self.eos_token_id}. Set it to {self.eos_token_id + 1} or "
                "more."
            )


class Location(NamedTuple):
    """A sample: the index of the source in a blend, and of the window in that source."""

    source: int
    window: int


def split_documents(num_documents: int, fractions: Sequence[float]) -> list[range]:
    """Return the documents of each split: contiguous ranges proportional to `fractions`.

    A split with a fraction above 0 gets at least one document.

    Raises:
        DataError: There are too few documents, a fraction is negative, or all are 0.
    """
    total = sum(fractions)
    if not all(0 <= fraction < float("inf") for fraction in fractions) or total <= 0:
        raise DataError(
            f"data.split = {list(fractions)} must be finite and at least 0, and not all 0."
        )
    wanted = sum(fraction > 0 for fraction in fractions)
    if num_documents < wanted:
        raise DataError(
            f"data.split = {list(fractions)} has {wanted} splits, but there are only "
            f"{num_documents} document(s). Prepare more documents, or set fractions to 0."
        )
    ends = [round(sum(fractions[: i + 1]) / total * num_documents) for i in range(len(fractions))]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for i, fraction in enumerate(fractions):
        if fraction > 0 and sizes[i] == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[i] = 1
    starts = np.cumsum([0, *sizes]).tolist()
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=False)]


class Windows:
    """The samples of a range of documents: windows of s + 1 tokens of their token stream.

    Adjacent windows overlap by one token, so that every token except the first is predicted exactly
    once. The last window may be shorter.

    Raises:
        DataError: The documents have fewer than 2 tokens.
    """

    def __init__(self, data: IndexedTokens, documents: range, seq_length: int) -> None:
        self.prefix = data.prefix
        self.seq_length = seq_length
        start, end = data.bounds[documents.start], data.bounds[documents.stop]
        self._tokens = data.tokens[start:end]
        self._num_windows = -(-(len(self._tokens) - 1) // seq_length)
        if self._num_windows < 1:
            raise DataError(
                f"data {data.prefix} has {len(self._tokens)} tokens in {len(documents)} of "
                f"{data.num_documents} documents, but a sample needs at least 2. Change data.split "
                "or prepare more data."
            )

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int) -> Tokens:
        """Return the 2 to s + 1 tokens of a window as a view of the file."""
        assert 0 <= index < self._num_windows, f"window {index} of {self._num_windows}"
        start = index * self.seq_length
        return self._tokens[start : start + self.seq_length + 1]


class Blend:
    """An infinite, weighted, shuffled sequence of samples from several sources.

    The source and window at position p depend only on (seed, p). A source starts its next epoch, in
    a new order, after all of its windows, independently of the other sources. Without weights, the
    sources are mixed in proportion to their sizes.
    """

    def __init__(
        self,
        sources: Sequence[Windows],
        options: RowOptions,
        seed: int,
        weights: Sequence[float] = (),
    ) -> None:
        if weights and len(weights) != len(sources):
            raise DataError(
                f"data.weights = {list(weights)} has {len(weights)} values for {len(sources)} "
                "data.prefixes. Give one value per prefix, or none."
            )
        self.sources = tuple(sources)
        self.options = options
        self.seq_length = sources[0].seq_length
        self._seed = seed
        self._pattern = BlendPattern(integer_weights(weights or [len(s) for s in sources]))

    def __len__(self) -> int:
        """Return the number of distinct samples, which is an epoch if there is one source."""
        return sum(len(source) for source in self.sources)

    def locate(self, position: int) -> Location:
        """Return the sample at `position`, which is 0 or any larger number."""
        return self._location(*self._pattern.locate(position))

    def _location(self, source: int, taken: int) -> Location:
        size = len(self.sources[source])
        epoch, index = divmod(taken, size)
        return Location(source, shuffled(index, size, self._seed, epoch, source))

    def distinct_samples(self, limit: int) -> list[Location]:
        """Return the first `limit` samples without repetition, fewer if there are fewer.

        Exhausted sources are skipped.
        """
        # Enumerate each source separately: the remaining windows of a source with a small weight
        # can be too far apart to search position by position.
        positions = sorted(
            (self._pattern.position(source, taken), source, taken)
            for source, windows in enumerate(self.sources)
            for taken in range(min(limit, len(windows)))
        )
        return [self._location(source, taken) for _, source, taken in positions[:limit]]

    def row(self, location: Location | None) -> Row:
        """Return a sample as a row; None gives a padding row, which has no loss.

        Raises:
            DataError: A token id is outside the model's vocabulary.
        """
        if location is None:
            return make_row(np.zeros(0, np.int64), self.seq_length, self.options)
        source = self.sources[location.source]
        window = np.asarray(source[location.window], dtype=np.int64)
        for token in (int(window.max()), int(window.min())):
            if not 0 <= token < self.options.vocab_size:
                raise DataError(
                    f"{source.prefix}.bin: token id {token} in window {location.window} is outside "
                    f"the vocabulary, model.vocab_size = {self.options.vocab_size}. Prepare the "
                    "data with the model's tokenizer, or raise model.vocab_size above the largest "
                    "id."
                )
        return make_row(window, source.seq_length, self.options)


def make_row(window: NDArray[np.int64], seq_length: int, options: RowOptions) -> Row:
    """Return the row of a window of at most s + 1 tokens, with masked padding."""
    padded = np.full(seq_length + 1, options.eos_token_id, dtype=np.int64)
    padded[: len(window)] = window
    tokens, labels = padded[:-1].copy(), padded[1:].copy()
    indices = np.arange(seq_length)
    loss_mask = (indices < len(window) - 1).astype(np.float32)
    if options.mask_after_eos:
        loss_mask[tokens == options.eos_token_id] = 0.0
    positions = indices
    if options.reset_positions:
        starts = np.zeros(seq_length, dtype=np.int64)  # document starts, 0 elsewhere
        starts[1:] = np.where(tokens[:-1] == options.eos_token_id, indices[1:], 0)
        positions = indices - np.maximum.accumulate(starts)
    return Row(tokens, labels, loss_mask, positions)


def open_blend(
    prefixes: Sequence[str],
    split: Split,
    *,
    seq_length: int,
    options: RowOptions,
    seed: int,
    weights: Sequence[float] = (),
    fractions: Sequence[float] = (0.98, 0.02, 0.0),
) -> Blend:
    """Return the samples of a split of prepared data.

    Args:
        prefixes: Paths of the data without .bin and .idx.
        split: The split: train, validation or test.
        seq_length: Length s of a sample, in tokens.
        options: How to turn tokens into rows.
        seed: Seed of the order of the train split. The order of the others is fixed, so that runs
            with different seeds are evaluated on the same samples.
        weights: Share of each prefix; by default proportional to its size.
        fractions: Fraction of the documents of each prefix in each split.

    Raises:
        DataError: An option or a file is not valid; the message names it.
    """
    if not prefixes:
        raise DataError("data.prefixes is empty. Prepare data with 'ee-llm data prepare'.")
    if len(fractions) != len(SPLITS) or fractions[SPLITS.index(split)] <= 0:
        raise DataError(f"data.split = {list(fractions)} has no {split} data. Raise its fraction.")
    if seq_length < 1:
        raise DataError(f"data.seq_length = {seq_length} must be at least 1.")
    sources = []
    for prefix in prefixes:
        data = IndexedTokens(prefix)
        try:
            documents = split_documents(data.num_documents, fractions)[SPLITS.index(split)]
        except ValueError as error:
            raise DataError(f"data {prefix}: {error}") from error
        sources.append(Windows(data, documents, seq_length))
    return Blend(sources, options, seed if split == "train" else 0, weights)
