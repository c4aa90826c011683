"""A batch's output: one JSON object per line, appended as they finish; none is made twice."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ee_llm.inference.records import as_json


@contextmanager
def open_output(path: Path) -> Iterator[BinaryIO]:
    """Give the file to append records to; a line cut off by a crash is taken away first.

    Raises ValueError if it can not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise ValueError(f"--output {path} can not be written: {error.strerror}") from error
    with file:
        file.truncate(_end_of_lines(file))
        yield file


def finished_ids(file: BinaryIO, path: Path) -> set[str]:
    """Return the ids of the records that the output holds; raises ValueError for a foreign file."""
    file.seek(0)
    ids = set()
    for number, line in enumerate(file, start=1):
        try:
            ids.add(json.loads(line)["id"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"--output {path}, line {number} is no record of 'ee-llm generate'; give another"
                " file"
            ) from None
    return ids


def append(file: BinaryIO, record: dict[str, Any]) -> None:
    """Write a record as a line that is on the disk when this returns."""
    file.write(as_json(record).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _end_of_lines(file: BinaryIO) -> int:
    """Return where the last whole line ends."""
    file.seek(0)
    data = file.read()
    return data.rfind(b"\n") + 1
