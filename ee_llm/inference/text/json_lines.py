"""Files of one JSON object per line, with limits on what comes from outside."""

import codecs
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ee_llm.errors import RequestError

MIB = 2**20
# A generation of half a million tokens takes as much.
MAX_LINE = 32 * MIB


@contextmanager
def opened(path: Path, source: str) -> Iterator[BinaryIO]:
    """Give a file to read bytes from, '-' being standard input; raises RequestError."""
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise RequestError(f"{source} can not be read: {error.strerror or error}") from error
    with file:
        yield file


def read_lines(file: BinaryIO, source: str, max_size: float = float("inf")) -> Iterator[bytes]:
    """Yield each line; raises RequestError if one, or all read together, has too many bytes."""
    number = size = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        size += len(line)
        if len(line) > MAX_LINE:
            raise RequestError(f"{source}, line {number} is longer than {MAX_LINE // MIB} MiB")
        if size > max_size:
            raise RequestError(f"{source} is larger than {max_size / MIB:g} MiB; split it")
        yield line


def read_objects(
    file: BinaryIO, source: str, max_size: float = float("inf")
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line's place, for errors, and the JSON object on it; raises RequestError."""
    for number, line in enumerate(read_lines(file, source, max_size), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # editors on Windows write it
        where = f"{source}, line {number}"
        if line.strip():
            yield where, parse_object(line, where)


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object on a line; raises RequestError, naming its place, if it is none."""
    found = parse(line, where)
    if not isinstance(found, dict):
        raise RequestError(f"{where} is no JSON object, but {short(found)}")
    return found


def parse(data: bytes, where: str) -> Any:
    """Return what JSON text states; raises RequestError, naming its place, if it is not JSON."""
    try:
        return json.loads(decode(data, where), object_pairs_hook=_without_repetition)
    except RecursionError:
        raise RequestError(f"{where} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"{where} is no JSON: {error}") from None
    except _RepetitionError as error:
        raise RequestError(f"{where} has {short(error.args[0])} twice") from None
    except ValueError as error:  # a number of thousands of digits
        raise RequestError(f"{where}: {error}") from None


def decode(data: bytes, where: str) -> str:
    """Return the text of UTF-8 bytes; raises RequestError where they are none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{where} is not UTF-8 at byte {error.start}; convert it first"
        ) from error


def short(value: Any) -> str:
    """Return the beginning of a value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


class _RepetitionError(Exception):
    """An object has a key twice; it is the first argument."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepetitionError(key)
        found[key] = value
    return found
