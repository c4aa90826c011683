"""Write the output of a batch: one JSON object per line, appended as each prompt finishes.

Error records come after all generations. If the command is repeated, it removes the error records
and generates only the prompts that are missing or failed.
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
    """Open the file to append records to, and yield it with the ids of its records.

    Error records and a last line that a crash truncated are removed.

    Args:
        path: The file.
        origins: For each id, everything that determines this batch's generation.

    Raises:
        UserError: The file cannot be written, another process writes to it, or it contains anything
            other than generations that this batch would generate, followed by error records. The
            file is not changed in this case.
    """
    source = f"--output {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise UserError(f"{source} cannot be written: {error.strerror or error}") from error
    with file:
        if not path.is_file():
            raise UserError(f"{source} is not a regular file. Use a regular file.")
        _lock(file, source)
        file.seek(0)
        done, end = _finished(file, source, origins)
        file.truncate(end)
        yield file, done


def append(file: BinaryIO, record: Record) -> None:
    """Append a record as a line, and sync it to the disk."""
    file.write(as_json(record).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _lock(file: BinaryIO, source: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed
    except (BlockingIOError, PermissionError):
        raise UserError(
            f"{source} is being written by another process. Wait until it ends."
        ) from None
    except OSError:
        pass  # The file system has no locks, so users must not write to one file from two batches.


def _finished(
    file: BinaryIO, source: str, origins: Mapping[str, Mapping[str, Any]]
) -> tuple[set[str], int]:
    """Return the ids in a file, and the offset at which its last complete line ends."""
    done: set[str] = set()
    end = 0
    error_at = ""
    for number, line in enumerate(read_lines(file, source), start=1):
        where = f"{source}, line {number}"
        is_ended = line.endswith(b"\n")
        if not is_ended and _is_truncated(line):
            break
        try:
            record = parse_object(line, where)
            if is_error(record):
                error_at = error_at or where
                continue
            if error_at:
                raise UserError(f"{where} follows the error record of {error_at}.")
            from_record(record, where)
        except ValueError as error:
            raise UserError(
                f"{error} --output can only extend a file of generations. Give another file."
            ) from None
        id = record.get("id")
        if not isinstance(id, str) or id in done:
            raise UserError(
                f'{where}: "id" is {short(id)}, which is not a unique string. Give another file.'
            )
        differs = difference(record, origins[id]) if id in origins else None
        if differs:
            raise UserError(
                f"{where}: id {short(id)} was generated with another {differs!r} than this batch"
                " uses. Give another file."
            )
        if is_ended:  # An incomplete line is generated again.
            done.add(id)
            end += len(line)
    return done, end


def _is_truncated(line: bytes) -> bool:
    """Return whether a line is the start of a record that a crash truncated."""
    if not line.startswith(_START[: len(line)]):
        return False
    try:
        parse_object(line, "")
    except ValueError:
        return True
    return False
