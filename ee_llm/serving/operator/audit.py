"""The audit log: a JSON line for each request that the operator's limits change or refuse."""

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ee_llm.errors import RequestError

logger = logging.getLogger(__name__)


class AuditLog:
    """Appends JSON lines to a file, each with one call, so that none waits in a buffer.

    Errors of the disk are counted, and the first one after a success is logged; they do not raise.

    Attributes:
        num_errors: Number of lines that could not be written.
    """

    def __init__(self, path: Path) -> None:
        """Open the file; raises RequestError if that is not possible."""
        self.num_errors = 0
        self._path = path
        self._is_failing = False
        self._is_torn = False  # The last line in the file may be incomplete.
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RequestError(
                f"--audit-log {path} cannot be written: {error.strerror or error}."
            ) from None

    def write(self, event: Mapping[str, Any]) -> None:
        """Append an event with the current time."""
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **event}
        line = f"{json.dumps(entry)}\n".encode()
        if self._is_torn:
            line = b"\n" + line
        try:
            written = os.write(self._file, line)
            self._is_torn = (written > 0 or self._is_torn) and written < len(line)
            if written < len(line):
                raise OSError(None, "the disk is full")
        except OSError as error:
            self.num_errors += 1
            if not self._is_failing:
                logger.error(
                    "--audit-log %s cannot be written: %s. Requests are served nevertheless, and"
                    " this is not repeated until it works again.",
                    self._path,
                    error.strerror or error,
                )
            self._is_failing = True
        else:
            self._is_failing = False

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1  # The system gives the old number to the next file.
