"""Documents from files: JSON lines, plain text files, and folders of both.

A document travels as raw bytes with the place it came from, so that decoding, and its errors, can
happen in whichever process encodes it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

Format = Literal["auto", "jsonl", "text"]

JSONL_SUFFIXES = (".jsonl", ".ndjson")
DEFAULT_EXCLUDE = (".git", ".hg", ".svn", ".venv", "__pycache__", "node_modules")


class Source(NamedTuple):
    """One input file: where it is, how it is read, and its size in bytes."""

    path: Path
    is_jsonl: bool
    num_bytes: int


class RawDocument(NamedTuple):
    """The bytes of one document; `line` counts from 1 in a JSONL file and is 0 for a text file."""

    path: Path
    line: int
    data: bytes


def find_sources(
    inputs: Sequence[Path],
    suffixes: Sequence[str] = (),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    file_format: Format = "auto",
) -> list[Source]:
    """Return the files behind `inputs`, in their order; those of a folder sorted by path.

    `suffixes` and `exclude` (names of folders that are not entered) apply to folders only, which
    are searched to any depth without following links to folders; empty files in them are no
    documents. Raises ValueError for an input that does not exist or is empty, and for a folder
    without a file that fits.
    """
    if not inputs:
        raise ValueError("no inputs; give the path of a JSONL file, text file or folder")
    sources = []
    for path in inputs:
        if path.is_dir():
            found = [_source(file, file_format) for file in _walk(path, suffixes, set(exclude))]
            found = [source for source in found if source.num_bytes > 0]
            if not found:
                wanted = f" that ends with {' or '.join(suffixes)}" if suffixes else ""
                raise ValueError(f"input {path}: no file{wanted} with any content in this folder")
            sources += found
        elif path.is_file():
            source = _source(path, file_format)
            if source.num_bytes == 0:
                raise ValueError(f"input {path}: the file is empty")
            sources.append(source)
        elif path.exists():
            raise ValueError(f"input {path}: neither a file nor a folder")
        else:
            raise ValueError(f"input {path}: no such file or folder")
    return sources


def raw_documents(sources: Sequence[Source]) -> Iterator[RawDocument]:
    """Yield the documents of `sources` in order, one file or line at a time in memory.

    Blank lines of a JSONL file are no documents. Raises ValueError for a file that can not be read.
    """
    for path, is_jsonl, _ in sources:
        try:
            if not is_jsonl:
                yield RawDocument(path, 0, path.read_bytes())
                continue
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield RawDocument(path, number, line)
        except OSError as error:
            raise ValueError(f"input {path}: can not be read ({error.strerror})") from error


def decode_document(document: RawDocument, key: str = "text") -> str:
    """Return the text of a document: a whole file, or what a line of JSON has under `key`.

    Raises ValueError, naming the file and the byte or line, for text that is not UTF-8, and for a
    line that is not a JSON object with a string under `key`.
    """
    path, line, data = document
    where = f"{path}, line {line}" if line else f"{path}"
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text, byte 0x{data[error.start]:02x} at offset {error.start}"
            f"{' of the line' if line else ''}; convert the file or leave it out"
        ) from error
    if not line:
        return text
    try:
        record = json.loads(text.removeprefix("\ufeff") if line == 1 else text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(record).__name__}")
    if key not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"{where}: no key {key!r} (keys: {keys}); name the right one with key")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: the value of {key!r} is {type(value).__name__}, expected a string"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ValueError(
            f"{where}: the value of {key!r} has an unpaired surrogate at character {error.start}"
        ) from error
    return value


def _walk(folder: Path, suffixes: Sequence[str], exclude: set[str]) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder, onerror=_cannot_list):
        folders[:] = [name for name in folders if name not in exclude]
        files += [Path(parent, name) for name in names if name.endswith(tuple(suffixes) or "")]
    # By the parts of the path: independent of the file system's order and of the separator.
    return sorted((file for file in files if file.is_file()), key=lambda file: file.parts)


def _cannot_list(error: OSError) -> None:
    raise ValueError(f"input {error.filename}: can not be listed ({error.strerror})") from error


def _source(path: Path, file_format: Format) -> Source:
    is_jsonl = path.suffix in JSONL_SUFFIXES if file_format == "auto" else file_format == "jsonl"
    return Source(path, is_jsonl, path.stat().st_size)
