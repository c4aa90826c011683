"""Read files of one JSON object per line, with size limits, since they are untrusted."""

import codecs
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ee_llm.errors import RequestError

MIB = 2**20
# The size of a generation of half a million tokens.
MAX_LINE = 32 * MIB


@contextmanager
def opened(path: Path, source: str) -> Iterator[BinaryIO]:
    """Open a file to read bytes from; "-" is standard input. Raises RequestError."""
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = path.open("rb")
    except OSError as error:
        raise RequestError(f"{source} cannot be read: {error.strerror or error}.") from error
    with file:
        yield file


def read_lines(file: BinaryIO, source: str, max_size: float = float("inf")) -> Iterator[bytes]:
    """Yield each line; raises RequestError if a line or the file has too many bytes."""
    number = size = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        size += len(line)
        if len(line) > MAX_LINE:
            raise RequestError(f"{source}, line {number} is longer than {MAX_LINE // MIB} MiB.")
        if size > max_size:
            raise RequestError(f"{source} is larger than {max_size / MIB:g} MiB. Split it.")
        yield line


def read_objects(
    file: BinaryIO, source: str, max_size: float = float("inf")
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the location of each line, for errors, and its JSON object; raises RequestError.

    Blank lines are skipped.
    """
    for number, line in enumerate(read_lines(file, source, max_size), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # Editors on Windows write one.
        where = f"{source}, line {number}"
        if line.strip():
            yield where, parse_object(line, where)


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """Return the JSON object on a line; raises RequestError with the line's location `where`."""
    found = parse(line, where)
    if not isinstance(found, dict):
        raise RequestError(f"{where} is {short(found)}. Give a JSON object.")
    return found


def parse(data: bytes, where: str) -> Any:
    """Return the value of JSON text; raises RequestError with its location `where`."""
    try:
        return json.loads(decode(data, where), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise RequestError(f"{where} is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"{where} is not valid JSON: {error}.") from None
    except _DuplicateKeyError as error:
        raise RequestError(f"{where} has the key {short(error.args[0])} twice.") from None
    except ValueError as error:  # A number has thousands of digits.
        raise RequestError(f"{where}: {error}.") from None


def decode(data: bytes, where: str) -> str:
    """Return the text of UTF-8 bytes; raises RequestError if they are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{where} is not UTF-8 at byte {error.start}. Convert it to UTF-8."
        ) from error


def short(value: Any) -> str:
    """Return the repr of a value for an error, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


class _DuplicateKeyError(Exception):
    """An object has a key twice; the first argument is the key."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(key)
        found[key] = value
    return found
