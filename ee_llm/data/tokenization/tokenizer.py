"""Text to token ids and back: bytes, SentencePiece and Hugging Face tokenizers behind one protocol.

Inference reads this module too, so it imports neither torch nor megatron-core, and the libraries
behind a tokenizer only when that tokenizer is loaded.
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
    """What the rest of the code knows of a tokenizer.

    `encode` yields special tokens only on request: a document that spells out "<|endoftext|>" does
    not end there. `decode` leaves special tokens out and shows bytes that are not UTF-8 as U+FFFD.
    Both raise DataError for what they cannot take: a text with an unpaired surrogate, an id that
    the tokenizer does not have.
    """

    @property
    def name(self) -> str:
        """The kind of tokenizer and its file."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` or `eos_token_id` can give."""

    @property
    def eos_token_id(self) -> int:
        """Id of the end-of-document token; raises DataError if no file and no name states it."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generated sequence, as the model's own files state them."""

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token, None if there is none."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Ids of the special tokens by their text."""

    @property
    def tokens_without_row(self) -> Sequence[str]:
        """Added tokens of the tokenizer's files that the model's embedding has no row for.

        They are no tokens here: a text that spells one out is encoded as any other text.
        """

    @property
    def settings(self) -> TokenSettings:
        """What the files beside the tokenizer say."""

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's file puts that token before a text that a model is to read."""

    @property
    def fingerprint(self) -> str:
        """What equal tokenizers share: "bytes", or "sha256:" and the digest of the model file."""

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`, without an end-of-document token.

        parse_special: turn special tokens that the text spells out into their ids.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""


class BytesTokenizer:
    """UTF-8 bytes as they are, and one end-of-document token: 257 ids, no file."""

    name = BYTES
    fingerprint = BYTES
    vocab_size = 257
    eos_token_id = 256
    eos_token_ids = (256,)
    bos = None
    adds_bos = False
    special_tokens: Mapping[str, int] = {}
    tokens_without_row: Sequence[str] = ()
    settings = TokenSettings()

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the UTF-8 bytes of `text`; no text spells out the special token."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of bytes."""
        check_range(ids, self.vocab_size, self.name)
        return bytes(i for i in ids if i != self.eos_token_id).decode(errors="replace")


def load_tokenizer(spec: str | Path, eos_token: str | None = None) -> Tokenizer:
    """Return the tokenizer that `spec` names.

    `spec` is "bytes", the path of a SentencePiece `.model`, of a `tokenizer.json`, or of a
    directory that holds one such file and nothing else (as in a checkpoint). eos_token: the token
    that ends a document, if not the one that the files beside the tokenizer state. Raises
    ValueError if there is no such file or token, or if a file is not what its suffix says.
    """
    if str(spec) == BYTES:
        if eos_token is not None:
            raise DataError(
                f"end-of-document token {eos_token!r}: the byte tokenizer has one of its own, which"
                " has no name. Leave the option out."
            )
        return BytesTokenizer()
    path = Path(spec)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise DataError(f"tokenizer {path}: expected one file in the directory, found {names}")
        path = files[0]
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, eos_token)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eos_token)
    raise DataError(
        f"tokenizer {str(spec)!r}: expected 'bytes', a SentencePiece .model or a tokenizer.json"
    )
