"""Tokenizers that live in a file: SentencePiece models and the tokenizers library's JSON."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ee_llm.config.tokenizer import file_fingerprint
from ee_llm.data.tokenization.long_text import PIECE, encode_long_text
from ee_llm.data.tokenization.token_settings import (
    TOKENIZER_CONFIG,
    read_token_settings,
    settings_folder,
)
from ee_llm.errors import DataError

EOD_NAMES = (
    *("<eod>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<|eot_id|>", "<eos>"),
    *("<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>", "<|im_end|>", "<end_of_turn>", "<|end|>"),
    *("[EOS]", "<|eos|>", "<EOS>", "<|END_OF_TURN_TOKEN|>", "<|return|>"),
)
"""Common names of the end-of-document token, tried in order where no file states it."""

BOS_NAMES = (
    *("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<｜begin▁of▁sentence｜>"),
    *("[BOS]", "<BOS_TOKEN>"),
)
"""Common names of the beginning-of-sequence token, tried in order where no file states it."""

_BEFORE = ("\n", "<unk>", "\0")  # what to encode an inner part of a text behind
_SPACE_MARK = "\u2581"  # SentencePiece's stand-in for a space


class FileTokenizer(ABC):
    """A tokenizer that lives in one file, with settings in the files beside it."""

    kind: str
    vocab_size: int
    bos: int | None
    adds_bos = False
    special_tokens: Mapping[str, int]
    tokens_without_row: Sequence[str] = ()

    def __init__(self, path: Path, eos_token: str | None) -> None:
        self.path = path
        self._content = _read(path)
        self._eos_token = eos_token
        self.fingerprint = file_fingerprint(self._content)
        self.name = f"{self.kind} {path}"
        self.settings = read_token_settings(settings_folder(path))

    @cached_property
    def eos_token_id(self) -> int:
        """Id of the end-of-document token; raises DataError if nothing states it."""
        if self._eos_token is not None:
            return self._id_of(self._eos_token, "the end-of-document token that was asked for")
        if (stated := self.settings.texts.get("eos_token")) is not None:
            where = settings_folder(self.path) / TOKENIZER_CONFIG
            return self._id_of(stated, f"the eos_token of {where}")
        if self.settings.eos_ids:
            return self.settings.eos_ids[0]
        named = (self._find(name) for name in EOD_NAMES)
        found = next((i for i in named if i is not None), self._own_eos)
        if found is None:
            raise DataError(
                f"tokenizer {self.path}: no file beside it states its end-of-document token, and it"
                f" has none of the usual names ({', '.join(EOD_NAMES)}). Name the token with"
                " --eos-token ('ee-llm data prepare') or --data.eos-token ('ee-llm train')."
            )
        return found

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generated sequence; empty if nothing states one."""
        stated = self.settings.eos_ids
        if self._eos_token is not None:
            return tuple(dict.fromkeys((self.eos_token_id, *stated)))
        if stated:
            return stated
        try:
            return (self.eos_token_id,)
        except ValueError:
            return ()

    def _has_row(self, token: int) -> bool:
        """Return whether the model's embedding has a row for an added token.

        Many models have a padding token beside their vocabulary that they were never trained with.
        """
        return self.settings.num_rows is None or token < self.settings.num_rows

    @property
    def _own_eos(self) -> int | None:
        """Id that the tokenizer's file itself calls the end of a sequence."""
        return None

    @abstractmethod
    def _find(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, None if there is none of that name."""

    def _id_of(self, token: str, what: str) -> int:
        found = self._find(token)
        if found is None:
            raise DataError(
                f"tokenizer {self.path}: {what}, {token!r}, is not in the vocabulary. Name one that"
                " is, with --eos-token or --data.eos-token."
            )
        return found

    def _find_bos(self, added: int | None) -> int | None:
        """Return the id of the beginning-of-sequence token; `added`: what the file itself adds."""
        if added is not None:
            return added
        stated = self.settings.texts.get("bos_token")
        if stated is not None and (found := self._find(stated)) is not None:
            return found
        if self.settings.has_no_bos:
            return None
        if self.settings.bos_id is not None:
            return self.settings.bos_id
        return next((i for name in BOS_NAMES if (i := self._find(name)) is not None), None)


class SentencePieceTokenizer(FileTokenizer):
    """A SentencePiece model (`.model` file), and the tokens that the files beside it add to it.

    With a model from `train_sentencepiece`, decode(encode(text)) == text for any text.
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
        self._added = {t: a for t, a in self.settings.added.items() if self._has_row(a.id)}
        self.tokens_without_row = [t for t in self.settings.added if t not in self._added]
        added = {t: a for t, a in self._added.items() if a.id >= self._num_pieces}
        special = {t: a.id for t, a in self._added.items() if a.is_special}
        self.special_tokens = {**control, **special}
        self._added_texts = {a.id: "" if a.is_special else t for t, a in added.items()}
        self.vocab_size = max([self._num_pieces, *(i + 1 for i in self._added_texts)])
        bos = self._model.bos_id()
        self.bos = self._find_bos(bos if bos >= 0 else None)
        # SentencePiece writes a space as U+2581 and so turns a U+2581 of the text into a space.
        # Where the model has byte pieces that one character is spelled in bytes; not where the
        # model puts a space before the text, as every part of a divided text would get one.
        spelled = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        prefixed = self._model.encode("x", out_type=str)[0].startswith(_SPACE_MARK)
        can_spell = all(self._model.is_byte(i) for i in spelled) and not prefixed
        self._spelled_mark: list[int] = spelled if can_spell else []

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the ids of the pieces of `text`."""
        text.encode()  # an unpaired surrogate is a ValueError here, in the library anything
        if parse_special:
            return list(self._parse(text))
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
        """Yield the ids of a text between special tokens and of these."""
        names = {**{t: a.id for t, a in self._added.items()}, **self.special_tokens}
        pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        parts = re.split(f"({pattern})", text) if names else [text]
        for index, part in enumerate(parts):
            if index % 2:
                yield names[part]
            elif part:
                # Models of the first days put a space before every part, later ones before the
                # first of the text alone.
                is_first = index == 0 or self.settings.is_legacy
                yield from self.encode(part) if is_first else self._encode_inner(part)

    def _encode_inner(self, text: str) -> list[int]:
        """Return the ids of a text without the space that the model puts before a text.

        Something before it takes that space and is cut off again. It must not be a part of a longer
        piece, as a newline before another one is with some models.
        """
        for before in _BEFORE:
            start, ids = self._model.encode(before), list(self._model.encode(before + text))
            if ids[: len(start)] == start:
                return ids[len(start) :]
        return list(self._model.encode(text))

    def _load(self) -> Any:
        import sentencepiece

        model: Any = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(self._content)
        except RuntimeError as error:
            raise DataError(f"{self.path}: not a SentencePiece model") from error
        return model

    @property
    def _own_eos(self) -> int | None:
        return eos if (eos := self._model.eos_id()) >= 0 else None

    def _find(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].id
        found: int = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None


class HuggingFaceTokenizer(FileTokenizer):
    """A `tokenizer.json` of the tokenizers library."""

    kind = "huggingface"

    def __init__(self, path: Path, eos_token: str | None = None) -> None:
        super().__init__(path, eos_token)
        self._model = self._load()
        decoder = self._model.get_added_tokens_decoder()
        self.tokens_without_row = [t.content for i, t in decoder.items() if not self._has_row(i)]
        if self.tokens_without_row:
            self._model = self._load()
        self._model.encode_special_tokens = True  # as text, letter by letter
        self._is_byte_pair = type(self._model.model).__name__ == "BPE"
        self._vocabulary: dict[str, int] = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        added = self._model.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in added.items() if t.special}
        # A post-processor may put tokens before a text, and others behind it.
        first = self._model.encode("x", add_special_tokens=True).ids[:1]
        self.adds_bos = first != self._model.encode("x", add_special_tokens=False).ids[:1]
        self.bos = self._find_bos(first[0] if self.adds_bos else None)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the ids of `text`, without the special tokens of a post-processor."""
        text.encode()  # an unpaired surrogate is a ValueError here, in the library anything
        model = self._parsing if parse_special else self._model
        encode = partial(model.encode, add_special_tokens=False)
        if len(text) <= PIECE:
            return list(encode(text).ids)
        return encode_long_text(encode, text, splits_words=self._is_byte_pair, size=PIECE)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        check_range(ids, self.vocab_size, self.name)
        return str(self._model.decode([int(i) for i in ids], skip_special_tokens=True))

    @cached_property
    def _parsing(self) -> Any:
        """The model that parses special tokens: a second one, so that threads can share both."""
        return self._load()

    def _load(self) -> Any:
        import tokenizers

        try:
            model = tokenizers.Tokenizer.from_str(self._content.decode())
            if self.tokens_without_row:
                model = tokenizers.Tokenizer.from_str(self._content_with_rows())
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"{self.path}: not a tokenizer.json of the tokenizers library: {error}"
            ) from error
        # A file may ask to cut or pad its texts to the length that some model was trained with.
        model.no_truncation()
        model.no_padding()
        # What tokenizer_config.json calls special is special, as in transformers.
        stated = [*self.settings.texts.values()]
        stated += [text for text, token in self.settings.added.items() if token.is_special]
        added = {token.content: token for token in model.get_added_tokens_decoder().values()}
        for text in stated:
            token = added.get(text, text if model.token_to_id(text) is not None else None)
            if token is not None and getattr(token, "special", False) is False:
                if not isinstance(token, str):
                    token.special = True
                model.add_special_tokens([token])
        return model

    def _content_with_rows(self) -> str:
        """Return the file's content without `tokens_without_row`: the library cannot remove one."""
        content = json.loads(self._content)
        content["added_tokens"] = [t for t in content["added_tokens"] if self._has_row(t["id"])]
        return json.dumps(content, ensure_ascii=False)

    def _find(self, token: str) -> int | None:
        return self._vocabulary.get(token)


def check_range(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Raise DataError if an id is not one of the tokenizer's."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise DataError(f"token id {i} is not one of the {vocab_size} ids of tokenizer {name}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer {path}: cannot be read ({error.strerror}); give 'bytes', or the path of a "
            "SentencePiece .model or a tokenizer.json"
        ) from error
