"""Files read as a stream of bytes, decompressed on the way, within limits on what comes out."""

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

# By what a file begins with: names are often wrong or missing.
_MAGIC: dict[Compression, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
}
SUFFIXES = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd")

# Text shrinks to a third or a tenth, logs to a hundredth. Much more is a decompression bomb, a
# small file that fills the disk.
MAX_RATIO = 200
_PIECE_BYTES = 4 << 20
FREE_BYTES = 64 << 20  # Below this size, what comes out does no harm whatever the ratio.


def check_ratio(path: Path, num_bytes: int, num_compressed: int) -> None:
    """Raise DataError if `num_bytes` of content from `num_compressed` is more than text gives."""
    if num_bytes > FREE_BYTES and num_bytes > MAX_RATIO * num_compressed:
        raise DataError(
            f"input {path}: decompresses to more than {MAX_RATIO} times its size, which text does "
            "not; if the file is what you expect, decompress it and give the result"
        )


def compression_of(head: bytes) -> Compression:
    """Return how a file that begins with `head` is compressed."""
    return next((kind for kind, magic in _MAGIC.items() if magic.match(head)), "none")


class Input:
    """The content of a file, decompressed.

    A context manager. All methods raise DataError, naming the file, for one that cannot be read,
    is damaged, or decompresses to more than `MAX_RATIO` times its size.
    """

    def __init__(self, path: Path, compression: Compression) -> None:
        self.path = path
        self.compression = compression
        self._num_bytes = 0
        with self._named():
            self._file = path.open("rb")
        try:
            with self._named():
                self._stream = self._decompressed()
        except ValueError:
            self._file.close()
            raise

    @property
    def num_read(self) -> int:
        """Number of bytes of the file, as it is on the disk, that were read so far."""
        return self._file.tell()

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end."""
        return b"".join(self._pieces(self._stream.read, size))

    def readline(self, size: int) -> bytes:
        """Return the next line with its end, but at most `size` bytes; nothing at the end."""
        return b"".join(self._pieces(self._stream.readline, size, end=b"\n"))

    def _pieces(
        self, read: Callable[[int], bytes], size: int, end: bytes | None = None
    ) -> Iterator[bytes]:
        """Yield up to `size` bytes; small pieces of what may be a bomb, each checked at once."""
        is_compressed = self.compression != "none"
        while size > 0:
            with self._named():
                data = read(min(size, _PIECE_BYTES) if is_compressed else size)
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
        opened: Any = self._file
        if self.compression == "gzip":
            opened = gzip.GzipFile(fileobj=self._file)
        elif self.compression == "bzip2":
            opened = bz2.BZ2File(self._file)
        elif self.compression == "xz":
            opened = lzma.LZMAFile(self._file)  # noqa: SIM115 - _file is closed
        elif self.compression == "zstd":
            opened = io.BufferedReader(_zstd(self.path, self._file), FREE_BYTES >> 6)
        return opened

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(self._damaged(error)) from error
        except OSError as error:
            if error.strerror is None:  # not of the operating system, but of a decompressor
                raise DataError(self._damaged(error)) from error
            raise DataError(f"input {self.path}: cannot be read ({error.strerror})") from error

    def _damaged(self, error: Exception) -> str:
        return f"input {self.path}: damaged {self.compression} data ({error}); get the file again"

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
    """Return the decompressed stream of `file`, which Python itself has from 3.14 on."""
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"input {path}: zstd needs the package pyarrow; pip install 'ee-llm[data]', or "
            "decompress the file with zstd -d"
        ) from error
    return pyarrow.input_stream(file, compression="zstd")
