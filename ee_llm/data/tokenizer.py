"""Text to token ids and back: bytes, SentencePiece and Hugging Face tokenizers behind one protocol.

Inference reads this module too, so it imports neither torch nor megatron-core, and the libraries
behind a tokenizer only when that tokenizer is loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ee_llm.config.tokenizer import BYTES, file_mark

EOD_NAMES = ("<eod>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<|eot_id|>", "<eos>")
"""What tokenizers call the end-of-document token, in the order in which they are looked for."""

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
"""What tokenizers call the beginning-of-sequence token, in the order they are looked for."""

_SPACE_MARK = "\u2581"  # SentencePiece's stand-in for a space


class Tokenizer(Protocol):
    """What the rest of the code knows of a tokenizer.

    `encode` never yields special tokens, whatever the text contains: a document that spells out
    "<|endoftext|>" does not end there. `decode` leaves special tokens out, shows bytes that are
    not UTF-8 as U+FFFD. Both raise ValueError for what they can not take: a text with an unpaired
    surrogate, an id that the tokenizer does not have.
    """

    @property
    def name(self) -> str:
        """The kind of tokenizer and its file."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that `encode` or `eod` can give."""

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token, None if there is none. `encode` never gives it."""

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's file puts that token before a text that a model is to read."""

    @property
    def fingerprint(self) -> str:
        """What equal tokenizers share: "bytes", or "sha256:" and the digest of the model file."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without an end-of-document token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""


class BytesTokenizer:
    """UTF-8 bytes as they are, and one end-of-document token: 257 ids, no file."""

    name = BYTES
    fingerprint = BYTES
    vocab_size = 257
    eod = 256
    bos = None
    adds_bos = False

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of `text`."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of bytes."""
        _check_range(ids, self.vocab_size, self.name)
        return bytes(i for i in ids if i != self.eod).decode(errors="replace")


class _FileTokenizer:
    """What the tokenizers that live in one file have in common."""

    kind: str
    vocab_size: int
    bos: int | None
    adds_bos = False

    def __init__(self, path: Path) -> None:
        self._content = _read(path)
        self.fingerprint = file_mark(self._content)
        self.name = f"{self.kind} {path}"


class SentencePieceTokenizer(_FileTokenizer):
    """A SentencePiece model (`.model` file).

    With a model from `train_sentencepiece`, decode(encode(text)) == text for any text.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import sentencepiece

        self._model: Any = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(self._content)
        except RuntimeError as error:
            raise ValueError(f"{path}: not a SentencePiece model") from error
        self.vocab_size = self._model.vocab_size()
        pieces = {name: self._model.piece_to_id(name) for name in EOD_NAMES}
        known = {name: i for name, i in pieces.items() if self._model.id_to_piece(i) == name}
        self.eod = _find_eod(known, path)
        self.bos = bos if (bos := self._model.bos_id()) >= 0 else None
        # SentencePiece writes a space as U+2581 and so turns a U+2581 of the text into a space.
        # Where the model has byte pieces that one character is spelled in bytes; not where the
        # model puts a space before the text, as every part of a divided text would get one.
        spelled = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        prefixed = self._model.encode("x", out_type=str)[0].startswith(_SPACE_MARK)
        can_spell = all(self._model.is_byte(i) for i in spelled) and not prefixed
        self._spelled_mark: list[int] = spelled if can_spell else []

    def encode(self, text: str) -> list[int]:
        """Return the ids of the pieces of `text`."""
        text.encode()  # an unpaired surrogate is a ValueError here, in the library anything
        if not self._spelled_mark or _SPACE_MARK not in text:
            return list(self._model.encode(text))
        first, *others = text.split(_SPACE_MARK)
        ids = list(self._model.encode(first))
        for part in others:
            ids += self._spelled_mark
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of pieces."""
        _check_range(ids, self.vocab_size, self.name)
        return str(self._model.decode([int(i) for i in ids]))


class HuggingFaceTokenizer(_FileTokenizer):
    """A `tokenizer.json` of the tokenizers library."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_str(self._content.decode())
        except Exception as error:  # the library raises plain Exception
            raise ValueError(
                f"{path}: not a tokenizer.json of the tokenizers library: {error}"
            ) from error
        # A file may ask to cut or pad its texts to the length that some model was trained with.
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # as text, letter by letter
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eod = _find_eod(vocabulary, path)
        self.bos = next((vocabulary[name] for name in BOS_NAMES if name in vocabulary), None)
        # A post-processor may put tokens before a text, and others behind it.
        first = self._model.encode("x", add_special_tokens=True).ids[:1]
        if first != self._model.encode("x", add_special_tokens=False).ids[:1]:
            self.adds_bos = True
            [self.bos] = first

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without the special tokens of a post-processor."""
        text.encode()  # an unpaired surrogate is a ValueError here, in the library anything
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        _check_range(ids, self.vocab_size, self.name)
        return str(self._model.decode([int(i) for i in ids], skip_special_tokens=True))


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Return the tokenizer that `spec` names.

    `spec` is "bytes", the path of a SentencePiece `.model`, of a `tokenizer.json`, or of a
    directory that holds one such file and nothing else (as in a checkpoint). Raises ValueError if
    there is no such file, if it is not what its suffix says, or if it has none of EOD_NAMES.
    """
    if str(spec) == BYTES:
        return BytesTokenizer()
    path = Path(spec)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise ValueError(f"tokenizer {path}: expected one file in the directory, found {names}")
        path = files[0]
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    raise ValueError(
        f"tokenizer {str(spec)!r}: expected 'bytes', a SentencePiece .model or a tokenizer.json"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"tokenizer {path}: can not be read ({error.strerror}); give 'bytes', or the path of a "
            "SentencePiece .model or a tokenizer.json"
        ) from error


def _find_eod(known: dict[str, int], path: Path) -> int:
    for name in EOD_NAMES:
        if name in known:
            return known[name]
    raise ValueError(
        f"tokenizer {path}: has no end-of-document token of a name that is looked for "
        f"({', '.join(EOD_NAMES)}); add one of these to it, or use another tokenizer"
    )


def _check_range(ids: Sequence[int], vocab_size: int, name: str) -> None:
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id {i} is not one of the {vocab_size} ids of tokenizer {name}")
