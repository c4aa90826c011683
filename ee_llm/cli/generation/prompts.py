"""Read prompts: from an option, a file, standard input, or a batch file of JSON objects."""

import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ee_llm.cli.generation.options import Bos, GenerateOptions
from ee_llm.data.tokenization.chat_template import Message
from ee_llm.data.tokenization.token_settings import is_encodable
from ee_llm.errors import UserError
from ee_llm.inference.exits.policy import Measure
from ee_llm.inference.strategies import STRATEGIES
from ee_llm.inference.text.chat import check_messages, read_conversation, user_message
from ee_llm.inference.text.json_lines import MIB, decode, opened, read_objects, short

# Far more than any model has positions for.
_MAX_PROMPT = 16 * MIB
# All of a batch's prompts are in memory: ten times as much, as token ids.
_MAX_BATCH = 256 * MIB


@dataclass(frozen=True)
class Prompt:
    """A text, a conversation or token ids to continue, and how.

    id: its name in a batch. where: to name it in errors.
    """

    text: str
    options: GenerateOptions
    id: str = "prompt"
    where: str = ""
    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class InvalidLine:
    """A line of a batch file that has an id and cannot be served. error: why, naming the line."""

    id: str
    where: str
    error: str


def read_prompts(options: GenerateOptions) -> list[Prompt | InvalidLine]:
    """Return the prompts that the options name, and for a batch its invalid lines, in order.

    Raises UserError if there is no prompt, if a line of a batch is not a JSON object, or if its
    id cannot name a record: it is no text, or another line's.
    """
    if options.batch_file is not None:
        return _read_batch(options, options.batch_file)
    return [_read_prompt(options)]


def _read_prompt(options: GenerateOptions) -> Prompt:
    if options.prompt_ids:
        return Prompt("", options, where="--prompt-ids", token_ids=options.prompt_ids)
    chat_file = options.chat_file
    if options.chat is not None:
        path = Path(options.chat)
        # os.path's, unlike Path's, takes a message that is too long for a name.
        if path.suffix != ".json" or not os.path.isfile(path):
            text = _text(options.chat.encode(errors="surrogateescape"), "--chat")
            return Prompt("", options, where="--chat", messages=user_message(text))
        chat_file = path
    if chat_file is not None:
        source = "standard input" if str(chat_file) == "-" else f"--chat-file {chat_file}"
        with opened(chat_file, source) as file:
            data = _limited(file.read(_MAX_PROMPT + 1), source)
        return Prompt("", options, where=source, messages=read_conversation(data, source))
    if options.prompt is not None:
        source, data = "--prompt", options.prompt.encode(errors="surrogateescape")
    else:
        path = options.prompt_file or Path("-")
        is_standard = str(path) == "-"
        if options.prompt_file is None and sys.stdin.isatty():
            raise UserError(
                "no prompt; give --prompt TEXT, --chat MESSAGE, --prompt-file FILE or standard"
                " input"
            )
        source = "standard input" if is_standard else f"--prompt-file {path}"
        with opened(path, source) as file:
            data = file.read(_MAX_PROMPT + 1)
    return Prompt(_text(data, source), options, where=source)


def _text(data: bytes, source: str) -> str:
    text = decode(_limited(data, source), source)
    if not text:
        raise UserError(f"{source} is empty; the prompt needs at least one character")
    return text


def _limited(data: bytes, source: str) -> bytes:
    if len(data) > _MAX_PROMPT:
        raise UserError(f"{source} is larger than {_MAX_PROMPT // MIB} MiB, too long for a prompt")
    return data


