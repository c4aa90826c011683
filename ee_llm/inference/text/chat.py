"""Read conversations in OpenAI's message format."""

from collections.abc import Sequence
from typing import Any

from ee_llm.data.tokenization.chat_template import Message
from ee_llm.data.tokenization.token_settings import is_encodable
from ee_llm.errors import RequestError
from ee_llm.inference.text.json_lines import parse, short


def read_conversation(data: bytes, source: str) -> tuple[Message, ...]:
    """Return the messages in a JSON file: a list of messages, or an object with the key "messages".

    Args:
        data: Content of the file.
        source: Name of the file in errors.

    Raises:
        RequestError: The content is not a conversation.
    """
    found = parse(data, source)
    if isinstance(found, dict):
        unknown = sorted(found.keys() - {"messages"})
        if unknown:
            raise RequestError(
                f'{source}: {short(unknown[0])} is unknown. Give {{"messages": [...]}} or a list.'
            )
        found = found.get("messages")
    return check_messages(found, source)


def check_messages(found: Any, where: str) -> tuple[Message, ...]:
    """Return messages whose contents are texts; raises RequestError, naming the wrong message."""
    if not isinstance(found, list) or not found:
        raise RequestError(
            f"{where}: a conversation is {short(found)}. It must be a list of messages,"
            ' [{"role": "user", "content": "Hello"}], with at least one.'
        )
    return tuple(
        _message(message, f"{where}: message {n}") for n, message in enumerate(found, start=1)
    )


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Return a conversation with `system` as its first message, unless it has a system message."""
    if system is None or messages[0]["role"] == "system":
        return tuple(messages)
    return ({"role": "system", "content": system}, *messages)


def user_message(text: str) -> tuple[Message, ...]:
    """Return the conversation of one user message."""
    return ({"role": "user", "content": text},)


def _message(found: Any, where: str) -> Message:
    if not isinstance(found, dict):
        raise RequestError(f'{where} is {short(found)}. Give {{"role": ..., "content": ...}}.')
    role = found.get("role")
    if not isinstance(role, str) or not role or not is_encodable(role):
        raise RequestError(
            f'{where}: "role" is {short(role)}. Give "system", "user" or "assistant".'
        )
    content = found.get("content")
    if (
        content is None and "content" in found and role == "assistant"
    ):  # An assistant message with tool calls has none.
        return dict(found)
    if isinstance(content, list):
        content = "\n".join(_part(part, where) for part in content)
    if not isinstance(content, str) or not is_encodable(content):
        raise RequestError(
            f'{where}: "content" is {short(content)}. Give a text, or a list of parts of type'
            ' "text".'
        )
    return {**found, "content": content}


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise RequestError(
            f'{where}: a part of "content" is {short(part)}. Only text parts are'
            ' supported: {"type": "text", "text": ...}.'
        )
    return text
