"""Token streams cut into samples, blended and ordered.

One legend: s = seq_length, n = tokens of a split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ee_llm.data.indexed import IndexedTokens, Tokens
from ee_llm.data.order import BlendPattern, shuffled, whole_weights
from ee_llm.errors import DataError

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


class Row(NamedTuple):
    """One sample, ready for a batch: numpy arrays [s]."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class RowOptions:
    """How a window of tokens becomes a row."""

    eos_token_id: int
    """Id of the end-of-document token; also what padding consists of."""
    vocab_size: int
    """Number of ids that the model has."""
    mask_after_eos: bool = False
    """Whether there is no loss where the input is an end-of-document token, that is, for
    predicting the first token of an unrelated document."""
    reset_positions: bool = False
    """Whether positions start again at 0 after an end-of-document token."""

    def __post_init__(self) -> None:
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise DataError(
                f"model.vocab_size = {self.vocab_size}: the tokenizer's end-of-document token "
                f"{self.eos_token_id} is beyond it; set it to {self.eos_token_id + 1} or more"
            )


class Location(NamedTuple):
    """A sample: which source of a blend, and which window of it."""

    source: int
    window: int


def split_documents(num_documents: int, fractions: Sequence[float]) -> list[range]:
    """Return the documents of each part: contiguous ranges in the proportion of `fractions`.

    A part whose fraction is above 0 gets at least one document. Raises DataError if there are
    not enough documents for that, or for fractions below 0 or all 0.
    """
    total = sum(fractions)
    if not all(0 <= fraction < float("inf") for fraction in fractions) or total <= 0:
        raise DataError(f"data.split = {list(fractions)}: must be at least 0, and not all 0")
    wanted = sum(fraction > 0 for fraction in fractions)
    if num_documents < wanted:
        raise DataError(
            f"data.split = {list(fractions)}: {wanted} parts, but only {num_documents} document(s)"
            "; prepare more documents, or set the other fractions to 0"
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
    """The samples of some documents of one data set: windows of s + 1 tokens of their stream.

    Neighbouring windows share one token, so that every token but the very first is predicted
    exactly once. The last window may be shorter. Raises DataError if there is nothing to predict.
    """

    def __init__(self, data: IndexedTokens, documents: range, seq_length: int) -> None:
        self.prefix = data.prefix
        self.seq_length = seq_length
        start, end = data.bounds[documents.start], data.bounds[documents.stop]
        self._tokens = data.tokens[start:end]
        self._num_windows = -(-(len(self._tokens) - 1) // seq_length)
        if self._num_windows < 1:
            raise DataError(
                f"data {data.prefix}: {len(self._tokens)} tokens in {len(documents)} of "
                f"{data.num_documents} documents, at least 2 are needed; see data.split"
            )

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int) -> Tokens:
        """Return the tokens of a window, 2 to s + 1 of them, as a view of the file."""
        assert 0 <= index < self._num_windows, f"window {index} of {self._num_windows}"
        start = index * self.seq_length
        return self._tokens[start : start + self.seq_length + 1]


class Blend:
    """An endless, weighted, shuffled sequence of samples from several sources.

    Position p takes source and window from (seed, p) alone. A source begins its next epoch, in a
    new order, when all its windows were taken, whatever the other sources do. Without weights
    the sources are mixed in proportion to their size.
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
                f"data.weights = {list(weights)}: give one weight for each of the {len(sources)} "
                "data.prefixes, or none"
            )
        self.sources = tuple(sources)
        self.options = options
        self.seq_length = sources[0].seq_length
        self._seed = seed
        self._pattern = BlendPattern(whole_weights(weights or [len(s) for s in sources]))

    def __len__(self) -> int:
        """Return the number of different samples, which is one epoch where there is one source."""
        return sum(len(source) for source in self.sources)

    def locate(self, position: int) -> Location:
        """Return the sample at `position`, from 0 on without end."""
        return self._location(*self._pattern.locate(position))

    def _location(self, source: int, taken: int) -> Location:
        size = len(self.sources[source])
        epoch, index = divmod(taken, size)
        return Location(source, shuffled(index, size, self._seed, epoch, source))

    def once(self, limit: int) -> list[Location]:
        """Return the first `limit` samples without any repetition, fewer if there are fewer.

        A source that is used up is passed over from there on.
        """
        # Each source on its own, as far as it goes: a source of small weight may have windows left
        # long after the others, at positions too far apart to be searched one by one.
        places = sorted(
            (self._pattern.position(source, taken), source, taken)
            for source, windows in enumerate(self.sources)
            for taken in range(min(limit, len(windows)))
        )
        return [self._location(source, taken) for _, source, taken in places[:limit]]

    def row(self, location: Location | None) -> Row:
        """Return a sample as a row; None gives a row of padding, which has no loss.

        Raises DataError for a token id that the model does not have.
        """
        if location is None:
            return make_row(np.zeros(0, np.int64), self.seq_length, self.options)
        source = self.sources[location.source]
        window = np.asarray(source[location.window], dtype=np.int64)
        for token in (int(window.max()), int(window.min())):
            if not 0 <= token < self.options.vocab_size:
                raise DataError(
                    f"{source.prefix}.bin: token id {token} (in window {location.window}) is "
                    f"beyond the vocabulary, model.vocab_size = {self.options.vocab_size}; prepare "
                    "the data with the model's tokenizer, or raise model.vocab_size above the "
                    "largest id"
                )
        return make_row(window, source.seq_length, self.options)


def make_row(window: NDArray[np.int64], seq_length: int, options: RowOptions) -> Row:
    """Return the row of a window of at most s + 1 tokens; padded, the padding masked."""
    padded = np.full(seq_length + 1, options.eos_token_id, dtype=np.int64)
    padded[: len(window)] = window
    tokens, labels = padded[:-1].copy(), padded[1:].copy()
    places = np.arange(seq_length)
    loss_mask = (places < len(window) - 1).astype(np.float32)
    if options.mask_after_eos:
        loss_mask[tokens == options.eos_token_id] = 0.0
    positions = places
    if options.reset_positions:
        begins = np.zeros(seq_length, dtype=np.int64)  # where the document of each token begins
        begins[1:] = np.where(tokens[:-1] == options.eos_token_id, places[1:], 0)
        positions = places - np.maximum.accumulate(begins)
    return Row(tokens, labels, loss_mask, positions)


def open_blend(
    prefixes: Sequence[str],
    part: Part,
    *,
    seq_length: int,
    options: RowOptions,
    seed: int,
    weights: Sequence[float] = (),
    split: Sequence[float] = (0.98, 0.02, 0.0),
) -> Blend:
    """Return the samples of one part (train, validation or test) of prepared data.

    `split` has the fraction of the documents of each prefix in each part. `seed` orders the
    training part; the order of the others never changes, so that runs with different seeds are
    compared on the same samples. Raises DataError, naming the option or file, for what is wrong.
    """
    if not prefixes:
        raise DataError("data.prefixes is empty; make data with 'ee-llm data prepare'")
    if len(split) != len(PARTS) or split[PARTS.index(part)] <= 0:
        raise DataError(f"data.split = {list(split)}: has no {part} part")
    if seq_length < 1:
        raise DataError(f"data.seq_length = {seq_length}: must be at least 1")
    sources = []
    for prefix in prefixes:
        data = IndexedTokens(prefix)
        try:
            documents = split_documents(data.num_documents, split)[PARTS.index(part)]
        except ValueError as error:
            raise DataError(f"data {prefix}: {error}") from error
        sources.append(Windows(data, documents, seq_length))
    return Blend(sources, options, seed if part == "train" else 0, weights)
