"""Files that appear whole or not at all: written beside their place, then renamed into it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from ee_llm.errors import UserError


class AtomicFile:
    """A binary file that is written under another name until `commit` puts it in its place.

    As a context manager it discards what was not committed, so that a failure leaves whatever
    was there before. Raises UserError if the place can not be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        if path.is_dir():
            raise UserError(f"output {path}: is a folder; choose another output")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._aside.open("wb")
        except OSError as error:
            in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
            reason = f"{path.parent} is not a folder" if in_the_way else error.strerror
            raise UserError(
                f"output {path}: can not be written ({reason}); choose another output"
            ) from error

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        with self._named():
            self._file.write(data)

    def sync(self) -> None:
        """Return when everything written is on the disk: from then on a full disk is no danger."""
        with self._named():
            self._file.flush()
            os.fsync(self._file.fileno())

    def commit(self) -> None:
        """Put the file in its place, over what is there."""
        self.sync()
        self._file.close()
        os.replace(self._aside, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too is to be on the disk
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # a full disk, most likely: it does not say of which file
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # it writes what is buffered: the disk may be full
            self._file.close()
        self._aside.unlink(missing_ok=True)  # after a commit there is none
