"""Documents out of files, one at a time in memory.

A document travels as raw bytes with the place it came from, so that decoding, and its errors, can
happen in whichever process encodes it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ee_llm.data.documents import json_array, parquet
from ee_llm.data.documents.compression import Input
from ee_llm.data.documents.sources import Source
from ee_llm.errors import DataError

# A token is a byte or more, and an index file has 32 bits for a document's number of tokens.
MAX_DOCUMENT = 2_000_000_000  # bytes

Unit = Literal["file", "line", "record", "row"]


class RawDocument(NamedTuple):
    """The bytes of one document, and where they came from."""

    path: Path
    number: int
    """Of the unit in the file, from 1."""
    data: bytes
    """Text for a file or row, a JSON object for a line or record (of an array)."""
    unit: Unit
    num_read: int
    """Bytes of the file that were read since the previous document; adds up to its size."""


def raw_documents(sources: Sequence[Source], key: str = "text") -> Iterator[RawDocument]:
    """Yield the documents of `sources` in order; `key` is the column of Parquet files.

    Blank lines of a JSONL file are no documents. Raises DataError, naming the file, for one that
    cannot be read or is damaged, and for a document of more than `MAX_DOCUMENT` bytes.
    """
    for source in sources:
        if source.kind == "parquet":
            for number, row in enumerate(parquet.rows(source.path, key), start=1):
                yield RawDocument(source.path, number, row.data, "row", row.num_read)
            continue
        with Input(source.path, source.compression) as file:
            if source.kind == "text":
                data = file.read(MAX_DOCUMENT + 1)
                _check_size(source.path, data)
                yield RawDocument(source.path, 1, data, "file", file.num_read)
            elif source.kind == "jsonl":
                yield from _lines(file)
            else:
                yield from _records(file)


def _lines(file: Input) -> Iterator[RawDocument]:
    number = position = 0
    while line := file.readline(MAX_DOCUMENT + 1):
        number += 1
        _check_size(f"{file.path}, line {number}", line)
        if line.strip():
            before, position = position, file.num_read
            yield RawDocument(file.path, number, line, "line", position - before)


def _records(file: Input) -> Iterator[RawDocument]:
    position = 0
    for number, data in enumerate(json_array.objects(file, MAX_DOCUMENT), start=1):
        before, position = position, file.num_read
        yield RawDocument(file.path, number, data, "record", position - before)


def _check_size(where: str | Path, data: bytes) -> None:
    if len(data) > MAX_DOCUMENT:
        raise DataError(
            f"{where}: a document of more than {MAX_DOCUMENT:,} bytes; divide it, for example into "
            "lines of JSON"
        )


def decode_document(document: RawDocument, key: str = "text") -> str:
    """Return the text of a document: a whole file or cell, or what a JSON object has under `key`.

    Raises DataError, naming the file and the byte or line, for text that is not UTF-8, and for a
    line that is not a JSON object with a string under `key`.
    """
    path, number, data, unit, _ = document
    where = f"{path}" if unit == "file" else f"{path}, {unit} {number}"
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text, byte 0x{data[error.start]:02x} at offset {error.start}"
            f"{'' if unit == 'file' else f' of the {unit}'}; convert the file or leave it out"
        ) from error
    if unit in ("file", "row"):
        return text
    if number == 1:  # a byte-order mark
        text = text.removeprefix("\ufeff")
    return _text_of(text, key, where)


def _text_of(line: str, key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(
            f"{where}: no key {key!r} (keys: {keys}); name the right one with --key, or read the "
            "file as one text with --format text"
        )
    value = record[key]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: the value of {key!r} is {type(value).__name__}, expected a string"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DataError(
            f"{where}: the value of {key!r} has an unpaired surrogate at character {error.start}"
        ) from error
    return value
