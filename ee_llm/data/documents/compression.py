"""Read compressed files as a stream of bytes, with limits on the decompressed size."""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from ee_llm.errors import DataError

Compression = Literal["none", "gzip", "bzip2", "xz", "zstd"]

# Detect the compression by content: file names are often wrong or have no suffix.
_MAGIC: dict[Compression, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
}
SUFFIXES = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd")

# Text compresses to a third or a tenth, logs to a hundredth. A much higher ratio indicates a
# decompression bomb: a small file that fills the disk.
MAX_RATIO = 200
_CHUNK_BYTES = 4 << 20
FREE_BYTES = 64 << 20  # The ratio of less decompressed data is not limited.


def check_ratio(path: Path, num_bytes: int, num_compressed: int) -> None:
    """Raise DataError if `num_compressed` bytes decompress to too many bytes, `num_bytes`."""
    if num_bytes > FREE_BYTES and num_bytes > MAX_RATIO * num_compressed:
        raise DataError(
            f"input {path} decompresses to more than {MAX_RATIO} times its size, which is unusual "
            "for text. If the file is valid, decompress it first."
        )


def compression_of(head: bytes) -> Compression:
    """Return the compression of a file that begins with `head`."""
    return next((kind for kind, magic in _MAGIC.items() if magic.match(head)), "none")


class Input:
    """Context manager that reads the decompressed content of a file.

    All methods raise DataError, naming the file, if it cannot be read, is damaged, or decompresses
    to more than `MAX_RATIO` times its size.
    """

    def __init__(self, path: Path, compression: Compression) -> None:
        self.path = path
        self.compression = compression
        self._num_bytes = 0
        with self._translate_errors():
            self._file = path.open("rb")
        try:
            with self._translate_errors():
                self._stream = self._decompressed()
        except ValueError:
            self._file.close()
            raise

    @property
    def num_read(self) -> int:
        """Number of bytes read from the file so far, before decompression."""
        return self._file.tell()

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end of the file."""
        return b"".join(self._chunks(self._stream.read, size))

    def readline(self, size: int) -> bytes:
        """Return the next line, at most `size` bytes, with its newline; b"" at the end."""
        return b"".join(self._chunks(self._stream.readline, size, end=b"\n"))

    def _chunks(
        self, read: Callable[[int], bytes], size: int, end: bytes | None = None
    ) -> Iterator[bytes]:
        """Yield up to `size` bytes, compressed data in small chunks to check the ratio of each."""
        is_compressed = self.compression != "none"
        while size > 0:
            with self._translate_errors():
                data = read(min(size, _CHUNK_BYTES) if is_compressed else size)
            if not data:
                return
            if is_compressed:
                self._num_bytes += len(data)
                check_ratio(self.path, self._num_bytes, self.num_read)
            yield data
            if not is_compressed or (end is not None and data.endswith(end)):
                return
            size -= len(data)

    def _decompressed(self) -> IO[bytes]:
        stream: Any = self._file
        if self.compression == "gzip":
            stream = gzip.GzipFile(fileobj=self._file)
        elif self.compression == "bzip2":
            stream = bz2.BZ2File(self._file)
        elif self.compression == "xz":
            stream = lzma.LZMAFile(self._file)  # noqa: SIM115 - _file is closed
        elif self.compression == "zstd":
            stream = io.BufferedReader(_zstd(self.path, self._file), FREE_BYTES >> 6)
        return stream

    @contextlib.contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(self._damaged(error)) from error
        except OSError as error:
            if error.strerror is None:  # A decompressor raised it, not the operating system.
                raise DataError(self._damaged(error)) from error
            raise DataError(f"input {self.path} cannot be read: {error.strerror}.") from error

    def _damaged(self, error: Exception) -> str:
        return (
            f"input {self.path} has damaged {self.compression} data ({error}). Download or "
            "create the file again."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _zstd(path: Path, file: IO[bytes]) -> Any:
    """Return the decompressed stream of `file`; Python supports zstd itself only from 3.14 on."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"input {path} requires the package pyarrow for zstd. Run pip install 'ee-llm[data]', "
            "or decompress the file with zstd -d."
        ) from error
    return pyarrow.input_stream(file, compression="zstd")
