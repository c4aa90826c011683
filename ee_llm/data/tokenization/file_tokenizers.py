"""Tokenizers loaded from a file: SentencePiece models and tokenizer.json files."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ee_llm.config.tokenizer import file_fingerprint
from ee_llm.data.tokenization.long_text import CHUNK, encode_long_text
from ee_llm.data.tokenization.token_settings import (
    TOKENIZER_CONFIG,
    read_token_settings,
    settings_folder,
)
from ee_llm.errors import DataError

EOS_NAMES = (
    *("<eod>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<|eot_id|>", "<eos>"),
    *("<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>", "<|im_end|>", "<end_of_turn>", "<|end|>"),
    *("[EOS]", "<|eos|>", "<EOS>", "<|END_OF_TURN_TOKEN|>", "<|return|>"),
)
"""Common names of the end-of-document token, tried in order if no file defines it."""

BOS_NAMES = (
    *("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<｜begin▁of▁sentence｜>"),
    *("[BOS]", "<BOS_TOKEN>"),
)
"""Common names of the beginning-of-sequence token, tried in order if no file defines it."""

_PREFIXES = ("\n", "<unk>", "\0")  # to encode an inner part of a text after
_SPACE_SYMBOL = "\u2581"  # SentencePiece's symbol for a space


class FileTokenizer(ABC):
    """A tokenizer loaded from a file, with settings in the files next to it."""

    kind: str
    vocab_size: int
    bos_token_id: int | None
    adds_bos = False
    special_tokens: Mapping[str, int]
    tokens_without_embedding: Sequence[str] = ()

    def __init__(self, path: Path, eos_token: str | None) -> None:
        self.path = path
        self._content = _read(path)
        self._eos_token = eos_token
        self.fingerprint = file_fingerprint(self._content)
        self.name = f"{self.kind} {path}"
        self.settings = read_token_settings(settings_folder(path))

    @cached_property
    def eos_token_id(self) -> int:
        """Id of the end-of-document token; raises DataError if it is unknown."""
        if self._eos_token is not None:
            return self._id_of(self._eos_token, "the given end-of-document token")
        if (text := self.settings.texts.get("eos_token")) is not None:
            where = settings_folder(self.path) / TOKENIZER_CONFIG
            return self._id_of(text, f"the eos_token of {where}")
        if self.settings.eos_ids:
            return self.settings.eos_ids[0]
        candidates = (self._find(name) for name in EOS_NAMES)
        eos_token_id = next((i for i in candidates if i is not None), self._model_eos)
        if eos_token_id is None:
            raise DataError(
                f"tokenizer {self.path} has no known end-of-document token: no file next to it "
                f"defines one, and it has none of the common names ({', '.join(EOS_NAMES)}). Name "
                "the token with --eos-token ('ee-llm data prepare') or --data.eos-token ('ee-llm "
                "train')."
            )
        return eos_token_id

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generated sequence; empty if they are unknown."""
        eos_ids = self.settings.eos_ids
        if self._eos_token is not None:
            return tuple(dict.fromkeys((self.eos_token_id, *eos_ids)))
        if eos_ids:
            return eos_ids
        try:
            return (self.eos_token_id,)
        except ValueError:
            return ()

    def _has_embedding(self, token: int) -> bool:
        """Return whether the model's embedding has a row for an added token.

        Many models define a padding token outside their vocabulary, without training it.
        """
        return self.settings.embedding_size is None or token < self.settings.embedding_size

    @property
    def _model_eos(self) -> int | None:
        """Id of the end-of-sequence token in the tokenizer file itself, if any."""
        return None

    @abstractmethod
    def _find(self, token: str) -> int | None:
        """Return the id of a token by its text, None if it is not in the vocabulary."""

    def _id_of(self, token: str, description: str) -> int:
        token_id = self._find(token)
        if token_id is None:
            raise DataError(
                f"tokenizer {self.path}: {description}, {token!r}, is not in the vocabulary. Name "
                "another token with --eos-token or --data.eos-token."
            )
        return token_id

    def _find_bos(self, added: int | None) -> int | None:
        """Return the id of the beginning-of-sequence token, None if there is none.

        Args:
            added: The id that the tokenizer file itself defines, if any.
        """
        if added is not None:
            return added
        text = self.settings.texts.get("bos_token")
        if text is not None and (token_id := self._find(text)) is not None:
            return token_id
        if self.settings.has_no_bos:
            return None
        if self.settings.bos_id is not None:
            return self.settings.bos_id
        return next((i for name in BOS_NAMES if (i := self._find(name)) is not None), None)


