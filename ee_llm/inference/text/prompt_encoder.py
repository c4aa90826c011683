"""Encode prompts of every kind: texts, conversations and token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

from ee_llm.data.tokenization.chat_template import ChatTemplate, Message, load_chat_template
from ee_llm.data.tokenization.tokenizer import Tokenizer
from ee_llm.errors import DataError, RequestError
from ee_llm.inference.choices import Bos
from ee_llm.inference.text.chat import with_system


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt, and its text as the model sees it."""

    text: str
    token_ids: tuple[int, ...]


class PromptEncoder:
    """Encodes prompts with a model's tokenizer and chat template.

    In all methods, `bos` says whether the token ids begin with the beginning-of-sequence token:
    "auto" follows the tokenizer's settings, "on" and "off" override them. The methods raise
    RequestError if that token, or the chat template, does not exist.
    """

    def __init__(
        self, tokenizer: Tokenizer, adds_bos: bool | None, chat_template: Path | None = None
    ) -> None:
        """Use a tokenizer.

        Args:
            tokenizer: The tokenizer.
            adds_bos: Whether its settings ask for a beginning-of-sequence token; None if they do
                not say, then the tokenizer's own file decides.
            chat_template: File with the chat template; None for the model's own.
        """
        self._tokenizer = tokenizer
        self._adds_bos = adds_bos
        self._path = chat_template

    def encode_text(
        self, text: str, *, bos: Bos = "auto", parse_special: bool = False
    ) -> EncodedPrompt:
        """Encode a text; parse_special: read special tokens that it spells out as these tokens."""
        ids = self._tokenizer.encode(text, parse_special)
        return self._with_bos(text, ids, bos, is_parsed=parse_special)

    def encode_ids(self, token_ids: Sequence[int], *, bos: Bos = "auto") -> EncodedPrompt:
        """Return given token ids; "auto" adds no beginning-of-sequence token."""
        known = [i for i in token_ids if 0 <= i < self._tokenizer.vocab_size]
        text = self._tokenizer.decode(known)
        return self._with_bos(text, list(token_ids), _explicit(bos), is_parsed=True)

    def encode_chat(
        self, messages: Sequence[Message], *, system: str | None = None, bos: Bos = "auto"
    ) -> EncodedPrompt:
        """Encode a conversation, ready for the assistant's answer.

        Args:
            messages: The conversation in OpenAI's format.
            system: System message, used if the conversation does not begin with one.
            bos: "auto" leaves the beginning-of-sequence token to the template.
        """
        text = self._template.render(with_system(messages, system))
        ids = self._tokenizer.encode(text, parse_special=True)
        return self._with_bos(text, ids, _explicit(bos), is_parsed=True)

    def encode_start(self, *, bos: Bos = "auto") -> EncodedPrompt:
        """Return the prompt after which a model begins a document of its own.

        It is the beginning-of-sequence token or, without it, the end-of-document token, which
        precedes a document in training data. Raises DataError if the latter is unknown.
        """
        first = first_tokens(bos, self._tokenizer, self._adds_bos)
        return EncodedPrompt("", tuple(first or [self._tokenizer.eos_token_id]))

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be encoded."""
        try:
            return bool(self._template)
        except DataError:
            return False

    def special_texts(self, stops: Sequence[str]) -> tuple[tuple[int, str], ...]:
        """Return the ids and texts of the special tokens that occur in stop strings."""
        known = self._tokenizer.special_tokens.items()
        return tuple((i, text) for text, i in known if any(text in stop for stop in stops))

    @cached_property
    def _template(self) -> ChatTemplate:
        return load_chat_template(self._tokenizer, self._path)

    def _with_bos(self, text: str, ids: list[int], bos: Bos, is_parsed: bool) -> EncodedPrompt:
        """Return the prompt with its first token, unless the text spelled it out."""
        first = first_tokens(bos, self._tokenizer, self._adds_bos)
        if not is_parsed or ids[:1] != first:
            ids = [*first, *ids]
        return EncodedPrompt(text, tuple(ids))


def first_tokens(bos: Bos, tokenizer: Tokenizer, adds_bos: bool | None) -> list[int]:
    """Return the tokens that a prompt begins with: the beginning-of-sequence token, or none.

    Raises RequestError if the token is wanted and the tokenizer has none.
    """
    if bos not in get_args(Bos):
        raise RequestError(f"bos = {bos!r} is unknown. Use one of {', '.join(get_args(Bos))}.")
    adds = tokenizer.adds_bos if adds_bos is None else adds_bos
    if bos == "off" or (bos == "auto" and not adds):
        return []
    if tokenizer.bos_token_id is None:
        wanted = "bos = 'on'" if bos == "on" else "the tokenizer's settings (add_bos_token)"
        raise RequestError(
            f"{wanted}: tokenizer {tokenizer.name} has no beginning-of-sequence token. Use"
            " bos = 'off'."
        )
    return [tokenizer.bos_token_id]


def _explicit(bos: Bos) -> Bos:
    return "off" if bos == "auto" else bos
