"""The prompt of a JSON object: a text, a conversation or token ids."""

from typing import Any

from ee_llm.data.tokenization.token_settings import is_encodable
from ee_llm.errors import RequestError
from ee_llm.inference.text.chat import check_messages
from ee_llm.inference.text.json_lines import short

KINDS = ("prompt", "messages", "prompt_token_ids")
"""The keys of which an object has exactly one."""


def prompt_content(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the prompt of a JSON object as `text`, `messages` or `token_ids`.

    Raises:
        RequestError: The object has not exactly one of "prompt", "messages" and "prompt_token_ids",
            or its value is not valid.
    """
    kinds = [name for name in KINDS if name in record]
    if len(kinds) != 1:
        found = f"has {' and '.join(kinds)}" if kinds else "has no prompt"
        raise RequestError(f"{where}: the line {found}. Give one of {', '.join(KINDS)}.")
    (kind,) = kinds
    value = record[kind]
    if kind == "messages":
        return {"messages": check_messages(value, where)}
    if kind == "prompt_token_ids":
        is_valid = isinstance(value, list) and all(type(token) is int for token in value)
        if not is_valid or not value:
            raise RequestError(
                f'{where}: "prompt_token_ids" is {short(value)}. Give a list of token ids.'
            )
        return {"token_ids": tuple(value)}
    if not isinstance(value, str) or not value or not is_encodable(value):
        raise RequestError(f'{where}: "prompt" is {short(value)}. Give a nonempty string.')
    return {"text": value}
