"""The tokenizer protocol, the byte tokenizer and `load_tokenizer`.

Inference uses this module too, so it imports neither torch nor megatron-core, and imports the
library of a tokenizer only when that tokenizer is loaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ee_llm.config.tokenizer import BYTES
from ee_llm.data.tokenization.file_tokenizers import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    check_range,
)
from ee_llm.data.tokenization.token_settings import TokenSettings
from ee_llm.errors import DataError


class Tokenizer(Protocol):
    """Interface of all tokenizers.

    `encode` returns special tokens only on request: a document that contains "<|endoftext|>" does
    not end there. `decode` omits special tokens and replaces bytes that are not UTF-8 by U+FFFD.
    Both raise ValueError for invalid input: `encode` for a text with an unpaired surrogate,
    `decode` for an id outside the vocabulary.
    """

    @property
    def name(self) -> str:
        """Kind of the tokenizer and path of its file."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` or `eos_token_id` can return."""

    @property
    def eos_token_id(self) -> int:
        """Id of the end-of-document token; raises DataError if it is unknown."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generated sequence, from the model's files."""

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token, None if there is none."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the special tokens by text."""

    @property
    def tokens_without_embedding(self) -> Sequence[str]:
        """Added tokens in the tokenizer's files for which the model's embedding has no row.

        They are not tokens of this object, which encodes their text like any other text.
        """

    @property
    def settings(self) -> TokenSettings:
        """Settings from the files next to the tokenizer."""

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer file adds the beginning-of-sequence token before a text."""

    @property
    def fingerprint(self) -> str:
        """Identity of the tokenizer: "bytes", or "sha256:" and the digest of the model file."""

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`, without an end-of-document token.

        Args:
            text: The text.
            parse_special: Convert special tokens in the text into their ids.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""


class BytesTokenizer:
    """UTF-8 bytes and an end-of-document token: 257 ids, without a file."""

    name = BYTES
    fingerprint = BYTES
    vocab_size = 257
    eos_token_id = 256
    eos_token_ids = (256,)
    bos_token_id = None
    adds_bos = False
    special_tokens: Mapping[str, int] = {}
    tokens_without_embedding: Sequence[str] = ()
    settings = TokenSettings()

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the UTF-8 bytes of `text`; the end-of-document token has no text."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of bytes."""
        check_range(ids, self.vocab_size, self.name)
        return bytes(i for i in ids if i != self.eos_token_id).decode(errors="replace")


def load_tokenizer(spec: str | Path, eos_token: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: "bytes", or the path of a SentencePiece `.model`, a `tokenizer.json`, or a directory
            with one such file and no other file, as in a checkpoint.
        eos_token: Text of the token that ends a document. Default: the one in the files next to
            the tokenizer.

    Raises:
        DataError: The file or token does not exist, or the file is not valid.
    """
    if str(spec) == BYTES:
        if eos_token is not None:
            raise DataError(
                f"end-of-document token {eos_token!r} cannot be used with the byte tokenizer, "
                "which has its own. Omit the option."
            )
        return BytesTokenizer()
    path = Path(spec)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise DataError(
                f"tokenizer {path}: expected one file in the directory, found {names}. Give the "
                "path of the file."
            )
        path = files[0]
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, eos_token)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eos_token)
    raise DataError(
        f"tokenizer {str(spec)!r} is not supported. Give 'bytes', or the path of a SentencePiece "
        ".model or a tokenizer.json."
    )
