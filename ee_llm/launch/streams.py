"""Keep a run alive when a standard stream is closed, broken or unable to encode a character."""

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

_WAIT_S = 5.0  # for the reader, if another process has made the stream non-blocking

_trouble: list[str] = []  # the first failure only


def protect_streams() -> None:
    """Make standard error unable to fail, and standard input and output safe to use.

    A closed stream is opened on the null device, because a file opened later would get its
    descriptor. A character that the encoding lacks is escaped as in JSON. Text that standard error
    cannot take is dropped and reported by `stream_trouble`. Streams that the caller has replaced
    stay as they are.
    """
    codecs.register_error("ee_llm.escape", _escape)
    _open_closed()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        sys.stdout.reconfigure(errors="ee_llm.escape")
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        sys.stderr = _unfailing(sys.stderr, "standard error")


def ignore_output_trouble() -> None:
    """Make standard output unable to fail as well, for a command that prints no result."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        sys.stdout = _unfailing(sys.stdout, "standard output")


def stream_trouble() -> str | None:
    """Return the first ignored failure of a standard stream, None if there was none."""
    return _trouble[0] if _trouble else None


class _Unfailing(io.FileIO):
    """A stream that accepts every write and drops the data that the system does not accept."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._name = name

    def write(self, data: Any, /) -> int:
        """Write as much as the system accepts; return the number of bytes written or dropped."""
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
            if written is None and select.select([], [self], [], _WAIT_S)[1]:
                written = super().write(data)
            if written is None:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:
            if not _trouble:
                _trouble.append(f"{self._name}: {error.strerror or error}")
            return size
        return written


def _unfailing(stream: io.TextIOWrapper, name: str) -> TextIO:
    with contextlib.suppress(OSError):  # the stream may have failed already
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Unfailing(stream.fileno(), name)),
        encoding=stream.encoding,
        errors="ee_llm.escape",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_closed() -> None:
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            stream = open(descriptor, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that cannot be encoded by their JSON escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    pairs = (units[i : i + 2].hex() for i in range(0, len(units), 2))
    return "".join(f"\\u{pair}" for pair in pairs), error.end