def _read_batch(options: GenerateOptions, path: Path) -> list[Prompt | InvalidLine]:
    source = f"--batch-file {path}"
    lines: dict[str, Prompt | InvalidLine] = {}
    with opened(path, source) as file:
        for where, record in read_objects(file, source, _MAX_BATCH):
            id = _id(record, where, default=str(len(lines) + 1))
            if id in lines:
                raise UserError(
                    f"{where}: id {short(id)} is that of {lines[id].where} too; give each line an"
                    " id of its own"
                )
            try:
                lines[id] = _from_line(options, record, where, id)
            except ValueError as error:
                lines[id] = InvalidLine(id, where, str(error))
    if not lines:
        raise UserError(f"{source} is empty; give one JSON object per line")
    return list(lines.values())


def _id(record: dict[str, Any], where: str, default: str) -> str:
    id = record.pop("id", default)
    if type(id) not in (str, int) or not is_encodable(str(id)):
        raise UserError(f'{where}: "id" is {short(id)}; it must be a text or a whole number')
    return str(id)


def _from_line(options: GenerateOptions, record: dict[str, Any], where: str, id: str) -> Prompt:
    own = {}
    for name, value in record.items():
        if name in _KINDS:
            continue
        if name not in _OWN:
            known = [*_KINDS, "id", *sorted(_OWN)]
            near = difflib.get_close_matches(name, known, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            raise UserError(f"{where}: {short(name)} is unknown; {mend}")
        try:
            own[name] = _OWN[name](value)
        except (TypeError, OverflowError):
            raise UserError(
                f"{where}: {name!r} can not be {short(value)}; 'ee-llm generate --help' explains it"
            ) from None
    return _prompt_of(record, Prompt("", replace(options, **own), id, where))


def _prompt_of(record: dict[str, Any], prompt: Prompt) -> Prompt:
    """Return `prompt` with the text, the conversation or the token ids of its line."""
    where = prompt.where
    kinds = [name for name in _KINDS if name in record]
    if len(kinds) != 1:
        found = f"has {' and '.join(kinds)}" if kinds else "has no prompt"
        raise UserError(f"{where}: it {found}; give one of {', '.join(_KINDS)}")
    given = record[kinds[0]]
    if kinds == ["messages"]:
        return replace(prompt, messages=check_messages(given, where))
    if kinds == ["prompt_token_ids"]:
        if not isinstance(given, list) or not given or any(type(i) is not int for i in given):
            raise UserError(
                f'{where}: "prompt_token_ids" is {short(given)}; it must be a list of token ids'
            )
        return replace(prompt, token_ids=tuple(given))
    if not isinstance(given, str) or not given or not is_encodable(given):
        raise UserError(f'{where}: "prompt" is {short(given)}; it must be a text, and not empty')
    return replace(prompt, text=given)


def _whole(value: Any) -> int:
    if type(value) is not int:  # which a truth value would be an instance of
        raise TypeError
    return value


def _whole_numbers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(map(_whole, values))


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError
    return value


def _own_text(value: Any) -> str:
    if not isinstance(value, str) or not is_encodable(value):
        raise TypeError
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError
    return float(value)


def _thresholds(value: Any) -> tuple[Any, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(one if one == "off" else _number(one) for one in values)


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise TypeError
    return tuple(values)


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise TypeError
        return str(value)

    return check


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


# What a line of a batch file continues: one of these.
_KINDS = ("prompt", "messages", "prompt_token_ids")

# What a line of a batch file may set for itself, and how its JSON becomes the option's value.
_OWN: dict[str, Callable[[Any], Any]] = {
    "thresholds": _thresholds,
    "bos": _one_of(*get_args(Bos)),
    "measure": _one_of(*get_args(Measure)),
    "strategy": _one_of(*STRATEGIES),
    "draft_exit": _optional(_whole),
    "draft_length": _whole,
    "draft_threshold": _optional(_number),
    "max_new_tokens": _whole,
    "stop": _texts,
    "stop_token_ids": _whole_numbers,
    "ignore_eos": _truth,
    "parse_special": _truth,
    "system": _optional(_own_text),
    "temperature": _number,
    "top_k": _whole,
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "seed": _whole,
}
