"""Token files in Megatron's format: `PREFIX.bin` holds the tokens, `PREFIX.idx` where texts begin.

The layout is that of megatron.core.datasets.indexed_dataset, byte for byte. The index file is
little-endian: 9 bytes of magic, version (u64, 1), code of the token type (u8), number n of
sequences (u64), number d of document bounds (u64); then the n lengths (i32, in tokens), the n byte
offsets into the .bin file (i64), and the d document bounds (i64, in sequences, from 0 to n).
A document that is written here is one sequence; those read may have several.
"""

import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ee_llm.atomic_file import AtomicFile, open_output
from ee_llm.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_DTYPES = {code: np.dtype(name).newbyteorder("<") for code, name in _CODES.items()}

Tokens = NDArray[np.integer[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type that tokens of a vocabulary are stored in: uint16 below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)  # Megatron's own bound


class IndexedWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`, which come into being together at `commit`.

    A context manager: leaving it without a commit leaves the files of before untouched. Raises
    ValueError if the place can not be written.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype[Any] | type) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in _DTYPES.items() if known == self.dtype]
        if not codes:
            raise DataError(
                f"tokens can not be stored as {np.dtype(dtype)}; use one of {_type_names()}"
            )
        self._code = codes[0]
        self._bin = open_output(_with_suffix(prefix, ".bin"))
        self._idx_path = _with_suffix(prefix, ".idx")
        self._lengths: list[NDArray[np.int32]] = []
        self.num_documents = 0
        self.num_tokens = 0

    def add(self, tokens: Tokens | Sequence[int], lengths: Sequence[int] | None = None) -> None:
        """Append documents: `tokens` [t] of all of them one after the other, `lengths` of each.

        Without `lengths` the tokens are one document. Raises DataError for a token that the
        file's type can not hold.
        """
        array = np.asarray(tokens)
        sizes = np.asarray([array.size] if lengths is None else lengths, dtype=np.int32)
        assert int(sizes.sum(dtype=np.int64)) == array.size, "lengths and tokens disagree"
        if array.size:
            limits = np.iinfo(self.dtype)
            low, high = int(array.min()), int(array.max())
            if low < limits.min or high > limits.max:
                raise DataError(
                    f"token ids {low} to {high} do not fit {self.dtype.name} in {self._bin.path}"
                )
        self._bin.write(np.ascontiguousarray(array, dtype=self.dtype).tobytes())
        self._lengths.append(sizes)
        self.num_documents += sizes.size
        self.num_tokens += array.size

    def commit(self, *about: AtomicFile) -> None:
        """Put both files in place, the index last: without it there is no data set.

        `about` are files that describe these tokens; they are replaced together with them. Nothing
        of before is removed until everything new is on the disk.
        """
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        offsets = np.cumsum(lengths, dtype=np.int64) - lengths
        with open_output(self._idx_path) as index:
            bounds = self.num_documents + 1
            index.write(_HEADER.pack(MAGIC, 1, self._code, self.num_documents, bounds))
            index.write(lengths.astype("<i4").tobytes())
            index.write((offsets * self.dtype.itemsize).astype("<i8").tobytes())
            index.write(np.arange(bounds, dtype="<i8").tobytes())
            for file in (self._bin, *about, index):
                file.sync()
            # An old index or description must never stand beside new tokens.
            for file in (index, *about):
                file.path.unlink(missing_ok=True)
            for file in (self._bin, *about, index):
                file.commit()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bin.__exit__(kind, error, traceback)


class IndexedTokens:
    """The tokens of a prepared data set, mapped from disk: nothing is read until it is used.

    `tokens` [t] is the whole stream; document i is `tokens[bounds[i]:bounds[i + 1]]`. Raises
    ValueError, naming the file and what was expected, for files that are missing, truncated or
    not of this format.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = str(prefix)
        idx, bin_ = _with_suffix(prefix, ".idx"), _with_suffix(prefix, ".bin")
        for path in (idx, bin_):
            if not path.is_file():
                raise DataError(f"data {prefix}: {path} does not exist; {_missing(prefix)}")
        self.dtype, self.sequence_lengths, offsets, documents = _read_index(idx)
        num_tokens = int(self.sequence_lengths.sum(dtype=np.int64))
        expected = num_tokens * self.dtype.itemsize
        if bin_.stat().st_size != expected:
            raise DataError(
                f"{bin_}: expected {expected} bytes as its index says ({num_tokens} tokens of "
                f"{self.dtype.name}), found {bin_.stat().st_size}; prepare the data again"
            )
        if num_tokens == 0:
            raise DataError(f"{bin_}: holds no tokens; prepare the data again")
        self.tokens: Tokens = np.memmap(bin_, dtype=self.dtype, mode="r")
        ends = np.append(offsets // self.dtype.itemsize, num_tokens)
        self.bounds: NDArray[np.int64] = ends[documents]

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.bounds) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens, end-of-document tokens included."""
        return len(self.tokens)


_Index = tuple[np.dtype[Any], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]


def _read_index(path: Path) -> _Index:
    """Return token type, lengths [n], byte offsets [n] and document bounds [d] of an index file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
            raise DataError(
                f"{path}: not a Megatron index, expected it to begin with {MAGIC!r}, "
                f"found {head[: len(MAGIC)]!r}"
            )
        if len(head) < _HEADER.size:
            raise DataError(f"{path}: truncated, expected at least {_HEADER.size} bytes")
        _, version, code, n, d = _HEADER.unpack(head)
        if version != 1:
            raise DataError(f"{path}: expected version 1 of the format, found {version}")
        if code not in _DTYPES:
            raise DataError(
                f"{path}: expected tokens of type {_type_names()}, found type code {code}"
            )
        expected = _HEADER.size + 12 * n + 8 * d
        if size != expected:
            modes = "; sequence modes of multimodal data are not supported"
            raise DataError(
                f"{path}: expected {expected} bytes for {n} sequences and {d} document bounds, "
                f"found {size}{modes if size == expected + n else '; it may be truncated'}"
            )
        lengths = np.fromfile(file, "<i4", n)
        offsets = np.fromfile(file, "<i8", n)
        documents = np.fromfile(file, "<i8", d)
    dtype = _DTYPES[code]
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    if (lengths < 0).any() or not np.array_equal(offsets, starts):
        raise DataError(f"{path}: damaged, sequences do not follow each other without gaps")
    if d == 0 or documents[0] != 0 or documents[-1] != n or (np.diff(documents) < 0).any():
        raise DataError(f"{path}: damaged or unfinished, expected document bounds from 0 to {n}")
    return dtype, lengths, offsets, documents


def _with_suffix(prefix: Path | str, suffix: str) -> Path:
    return Path(f"{prefix}{suffix}")  # with_suffix would eat the end of "corpus.v2"


def _missing(prefix: Path | str) -> str:
    if str(prefix).endswith((".bin", ".idx")):
        return "give the prefix without .bin or .idx"
    return "make it with 'ee-llm data prepare'"


def _type_names() -> str:
    return ", ".join(_CODES.values())