class SentencePieceTokenizer(FileTokenizer):
    """A SentencePiece model (`.model` file) and the tokens that the files next to it add.

    For models from `train_sentencepiece`, decode(encode(text)) == text for any text.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, eos_token: str | None = None) -> None:
        super().__init__(path, eos_token)
        self._model = self._load()
        self._num_pieces: int = self._model.vocab_size()
        control = {
            self._model.id_to_piece(i): i
            for i in range(self._num_pieces)
            if self._model.is_control(i) or self._model.is_unknown(i)
        }
        self._added = {t: a for t, a in self.settings.added.items() if self._has_embedding(a.id)}
        self.tokens_without_embedding = [t for t in self.settings.added if t not in self._added]
        added = {t: a for t, a in self._added.items() if a.id >= self._num_pieces}
        special = {t: a.id for t, a in self._added.items() if a.is_special}
        self.special_tokens = {**control, **special}
        self._added_texts = {a.id: "" if a.is_special else t for t, a in added.items()}
        self.vocab_size = max([self._num_pieces, *(i + 1 for i in self._added_texts)])
        bos = self._model.bos_id()
        self.bos_token_id = self._find_bos(bos if bos >= 0 else None)
        # SentencePiece represents a space by U+2581, so that a U+2581 in the text would become a
        # space. Encode this character as bytes if the model has byte pieces, unless the model adds
        # a space before a text: then each part of the divided text would get one.
        in_bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]
        adds_space = self._model.encode("x", out_type=str)[0].startswith(_SPACE_SYMBOL)
        uses_bytes = all(self._model.is_byte(i) for i in in_bytes) and not adds_space
        self._space_symbol_ids: list[int] = in_bytes if uses_bytes else []

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text`."""
        text.encode()  # Raises ValueError for an unpaired surrogate; the library can do anything.
        if parse_special:
            return list(self._parse(text))
        if not self._space_symbol_ids or _SPACE_SYMBOL not in text:
            return list(self._model.encode(text))
        first, *others = text.split(_SPACE_SYMBOL)
        ids = list(self._model.encode(first))
        for part in others:
            ids += self._space_symbol_ids
            ids += self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        check_range(ids, self.vocab_size, self.name)
        runs: list[str | list[int]] = [[]]
        for i in map(int, ids):
            if i < self._num_pieces:
                if isinstance(runs[-1], str):
                    runs.append([])
                runs[-1].append(i)  # type: ignore[union-attr]
            elif text := self._added_texts.get(i):
                runs.append(text)
        return "".join(r if isinstance(r, str) else str(self._model.decode(r)) for r in runs)

    def _parse(self, text: str) -> Iterator[int]:
        """Yield the ids of special tokens in a text and of the text between them."""
        names = {**{t: a.id for t, a in self._added.items()}, **self.special_tokens}
        pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        parts = re.split(f"({pattern})", text) if names else [text]
        for index, part in enumerate(parts):
            if index % 2:
                yield names[part]
            elif part:
                # Legacy models add a space before every part, others only before the first part.
                is_first = index == 0 or self.settings.is_legacy
                yield from self.encode(part) if is_first else self._encode_inner(part)

    def _encode_inner(self, text: str) -> list[int]:
        """Return the ids of a text without the space that the model adds before a text.

        The text is encoded after a prefix, which gets the space and is then removed. The prefix
        must not merge with the text into a longer piece, as two newlines do in some models.
        """
        for prefix in _PREFIXES:
            start, ids = self._model.encode(prefix), list(self._model.encode(prefix + text))
            if ids[: len(start)] == start:
                return ids[len(start) :]
        return list(self._model.encode(text))

    def _load(self) -> Any:
        import sentencepiece

        model: Any = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(self._content)
        except RuntimeError as error:
            raise DataError(
                f"{self.path} is not a SentencePiece model. Give another --tokenizer."
            ) from error
        return model

    @property
    def _model_eos(self) -> int | None:
        return eos if (eos := self._model.eos_id()) >= 0 else None

    def _find(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].id
        token_id: int = self._model.piece_to_id(token)
        return token_id if self._model.id_to_piece(token_id) == token else None


