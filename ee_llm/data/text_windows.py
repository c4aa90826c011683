"""Windows of text files that are tokenized as they are read."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ee_llm.data.documents import decode_document, find_sources, raw_documents
from ee_llm.data.tokenization.tokenizer import Tokenizer
from ee_llm.errors import DataError

_BYTES_PER_TOKEN = 4  # of typical text, for the first estimate of the number of tokens
# To encode only the start of a long document, take this many characters per required token, and
# expect this many further tokens: those next to the cut may differ from those of the whole text.
_CHARACTERS_PER_TOKEN, _MARGIN = 16, 256


class TextWindows:
    """The documents of text files as windows of up to `seq_length` + 1 tokens.

    The windows are those of `Windows` over the data that `ee-llm data prepare` writes for the same
    files. One document is in memory at a time.

    Attributes:
        num_tokens: Number of tokens to predict: an estimate until all of the text has been read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Tokenizer,
        seq_length: int,
        num_tokens: int | None,
    ) -> None:
        """Find the files.

        Args:
            paths: Files, and folders with files, of text, JSON or Parquet.
            tokenizer: The tokenizer.
            seq_length: Greatest number of predicted tokens in a window.
            num_tokens: Greatest number of tokens to predict; None for all.

        Raises:
            DataError: A path does not exist or has no text, or the tokenizer has no end token.
        """
        self._sources = find_sources(paths).files
        self._paths = paths
        self._tokenizer, self._eos_token_id = tokenizer, tokenizer.eos_token_id
        self._seq_length = seq_length
        self._limit = num_tokens
        self._num_bytes = sum(source.num_bytes for source in self._sources)
        self.num_tokens = self._limited(max(1, self._num_bytes // _BYTES_PER_TOKEN))

    def __iter__(self) -> Iterator[Tensor]:
        """Yield token ids, int64 [t + 1].

        Raises:
            DataError: A file cannot be read, or there is nothing to predict.
        """
        num_predicted = 0
        rest = torch.empty(0, dtype=torch.int64)  # the tokens from the start of the next window on
        for document in self._documents():
            rest = torch.cat([rest, document])
            while len(rest) > self._seq_length:
                window = rest[: self._limited(self._seq_length, num_predicted) + 1]
                if len(window) < 2:
                    return
                num_predicted += len(window) - 1
                yield window
                rest = rest[self._seq_length :]
        window = rest[: self._limited(self._seq_length, num_predicted) + 1]
        if len(window) > 1:
            yield window
        elif num_predicted == 0:
            names = " ".join(map(str, self._paths))
            raise DataError(
                f"text {names} with num_tokens = {self._limit}: there is nothing to predict. Give"
                " text of at least 2 tokens and a num_tokens of at least 1."
            )

    def _limited(self, count: int, num_predicted: int = 0) -> int:
        """Return `count`, or the number of tokens that may still be predicted if it is less."""
        return count if self._limit is None else max(0, min(count, self._limit - num_predicted))

    def _documents(self) -> Iterator[Tensor]:
        """Yield the tokens [t] of each document with an end token, as long as they are needed."""
        num_tokens = num_read = 0
        for raw in raw_documents(self._sources):
            text = decode_document(raw, "text")
            needed = None if self._limit is None else self._limit + 1 - num_tokens
            if needed is not None and needed <= 0:
                return
            ids = self._encode(text, needed) if text else []
            num_tokens += len(ids)
            num_read += raw.num_read
            estimate = round(num_tokens * self._num_bytes / max(1, num_read)) - 1
            self.num_tokens = self._limited(max(1, estimate))
            yield torch.tensor(ids, dtype=torch.int64)

    def _encode(self, text: str, needed: int | None) -> list[int]:
        """Return the tokens of a document, or only the first ones if these are `needed` or more."""
        if needed is not None:
            length = _CHARACTERS_PER_TOKEN * (needed + _MARGIN)
            while length < len(text):
                ids = self._tokenizer.encode(text[:length])
                if len(ids) >= needed + _MARGIN:
                    return ids[:needed]
                length *= 2
        return [*self._tokenizer.encode(text), self._eos_token_id]
