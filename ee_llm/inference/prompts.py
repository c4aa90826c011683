"""Where prompts come from: an option, a file, standard input, or a batch file of JSON objects."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ee_llm.data.tokenizer import Tokenizer
from ee_llm.inference.json_lines import MIB, decode, opened, read_objects, short
from ee_llm.inference.options import Bos, GenerateOptions
from ee_llm.inference.policy import Measure
from ee_llm.inference.request import STRATEGIES

# Far more than any model has positions for.
_MAX_PROMPT = 16 * MIB
# All of a batch's prompts are in memory: ten times as much, as token ids.
_MAX_BATCH = 256 * MIB


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and how. id: its name in a batch. where: to name it in errors."""

    text: str
    options: GenerateOptions
    id: str = "prompt"
    where: str = ""


@dataclass(frozen=True)
class InvalidLine:
    """A line of a batch file that has an id and cannot be served. error: why, naming the line."""

    id: str
    where: str
    error: str


def read_prompts(options: GenerateOptions) -> list[Prompt | InvalidLine]:
    """Return the prompts that the options name, and for a batch its invalid lines, in order.

    Raises ValueError if there is no prompt, if a line of a batch is not a JSON object, or if its
    id cannot name a record: it is no text, or another line's.
    """
    if options.batch_file is not None:
        return _read_batch(options, options.batch_file)
    return [_read_prompt(options)]


def first_tokens(bos: Bos, tokenizer: Tokenizer, stated: bool | None) -> list[int]:
    """Return what a prompt's tokens begin with: the beginning-of-sequence token, or nothing.

    stated: whether the settings of the tokenizer ask for it, None if they do not say; then "auto"
    does as the tokenizer's file does. Raises ValueError if it is asked for and there is none.
    """
    adds = tokenizer.adds_bos if stated is None else stated
    if bos == "off" or (bos == "auto" and not adds):
        return []
    if tokenizer.bos is None:
        asked = "--bos on" if bos == "on" else "the tokenizer's settings (add_bos_token)"
        raise ValueError(
            f"{asked}: tokenizer {tokenizer.name} has no beginning-of-sequence token; give "
            "--bos off"
        )
    return [tokenizer.bos]


def _read_prompt(options: GenerateOptions) -> Prompt:
    if options.prompt is not None:
        source, data = "--prompt", options.prompt.encode(errors="surrogateescape")
    else:
        path = options.prompt_file or Path("-")
        is_standard = str(path) == "-"
        if options.prompt_file is None and sys.stdin.isatty():
            raise ValueError("no prompt; give --prompt TEXT, --prompt-file FILE or standard input")
        source = "standard input" if is_standard else f"--prompt-file {path}"
        with opened(path, source) as file:
            data = file.read(_MAX_PROMPT + 1)
    if len(data) > _MAX_PROMPT:
        raise ValueError(f"{source} is larger than {_MAX_PROMPT // MIB} MiB, too long for a prompt")
    text = decode(data, source)
    if not text:
        raise ValueError(f"{source} is empty; the prompt needs at least one character")
    return Prompt(text, options, where=source)


def _read_batch(options: GenerateOptions, path: Path) -> list[Prompt | InvalidLine]:
    source = f"--batch-file {path}"
    lines: dict[str, Prompt | InvalidLine] = {}
    with opened(path, source) as file:
        for where, record in read_objects(file, source, _MAX_BATCH):
            id = _id(record, where, default=str(len(lines) + 1))
            if id in lines:
                raise ValueError(
                    f"{where}: id {short(id)} is that of {lines[id].where} too; give each line an"
                    " id of its own"
                )
            try:
                lines[id] = _from_line(options, record, where, id)
            except ValueError as error:
                lines[id] = InvalidLine(id, where, str(error))
    if not lines:
        raise ValueError(f"{source} is empty; give one JSON object per line")
    return list(lines.values())


def _id(record: dict[str, Any], where: str, default: str) -> str:
    id = record.pop("id", default)
    if type(id) not in (str, int) or not _is_encodable(str(id)):
        raise ValueError(f'{where}: "id" is {short(id)}; it must be a text or a whole number')
    return str(id)


def _from_line(options: GenerateOptions, record: dict[str, Any], where: str, id: str) -> Prompt:
    text = record.pop("prompt", None)
    own = {}
    for name, value in record.items():
        if name not in _OWN:
            names = ", ".join(["prompt", "id", *sorted(_OWN)])
            raise ValueError(f"{where}: {short(name)} is unknown; choose from {names}")
        try:
            own[name] = _OWN[name](value)
        except (TypeError, OverflowError):
            raise ValueError(
                f"{where}: {name!r} can not be {short(value)}; 'ee-llm generate --help' explains it"
            ) from None
    if not isinstance(text, str) or not text or not _is_encodable(text):
        raise ValueError(f'{where}: "prompt" is {short(text)}; it must be a text, and not empty')
    return Prompt(text, replace(options, **own), id, where)


def _is_encodable(text: str) -> bool:
    """Return whether a text is UTF-8: JSON can spell half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _whole(value: Any) -> int:
    if type(value) is not int:  # which a truth value would be an instance of
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
    "temperature": _number,
    "top_k": _whole,
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "seed": _whole,
}
