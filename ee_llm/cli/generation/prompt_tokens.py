"""Turn prompts of every kind into token ids: texts, conversations and ids."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ee_llm.cli.generation.options import Bos
from ee_llm.cli.generation.prompts import Prompt
from ee_llm.data.tokenization.chat_template import ChatTemplate, load_chat_template
from ee_llm.data.tokenization.tokenizer import Tokenizer
from ee_llm.errors import RequestError
from ee_llm.inference.text.chat import with_system


class PromptEncoder:
    """What a model's tokenizer and chat template make of prompts."""

    def __init__(
        self, tokenizer: Tokenizer, states_bos: bool | None, template: Path | None = None
    ) -> None:
        """Take the tokenizer and what its settings say of a beginning-of-sequence token.

        template: file with the chat template, if not the model's own is to be used.
        """
        self._tokenizer = tokenizer
        self._states_bos = states_bos
        self._path = template

    def encode(self, prompt: Prompt) -> Prompt:
        """Return the prompt with its token ids, and its text as the model sees it.

        Raises RequestError if the model has no chat template for a conversation, or no
        beginning-of-sequence token where one is asked for.
        """
        options, tokenizer = prompt.options, self._tokenizer
        bos: Bos = options.bos
        explicit: Bos = "off" if bos == "auto" else bos
        if prompt.messages:
            text = self._template.render(with_system(prompt.messages, options.system))
            ids = tokenizer.encode(text, parse_special=True)
            # The template writes the token itself, if the model's prompts begin with one.
            is_parsed, bos = True, explicit
        elif prompt.token_ids:
            ids = list(prompt.token_ids)
            known = [i for i in ids if 0 <= i < tokenizer.vocab_size]
            text = tokenizer.decode(known)
            is_parsed, bos = True, explicit
        else:
            text, is_parsed = prompt.text, options.parse_special
            ids = tokenizer.encode(text, is_parsed)
        first = first_tokens(bos, tokenizer, self._states_bos)
        if not is_parsed or ids[:1] != first:
            ids = [*first, *ids]
        return replace(prompt, text=text, token_ids=tuple(ids))

    def special_texts(self, stops: Sequence[str]) -> tuple[tuple[int, str], ...]:
        """Return the ids and texts of the special tokens that occur in stop strings."""
        known = self._tokenizer.special_tokens.items()
        return tuple((i, text) for text, i in known if any(text in stop for stop in stops))

    @cached_property
    def _template(self) -> ChatTemplate:
        return load_chat_template(self._tokenizer, self._path)


def first_tokens(bos: Bos, tokenizer: Tokenizer, stated: bool | None) -> list[int]:
    """Return what a prompt's tokens begin with: the beginning-of-sequence token, or nothing.

    stated: whether the settings of the tokenizer ask for it, None if they do not say; then "auto"
    does as the tokenizer's file does. Raises RequestError if it is asked for and there is none.
    """
    adds = tokenizer.adds_bos if stated is None else stated
    if bos == "off" or (bos == "auto" and not adds):
        return []
    if tokenizer.bos_token_id is None:
        asked = "--bos on" if bos == "on" else "the tokenizer's settings (add_bos_token)"
        raise RequestError(
            f"{asked}: tokenizer {tokenizer.name} has no beginning-of-sequence token; give "
            "--bos off"
        )
    return [tokenizer.bos_token_id]
