"""Windows of prepared data, for passes that see each token once."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ee_llm.config import Config
from ee_llm.config.tuning import DEFAULT_SEQ_LENGTH
from ee_llm.data.indexed import IndexedTokens
from ee_llm.errors import DataError


class Windows:
    """Prepared data as windows of up to `seq_length` + 1 tokens.

    Each token is predicted once, in order.
    """

    def __init__(self, prefixes: Sequence[str], seq_length: int, num_tokens: int | None) -> None:
        """Open the data.

        Args:
            prefixes: Prefixes of the prepared data.
            seq_length: Greatest number of predicted tokens in a window.
            num_tokens: Greatest number of tokens to predict; None for all.

        Raises:
            DataError: A file cannot be read, or there is nothing to predict.
        """
        self._data = [IndexedTokens(prefix) for prefix in prefixes]
        self._seq_length = seq_length
        available = sum(max(0, data.num_tokens - 1) for data in self._data)
        self.num_tokens = available if num_tokens is None else min(num_tokens, available)
        if self.num_tokens < 1:
            raise DataError(
                f"data {' '.join(prefixes)} with num_tokens = {num_tokens}: there is nothing to"
                " predict. Give data of at least 2 tokens and a num_tokens of at least 1."
            )

    def __iter__(self) -> Iterator[Tensor]:
        """Yield token ids, int64 [t + 1]."""
        remaining = self.num_tokens
        for data in self._data:
            for start in range(0, data.num_tokens - 1, self._seq_length):
                num = min(self._seq_length, data.num_tokens - 1 - start, remaining)
                if num == 0:
                    return
                remaining -= num
                yield torch.from_numpy(data.tokens[start : start + num + 1].astype("int64"))


class TargetWindow(NamedTuple):
    """A window of which only some tokens count.

    Attributes:
        tokens: Token ids [t + 1].
        is_target: Whether each token after the first one counts as a target, bool [t].
    """

    tokens: Tensor
    is_target: Tensor


class CountedWindows(Protocol):
    """Windows of which the number of tokens is known, perhaps as an estimate."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens to predict."""

    def __iter__(self) -> Iterator[Tensor] | Iterator[TargetWindow]:
        """Yield token ids, int64 [t + 1], or windows with their targets."""


class LaterWindows:
    """Windows without the first ones."""

    def __init__(self, windows: CountedWindows, num_skipped: int) -> None:
        """Take windows, and the number of tokens to leave out, rounded up to whole windows."""
        self._windows, self._limit = windows, num_skipped

    @property
    def num_tokens(self) -> int:
        """Number of tokens to predict."""
        return max(1, self._windows.num_tokens - self._limit)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield token ids, int64 [t + 1].

        Raises:
            DataError: Nothing is left.
        """
        num_skipped, is_empty = 0, True
        for window in self._windows:
            assert isinstance(window, Tensor), "windows of text"
            if num_skipped < self._limit:
                num_skipped += len(window) - 1
            else:
                is_empty = False
                yield window
        if is_empty:
            raise DataError(
                f"the text has {num_skipped:,} tokens, all of which gate_tokens = {self._limit:,}"
                " uses to train gates. Give more text, or lower gate_tokens."
            )


def check_window(window: Tensor, vocab_size: int) -> None:
    """Raise DataError if a token id is outside the vocabulary."""
    if int(window.min()) < 0 or int(window.max()) >= vocab_size:
        raise DataError(
            f"the data has token ids {int(window.min())} to {int(window.max())}, outside"
            f" model.vocab_size = {vocab_size}. Prepare the data with the checkpoint's tokenizer."
        )


def default_length(config: Config) -> int:
    """Return the length of a window if no option sets it: that of training, with a limit.

    The limit is `DEFAULT_SEQ_LENGTH`, because the time of attention is quadratic in the length.
    """
    return min(config.data.seq_length, DEFAULT_SEQ_LENGTH)


def counted_positions(window: Tensor, eos_token_id: int | None) -> Tensor:
    """Return whether each token after the first one counts as a target, bool [t].

    Args:
        window: Token ids [t + 1].
        eos_token_id: Id of the end token: its successors do not count. None counts all tokens.
    """
    if eos_token_id is None:
        return torch.ones(len(window) - 1, dtype=torch.bool)
    return window[:-1] != eos_token_id


def check_counted(num_targets: int) -> None:
    """Raise DataError if no token of the data counted as a target."""
    if num_targets == 0:
        raise DataError(
            "the data has no token to predict: with data.mask_after_eos, tokens after an end token"
            " do not count. Give data with longer documents."
        )
