"""CRC-32 checksums of a checkpoint's files, stored in its manifest.

Each file is divided into consecutive ranges, and the manifest has one line, "<bytes> <CRC-32>", for
each range. In a tensor file a range is a block, so that a rank can verify the blocks that it reads
without reading the rest of the file. Every other file is a single range.
"""

import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ee_llm.errors import CheckpointError

RANGE_PATTERN = r"^(0|[1-9][0-9]{0,18}) [0-9a-f]{8}$"
"""The form of a range in the manifest."""

Table = Mapping[str, Sequence[str]]
"""The ranges of every file by its name, in the form of the manifest."""

_ADVICE = "Restore it from a copy, or use another checkpoint."
_PIECE_BYTES = 16 * 2**20
_SEAL = ',\n "checksum": "{:08x}"\n}}\n'


class Range(NamedTuple):
    """Consecutive bytes of a file, and their CRC-32."""

    num_bytes: int
    crc32: int

    def __str__(self) -> str:
        return f"{self.num_bytes} {self.crc32:08x}"


def parse_range(text: str) -> Range:
    """Parse a range in the form of RANGE_PATTERN."""
    num_bytes, crc32 = text.split()
    return Range(int(num_bytes), int(crc32, 16))


def checksum(data: bytes | memoryview) -> str:
    """Return `data` as a range, in the form of the manifest."""
    return str(Range(len(data), zlib.crc32(data)))


def checksums_of(path: Path, places: Iterable[tuple[int, int]] = ()) -> list[str]:
    """Read a file and return its ranges, in the form of the manifest.

    Args:
        path: The file.
        places: Position and length of blocks that do not overlap. Each block and each gap between
            blocks becomes a range.
    """
    end = path.stat().st_size
    edges = sorted({0, end, *(edge for at, n in places for edge in (at, at + n))})
    lengths = [b - a for a, b in itertools.pairwise(edges)] or [0]
    with path.open("rb") as file:
        return [str(Range(length, _crc32(file, length, path))) for length in lengths]


def sealed(text: str) -> str:
    """Return the text of a JSON object with its own checksum added as the last member.

    The last line of `text` must be the closing brace.
    """
    body = text.rstrip().removesuffix("}").rstrip()
    return body + _SEAL.format(zlib.crc32(body.encode()))


def is_sealed(content: bytes) -> bool:
    """Return whether `content` is, byte for byte, a result of `sealed`."""
    body = content[: -len(_SEAL.format(0))]
    return content == body + _SEAL.format(zlib.crc32(body)).encode()


class Checksums:
    """Verifies the files of one checkpoint while they are read.

    exist: whether the checkpoint has checksums. One without them is not verified.
    """

    def __init__(self, checkpoint: Path, table: Table | None) -> None:
        self.exist = table is not None
        self._path = checkpoint
        self._ranges = {
            name: [parse_range(text) for text in texts] for name, texts in (table or {}).items()
        }
        self._places: dict[str, dict[int, Range]] = {}

    def read(self, name: str) -> bytes:
        """Return the content of a file; raises CheckpointError if it is damaged."""
        path = self._path / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}). {_ADVICE}") from error
        if self.exist:
            self._compare(path, 0, self._range(name, 0, len(data)), zlib.crc32(data))
        return data

    def check_block(self, name: str, position: int, data: bytes) -> None:
        """Raise CheckpointError if `data`, the range of a file at `position`, is damaged."""
        expected = self._range(name, position, len(data))
        self._compare(self._path / name, position, expected, zlib.crc32(data))

    def check_file(self, name: str, on_bytes: Callable[[int], None] | None = None) -> None:
        """Read a whole file; raises CheckpointError if it is missing, truncated or damaged.

        `on_bytes` is called with the number of bytes of each piece that was read.
        """
        path, position = self._path / name, 0
        try:
            with path.open("rb") as file:
                for expected in self._ranges[name]:
                    found = _crc32(file, expected.num_bytes, path, on_bytes)
                    self._compare(path, position, expected, found)
                    position += expected.num_bytes
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}). {_ADVICE}") from error

    def _range(self, name: str, position: int, num_bytes: int) -> Range:
        if name not in self._places:
            ranges = self._ranges.get(name, [])
            starts = itertools.accumulate((r.num_bytes for r in ranges), initial=0)
            self._places[name] = dict(zip(starts, ranges, strict=False))
        found = self._places[name].get(position)
        if found is None or found.num_bytes != num_bytes:
            raise CheckpointError(
                f"{self._path / name}: the manifest has no checksum of its bytes {position:,} to "
                f"{position + num_bytes:,}. {_ADVICE}"
            )
        return found

    def _compare(self, path: Path, position: int, expected: Range, found: int) -> None:
        if found != expected.crc32:
            raise CheckpointError(
                f"{path} is damaged: the checksum of its bytes {position:,} to "
                f"{position + expected.num_bytes:,} is {found:08x}, expected "
                f"{expected.crc32:08x}. {_ADVICE}"
            )


def _crc32(
    file: BinaryIO, num_bytes: int, path: Path, on_bytes: Callable[[int], None] | None = None
) -> int:
    """Return the CRC-32 of the next bytes of a file; raises CheckpointError if they end early."""
    crc32, remaining = 0, num_bytes
    while remaining:
        piece = file.read(min(remaining, _PIECE_BYTES))
        if not piece:
            raise CheckpointError(
                f"{path} is truncated: it ends at byte {file.tell():,}. {_ADVICE}"
            )
        crc32 = zlib.crc32(piece, crc32)
        remaining -= len(piece)
        if on_bytes is not None:
            on_bytes(len(piece))
    return crc32