class HuggingFaceTokenizer(FileTokenizer):
    """A `tokenizer.json` file of the tokenizers library."""

    kind = "huggingface"

    def __init__(self, path: Path, eos_token: str | None = None) -> None:
        super().__init__(path, eos_token)
        self._model = self._load()
        decoder = self._model.get_added_tokens_decoder()
        self.tokens_without_embedding = [
            t.content for i, t in decoder.items() if not self._has_embedding(i)
        ]
        if self.tokens_without_embedding:
            self._model = self._load()
        self._model.encode_special_tokens = True  # Encode special tokens as ordinary text.
        self._is_byte_pair = type(self._model.model).__name__ == "BPE"
        self._vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        added = self._model.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in added.items() if t.special}
        # A post-processor may add tokens before and after a text.
        first = self._model.encode("x", add_special_tokens=True).ids[:1]
        self.adds_bos = first != self._model.encode("x", add_special_tokens=False).ids[:1]
        self.bos_token_id = self._find_bos(first[0] if self.adds_bos else None)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`, without the special tokens of a post-processor."""
        text.encode()  # Raises ValueError for an unpaired surrogate; the library can do anything.
        model = self._parsing if parse_special else self._model
        encode = partial(model.encode, add_special_tokens=False)
        if len(text) <= CHUNK:
            return list(encode(text).ids)
        return encode_long_text(encode, text, splits_words=self._is_byte_pair, size=CHUNK)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        check_range(ids, self.vocab_size, self.name)
        return str(self._model.decode([int(i) for i in ids], skip_special_tokens=True))

    @cached_property
    def _parsing(self) -> Any:
        """A second model, which parses special tokens, so that threads can share both models."""
        return self._load()

    def _load(self) -> Any:
        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_str(self._content.decode())
            if self.tokens_without_embedding:
                model = tokenizers.Tokenizer.from_str(self._content_with_embeddings())
        except Exception as error:  # The library raises plain Exception.
            raise DataError(
                f"{self.path} is not a tokenizer.json of the tokenizers library: {error}. "
                "Give another --tokenizer."
            ) from error
        # A file may enable truncation or padding to the sequence length of some model.
        model.no_truncation()
        model.no_padding()
        # As in transformers, the tokens that tokenizer_config.json defines as special are special.
        special = [*self.settings.texts.values()]
        special += [text for text, token in self.settings.added.items() if token.is_special]
        added = {token.content: token for token in model.get_added_tokens_decoder().values()}
        for text in special:
            token = added.get(text, text if model.token_to_id(text) is not None else None)
            if token is not None and getattr(token, "special", False) is False:
                if not isinstance(token, str):
                    token.special = True
                model.add_special_tokens([token])
        return model

    def _content_with_embeddings(self) -> str:
        """Return the file without `tokens_without_embedding`: the library cannot remove tokens."""
        content = json.loads(self._content)
        content["added_tokens"] = [
            t for t in content["added_tokens"] if self._has_embedding(t["id"])
        ]
        return json.dumps(content, ensure_ascii=False)

    def _find(self, token: str) -> int | None:
        return self._vocabulary.get(token)


def check_range(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Raise DataError if an id is outside the tokenizer's vocabulary."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise DataError(
                f"token id {i} is outside the vocabulary of tokenizer {name}, 0..{vocab_size - 1}."
            )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer {path} cannot be read: {error.strerror}. Give 'bytes', or the path of a "
            "SentencePiece .model or a tokenizer.json."
        ) from error
