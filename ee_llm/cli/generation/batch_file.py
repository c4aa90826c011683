"""A batch's output: one JSON object per line, appended as they finish; none is made twice.

Error records come after all generations. Repeating the command cuts them off, appends what is
missing and tries what failed again.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ee_llm.errors import UserError
from ee_llm.inference.text.json_lines import parse_object, read_lines, short
from ee_llm.inference.text.records import Record, as_json, difference, from_record, is_error

_START = b'{"id": "'


@contextmanager
def open_output(
    path: Path, origins: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[BinaryIO, set[str]]]:
    """Give the file to append records to, and the ids of those that it holds.

    A line cut off by a crash is taken away, and so are error records. origins: by id, what this
    batch's generations are functions of. Raises UserError, and changes nothing, if the file can
    not be written, if another process writes to it, or if it holds anything but error records after
    generations that were made as this batch's are.
    """
    source = f"--output {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise UserError(f"{source} can not be written: {error.strerror or error}") from error
    with file:
        if not path.is_file():
            raise UserError(f"{source} is no regular file; give the path of one")
        _lock(file, source)
        file.seek(0)
        done, end = _finished(file, source, origins)
        file.truncate(end)
        yield file, done


def append(file: BinaryIO, record: Record) -> None:
    """Write a record as a line that is on the disk when this returns."""
    file.write(as_json(record).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _lock(file: BinaryIO, source: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed
    except (BlockingIOError, PermissionError):
        raise UserError(f"{source} is being written by another process; wait for it") from None
    except OSError:
        pass  # a file system without locks: two batches must not meet there


def _finished(
    file: BinaryIO, source: str, origins: Mapping[str, Mapping[str, Any]]
) -> tuple[set[str], int]:
    """Return the ids that a file holds, and where the last whole line ends."""
    done: set[str] = set()
    end = 0
    error_at = ""
    for number, line in enumerate(read_lines(file, source), start=1):
        where = f"{source}, line {number}"
        is_ended = line.endswith(b"\n")
        if not is_ended and _is_cut(line):
            break
        try:
            record = parse_object(line, where)
            if is_error(record):
                error_at = error_at or where
                continue
            if error_at:
                raise UserError(f"{where} comes after the error record of {error_at}")
            from_record(record, where)
        except ValueError as error:
            raise UserError(f"{error}; --output adds to generations alone: give another") from None
        id = record.get("id")
        if not isinstance(id, str) or id in done:
            raise UserError(f'{where}: "id" is {short(id)}: no text, or there twice')
        differs = difference(record, origins[id]) if id in origins else None
        if differs:
            raise UserError(
                f"{where}: id {short(id)} was made with another {differs!r} than it would be now;"
                " give another file"
            )
        if is_ended:  # else it is made again
            done.add(id)
            end += len(line)
    return done, end


def _is_cut(line: bytes) -> bool:
    """Return whether a line may be the beginning of a record, and is no JSON object."""
    if not line.startswith(_START[: len(line)]):
        return False
    try:
        parse_object(line, "")
    except ValueError:
        return True
    return False
