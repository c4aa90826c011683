"""Texts as lm_eval's Hugging Face adapter encodes and decodes them, and conversations."""

import contextlib
import hashlib
import json
import logging
from functools import cached_property
from pathlib import Path

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tokenizer import stated_bos
from ee_llm.data.tokenization.chat_template import ChatTemplate, load_chat_template
from ee_llm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from ee_llm.errors import DataError
from ee_llm.inference.text.prompt_encoder import first_tokens

logger = logging.getLogger(__name__)


class HarnessText:
    """The tokenizer and the chat template of a checkpoint.

    Attributes:
        tokenizer: The tokenizer.
    """

    def __init__(
        self,
        reader: TensorReader,
        eos_token: str | None,
        add_bos_token: bool | None,
        chat_template: str | Path | None,
    ) -> None:
        """Load the tokenizer.

        Args:
            reader: The checkpoint.
            eos_token: Text of the end-of-document token; None for that of the tokenizer's files.
            add_bos_token: Whether texts start with the beginning-of-sequence token; None follows
                the tokenizer's settings.
            chat_template: File with a chat template; None for the model's own.

        Raises:
            UserError: The tokenizer or the file cannot be read, or the tokenizer has no
                beginning-of-sequence token.
        """
        self.tokenizer: Tokenizer = load_tokenizer(reader.tokenizer(), eos_token)
        adds_bos = stated_bos(reader.path) if add_bos_token is None else add_bos_token
        self._first = first_tokens("auto", self.tokenizer, adds_bos)
        self._path = None if chat_template is None else Path(chat_template)
        if self._path is not None:
            _ = self.template  # Find mistakes in the file early.

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of all that prompts depend on besides the task.

        These are the tokenizer, and the chat template with its variables if there is one.
        """
        parts: list[object] = [self.tokenizer.fingerprint]
        with contextlib.suppress(DataError):
            parts += [self.template.source, self.template.variables]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template; raises DataError if there is none."""
        return load_chat_template(self.tokenizer, self._path)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return the token ids of a text, in which special tokens are read as these tokens.

        Args:
            text: The text.
            add_special_tokens: Begin with the beginning-of-sequence token if the settings ask for
                it. None does so unless the text spells that token out.
        """
        ids = self.tokenizer.encode(text, parse_special=True)
        prefix = self.text_of(self.prefix_token_id)
        has_prefix = prefix is not None and text.startswith(prefix)
        if add_special_tokens is False or (add_special_tokens is None and has_prefix):
            return ids
        return [*self._first, *ids]

    def text_of(self, token: int) -> str | None:
        """Return the text of a special token; None if the tokenizer does not define it."""
        return {i: text for text, i in self.tokenizer.special_tokens.items()}.get(token)

    def render(self, messages: list[dict[str, str]], continues_last: bool) -> str:
        """Return the prompt for a conversation.

        As in the Hugging Face adapter, system messages are left out if the template rejects them.

        Args:
            messages: Messages with a "role" and a "content".
            continues_last: The model continues the last message instead of answering it.
        """
        try:
            return self.template.render(messages, continues_last=continues_last)
        except DataError:
            others = [message for message in messages if message["role"] != "system"]
            if len(others) in (0, len(messages)):
                raise
            logger.warning("The chat template rejects the system message, so it is left out.")
            return self.template.render(others, continues_last=continues_last)
