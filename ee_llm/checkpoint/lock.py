"""A lock on a run directory that the kernel releases when its process dies."""

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
    """An exclusive lock on a run directory, taken by rank 0 for all ranks of a run."""

    def __init__(self, output: str | Path) -> None:
        self._path = Path(output) / LOCK
        self._file: TextIO | None = None

    def take(self) -> None:
        """Acquire the lock; raises CheckpointError naming the process if another run has it.

        On a file system without locks, log a warning and continue without one.
        """
        file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115 - stays open during the run
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with file:
                file.seek(0)
                raise CheckpointError(
                    f"output: another run ({file.read().strip() or 'unknown'}) is writing to "
                    f"{str(self._path.parent)!r}. Wait for it to finish, stop it, or choose "
                    "another directory with --output."
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
        """Release the lock; does nothing if it was not acquired."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # a forked child may still have the file open
            self._file.close()
            self._file = None
