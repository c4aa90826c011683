"""Read documents from files, one at a time.

A document is passed on as raw bytes with its origin, so that the process that encodes it also
decodes it and reports errors.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ee_llm.data.documents import json_array, parquet
from ee_llm.data.documents.compression import Input
from ee_llm.data.documents.sources import Source
from ee_llm.errors import DataError

# A token has at least one byte, and index files store the tokens of a document in 32 bits.
MAX_DOCUMENT = 2_000_000_000  # bytes

Unit = Literal["file", "line", "record", "row"]


class RawDocument(NamedTuple):
    """The bytes of a document and their origin."""

    path: Path
    number: int
    """Number of the unit in the file, from 1."""
    data: bytes
    """Text of a file or row, or the JSON object of a line or array record."""
    unit: Unit
    num_read: int
    """Number of bytes of the file read since the previous document; they sum to its size."""


def raw_documents(sources: Sequence[Source], key: str = "text") -> Iterator[RawDocument]:
    """Yield the documents of `sources` in order; `key` is the column of Parquet files.

    Blank lines of a JSONL file are skipped.

    Raises:
        DataError: A file cannot be read or is damaged, or a document has more than `MAX_DOCUMENT`
            bytes. The message names the file.
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
            f"{where}: the document has more than {MAX_DOCUMENT:,} bytes. Split it, for example "
            "into lines of JSON."
        )


def decode_document(document: RawDocument, key: str = "text") -> str:
    """Return the text of a document: a file, a cell, or the value of `key` in a JSON object.

    Raises:
        DataError: The text is not UTF-8, or a line is not a JSON object with a string as the value
            of `key`. The message names the file and the byte or line.
    """
    path, number, data, unit, _ = document
    where = f"{path}" if unit == "file" else f"{path}, {unit} {number}"
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 text, byte 0x{data[error.start]:02x} at offset {error.start}"
            f"{'' if unit == 'file' else f' of the {unit}'}. Convert the file or exclude it."
        ) from error
    if unit in ("file", "row"):
        return text
    if number == 1:  # There may be a byte-order mark.
        text = text.removeprefix("\ufeff")
    return _text_of(text, key, where)


def _text_of(line: str, key: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}.") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}.")
    if key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(
            f"{where}: no key {key!r} (keys: {keys}). Choose one with --key, or read the file as "
            "plain text with --format text."
        )
    value = record[key]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: the value of {key!r} is {type(value).__name__} instead of a string."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair.
        raise DataError(
            f"{where}: the value of {key!r} has an unpaired surrogate at character {error.start}."
        ) from error
    return value
