"""Render a model's chat template in a sandbox, with the same environment as transformers."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ee_llm.data.tokenization.token_settings import is_encodable
from ee_llm.data.tokenization.tokenizer import Tokenizer
from ee_llm.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Template

Message = dict[str, Any]

_MAX_TEMPLATE = 2**20  # bytes: more than twenty times the longest known template
_MARK = "<|end of the last message|> "  # finds the place at which the model continues it
_MAX_TEXT = 16 * 2**20  # characters: far more than fit into any model's context


class ChatTemplate:
    """A compiled chat template that renders conversations.

    A template is a program by the author of the model. It runs in jinja2's sandbox, in which it
    cannot access files or change state, but it can use time and memory.

    Args:
        source: The template.
        where: The origin of the template, for error messages.
        variables: Variables of the template besides the messages, such as `bos_token`.

    Attributes:
        source: The template.
        variables: Its variables besides the messages.

    Raises:
        DataError: The template cannot be compiled.
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, str] | None = None) -> None:
        import jinja2

        self.source = source
        self._where = where
        self.variables = dict(variables or {})
        if len(source) > _MAX_TEMPLATE:
            raise DataError(
                f"{where}: the chat template is larger than {_MAX_TEMPLATE // 2**20} MiB. Give a "
                "smaller one as chat_template."
            )
        try:
            self._template = _compile(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise DataError(
                f"{where}: the chat template is not valid: {error}. Give another one as "
                "chat_template."
            ) from None

    def render(self, messages: Sequence[Message], *, continues_last: bool = False) -> str:
        """Return the prompt for a conversation, up to the beginning of the model's answer.

        Args:
            messages: The messages, each with a "role" and a "content".
            continues_last: The last message is the beginning of the answer. The prompt ends with
                its content.

        Raises:
            DataError: The template rejects the messages or fails.
        """
        if continues_last:
            last = {**messages[-1], "content": messages[-1]["content"] + _MARK}
            text = self._render([*messages[:-1], last], add_generation_prompt=False)
            start, mark, _ = text.rpartition(_MARK.strip())
            if not mark:
                raise DataError(
                    f"{self._where}: the chat template omits the last message, so the model cannot "
                    "continue it. Give another chat_template."
                )
            # A template that strips messages removes the space at the end of the mark.
            return start if text.startswith(_MARK, len(start)) else start.rstrip()
        return self._render(messages, add_generation_prompt=True)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        parts, length = [], 0
        try:
            for part in self._template.generate(
                messages=[_without_nulls(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            ):
                parts.append(part)
                length += len(part)
                if length > _MAX_TEXT:
                    break
        except Exception as error:  # A template is a program and can raise anything.
            raise DataError(
                f"{self._where}: the chat template rejects this conversation: "
                f"{str(error).rstrip('.') or type(error).__name__}. Change the messages, or give "
                "another chat_template."
            ) from None
        if length > _MAX_TEXT:
            raise DataError(
                f"{self._where}: the chat template renders this conversation to more than "
                f"{_MAX_TEXT // 2**20} million characters. Shorten the conversation."
            )
        text = "".join(parts)
        if not is_encodable(text):
            raise DataError(
                f"{self._where}: the chat template renders an unpaired surrogate. Give another "
                "chat_template."
            )
        return text


def load_chat_template(tokenizer: Tokenizer, path: Path | None = None) -> ChatTemplate:
    """Return the chat template in the file `path`, else the one next to the tokenizer.

    Raises:
        DataError: There is no template, or it is not valid.
    """
    if path is not None:
        where = f"chat_template {path}"
        try:
            with path.open("rb") as file:
                source = file.read(_MAX_TEMPLATE + 1).decode()
        except OSError as error:
            raise DataError(f"{where} cannot be read: {error.strerror or error}.") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 at byte {error.start}.") from None
        return ChatTemplate(source, where, _variables(tokenizer))
    template = tokenizer.settings.chat_template
    where = str(tokenizer.settings.template_path)
    if template is None:
        raise DataError(
            f"the model has no chat template: tokenizer {tokenizer.name} has neither a "
            "chat_template.jinja nor a chat_template in tokenizer_config.json. Give one as "
            "chat_template, or write the prompt yourself and set parse_special."
        )
    if not isinstance(template, str):
        if "default" not in template:
            raise DataError(
                f"{where}: none of the chat templates {', '.join(sorted(template))} is named "
                "'default'. Give one as chat_template."
            )
        template = template["default"]
    return ChatTemplate(template, where, _variables(tokenizer))


def _variables(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of the known special tokens by role."""
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    ids = {
        "bos_token": tokenizer.bos_token_id,
        "eos_token": next(iter(tokenizer.eos_token_ids), None),
    }
    known = {role: texts[i] for role, i in ids.items() if i in texts}
    return {**known, **tokenizer.settings.texts}


def _without_nulls(message: Message) -> Message:
    """Return a message without null values, which templates would render as "None"."""
    return {key: value for key, value in message.items() if value is not None}


def _compile(source: str) -> "Template":
    """Compile a template in the same environment as transformers."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag {% generation %}, which marks the model's output and has no effect here."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 reads the class attribute)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON, without the HTML escapes of jinja2's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
