"""Write files atomically: into a temporary file that is then renamed over the target."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from ee_llm.errors import UserError


class AtomicFile:
    """A binary file that replaces its target only when `commit` is called.

    The data go to a temporary file in the target's folder, which is created if it is missing. Used
    as a context manager, it discards uncommitted data, so a failure leaves an existing target as it
    was.

    Args:
        path: The target.

    Raises:
        OSError: The temporary file cannot be created.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        with self._add_path_to_errors():
            self._file.write(data)

    def sync(self) -> None:
        """Flush all data to the disk, so that a full disk cannot make `commit` fail."""
        with self._add_path_to_errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def commit(self) -> None:
        """Rename the temporary file to the target, replacing an existing file."""
        self.sync()
        self._file.close()
        os.replace(self._temporary, self.path)
        # The rename is durable only after the folder is synchronized as well.
        sync_path(self.path.parent)

    @contextlib.contextmanager
    def _add_path_to_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # Errors such as "No space left on device" name no file.
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Closing flushes the buffer, which fails again if the disk is full.
        with contextlib.suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)  # It no longer exists after a commit.


def open_output(path: Path) -> AtomicFile:
    """Return an `AtomicFile` for an output that the user named.

    Raises:
        UserError: `path` is a folder or cannot be written.
    """
    if path.is_dir():
        raise UserError(f"output {path} is a folder. Choose another output.")
    try:
        return AtomicFile(path)
    except OSError as error:
        parent_is_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = f"{path.parent} is not a folder" if parent_is_file else error.strerror
        raise UserError(
            f"output {path} cannot be written: {reason}. Choose another output."
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Atomically replace the content of a file by `text` in UTF-8.

    Raises:
        OSError: The file cannot be written; an existing file is unchanged.
    """
    with AtomicFile(path) as file:
        file.write(text.encode())
        file.commit()


def sync_path(path: Path) -> None:
    """Block until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
