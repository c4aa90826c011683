"""One run at a time in a directory: a lock that the kernel takes back when its holder dies."""

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

from ee_llm.errors import CheckpointError

LOCK = "run.lock"
logger = logging.getLogger(__name__)


class OutputLock:
    """The right to write to a run directory; the first rank holds it for all ranks of a run."""

    def __init__(self, output: str | Path) -> None:
        self._path = Path(output) / LOCK
        self._file: TextIO | None = None

    def take(self) -> None:
        """Take the lock; raises CheckpointError, naming the holder, if another run has it.

        On a file system without locks there is nothing to take, which is said.
        """
        file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with file:
                file.seek(0)
                raise CheckpointError(
                    f"output: another run ({file.read().strip() or 'unknown'}) writes to "
                    f"{str(self._path.parent)!r}; wait for it, end it, or choose another directory "
                    "with --output"
                ) from None
        except OSError as error:
            file.close()
            logger.warning(
                "%s cannot be locked (%s): start no other run in this directory",
                self._path,
                error.strerror,
            )
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let the next run in; does nothing where the lock was not taken."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # a forked child may have the file open still
            self._file.close()
            self._file = None
