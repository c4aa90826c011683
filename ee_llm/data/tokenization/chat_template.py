"""Render a model's own chat template, in a sandbox and with the names that transformers offers."""

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

_MAX_TEMPLATE = 2**20  # bytes: more than twenty times the longest known
_MAX_TEXT = 16 * 2**20  # characters: far more than any model has positions for


class ChatTemplate:
    """A chat template, ready to render conversations.

    The template is a program from whoever made the model. It runs in jinja2's sandbox: it reaches
    no file and changes nothing, but it can take time and memory.
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, str] | None = None) -> None:
        """Compile a template; raises DataError, naming `where` it comes from, if it cannot be.

        variables: what the template may read beside the messages, such as `bos_token`.
        """
        import jinja2

        self._where = where
        self._variables = dict(variables or {})
        if len(source) > _MAX_TEMPLATE:
            raise DataError(
                f"{where}: the chat template is larger than {_MAX_TEMPLATE // 2**20} MiB. Give a"
                " smaller one with --chat-template FILE."
            )
        try:
            self._template = _compile(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise DataError(
                f"{where}: the chat template is not valid: {error}. Give another with"
                " --chat-template FILE."
            ) from None

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt for a conversation, up to where the model's answer begins.

        messages: each with a "role" and a "content". Raises DataError if the template refuses
        them or fails.
        """
        parts, length = [], 0
        try:
            for part in self._template.generate(
                messages=[_given(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
            ):
                parts.append(part)
                length += len(part)
                if length > _MAX_TEXT:
                    break
        except Exception as error:  # a template may raise anything: it is a program
            raise DataError(
                f"{self._where}: the chat template does not take this conversation:"
                f" {str(error).rstrip('.') or type(error).__name__}. Change the messages, or give"
                " another template with --chat-template FILE."
            ) from None
        if length > _MAX_TEXT:
            raise DataError(
                f"{self._where}: the chat template makes more than {_MAX_TEXT // 2**20} million"
                " characters of this conversation. Shorten it."
            )
        text = "".join(parts)
        if not is_encodable(text):
            raise DataError(
                f"{self._where}: the chat template makes text with an unpaired surrogate. Give"
                " another template with --chat-template FILE."
            )
        return text


def load_chat_template(tokenizer: Tokenizer, path: Path | None = None) -> ChatTemplate:
    """Return the chat template in the file `path`, else the one beside the tokenizer.

    Raises DataError if there is none, or if it is not a template.
    """
    if path is not None:
        where = f"--chat-template {path}"
        try:
            with path.open("rb") as file:
                source = file.read(_MAX_TEMPLATE + 1).decode()
        except OSError as error:
            raise DataError(f"{where} cannot be read: {error.strerror or error}.") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 at byte {error.start}.") from None
        return ChatTemplate(source, where, _variables(tokenizer))
    stated = tokenizer.settings.chat_template
    where = str(tokenizer.settings.template_path)
    if stated is None:
        raise DataError(
            f"the model has no chat template: neither a chat_template.jinja nor a chat_template in"
            f" tokenizer_config.json came with tokenizer {tokenizer.name}. Give one with"
            " --chat-template FILE, or write the prompt yourself: --prompt TEXT --parse-special."
        )
    if not isinstance(stated, str):
        if "default" not in stated:
            raise DataError(
                f"{where}: of the chat templates {', '.join(sorted(stated))} none is named"
                " 'default'. Give one with --chat-template FILE."
            )
        stated = stated["default"]
    return ChatTemplate(stated, where, _variables(tokenizer))


def _variables(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the special tokens by role, as far as anything states them."""
    texts = {i: text for text, i in tokenizer.special_tokens.items()}
    known = {"bos_token": tokenizer.bos, "eos_token": next(iter(tokenizer.eos_token_ids), None)}
    found = {role: texts[i] for role, i in known.items() if i in texts}
    return {**found, **tokenizer.settings.texts}


def _given(message: Message) -> Message:
    """Return a message without keys that are null, which templates take for the text "None"."""
    return {key: value for key, value in message.items() if value is not None}


def _compile(source: str) -> "Template":
    """Return a template of the environment that transformers compiles chat templates in."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag {% generation %}, which marks the model's own words; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 reads it from the class)

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
    """Return a value as JSON, without the escapes for HTML of jinja2's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
