"""Where prompts come from: an option, a file, standard input, or a batch file of JSON objects."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from ee_llm.inference.options import GenerateOptions
from ee_llm.inference.policy import Measure
from ee_llm.inference.request import STRATEGIES

# What a line of a batch file may set for itself.
_OWN = {
    "thresholds",
    "measure",
    "strategy",
    "draft_exit",
    "draft_length",
    "draft_threshold",
    "max_new_tokens",
    "stop",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
}


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and how. id: its name in a batch. where: to name it in errors."""

    text: str
    options: GenerateOptions
    id: str = "prompt"
    where: str = ""


def read_prompt(options: GenerateOptions) -> Prompt:
    """Return the one prompt that the options name; raises ValueError if there is none."""
    given = [n for n in ("prompt", "prompt_file", "batch_file") if getattr(options, n) is not None]
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{names} are both given; leave one out")
    if options.prompt is not None:
        source, data = "--prompt", options.prompt.encode(errors="surrogateescape")
    elif options.prompt_file is not None and str(options.prompt_file) != "-":
        source = f"--prompt-file {options.prompt_file}"
        data = _read(options.prompt_file, source)
    else:
        if sys.stdin.isatty():
            raise ValueError("no prompt; give --prompt TEXT, --prompt-file FILE or standard input")
        source, data = "standard input", sys.stdin.buffer.read()
    text = _decode(data, source)
    if not text:
        raise ValueError(f"{source} is empty; the prompt needs at least one character")
    return Prompt(text, options, where=source)


def read_batch(options: GenerateOptions) -> list[Prompt]:
    """Return the prompts of the batch file; raises ValueError, naming the line, for a bad one."""
    assert options.batch_file is not None, "there is no batch file"
    source = f"--batch-file {options.batch_file}"
    prompts: dict[str, Prompt] = {}
    for where, record in read_json_lines(options.batch_file, source):
        prompt = _from_line(options, record, where, default_id=str(len(prompts) + 1))
        if prompt.id in prompts:
            raise ValueError(f"{where}: id {prompt.id!r} is that of {prompts[prompt.id].where} too")
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"{source} is empty; give one JSON object per line")
    return list(prompts.values())


def read_json_lines(path: Path, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line's place, for errors, and the JSON object on it; raises ValueError."""
    lines = _decode(_read(path, source), source).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where} is no JSON object, but {line.strip()[:40]}")
        yield where, record


def _from_line(
    options: GenerateOptions, record: dict[str, Any], where: str, default_id: str
) -> Prompt:
    text = record.get("prompt")
    if not isinstance(text, str) or not text:
        raise ValueError(f'{where}: "prompt" is {text!r}; it must be a text, and not empty')
    id = record.get("id", default_id)
    if not isinstance(id, str | int):
        raise ValueError(f'{where}: "id" is {id!r}; it must be a text or a number')
    own = {name: value for name, value in record.items() if name not in ("prompt", "id")}
    unknown = [name for name in own if name not in _OWN]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is unknown; choose of {', '.join(sorted(_OWN))}")
    for name, value in own.items():
        own[name] = _checked(name, value, where)
    return Prompt(text, replace(options, **own), str(id), where)


def _checked(name: str, value: Any, where: str) -> Any:
    """Return an option's value as its dataclass has it; raises ValueError for a wrong type."""
    if name == "thresholds":
        values = value if isinstance(value, list) else [value]
        if all(one == "off" or _is_number(one) for one in values):
            return tuple(values)
    elif name == "stop":
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and all(isinstance(one, str) for one in values):
            return tuple(values)
    elif name in ("measure", "strategy"):
        if value in (get_args(Measure) if name == "measure" else STRATEGIES):
            return value
    else:
        annotation = next(str(one.type) for one in fields(GenerateOptions) if one.name == name)
        is_whole = "int" in annotation
        if (value is None and "None" in annotation) or (_is_number(value, is_whole)):
            return value
    raise ValueError(
        f"{where}: {name!r} can not be {value!r}; 'ee-llm generate --help' explains it"
    )


def _is_number(value: Any, is_whole: bool = False) -> bool:
    return type(value) is int or (type(value) is float and not is_whole)


def _read(path: Path, source: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{source} can not be read: {error.strerror}") from error


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is not UTF-8 at byte {error.start}; convert it first"
        ) from error
