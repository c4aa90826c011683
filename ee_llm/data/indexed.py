"""Read and write token files in Megatron's format: tokens in PREFIX.bin, an index in PREFIX.idx.

The layout is byte for byte that of megatron.core.datasets.indexed_dataset. The index file is
little-endian: 9 bytes of magic, version (u64, 1), code of the token type (u8), number n of
sequences (u64), number d of document bounds (u64); then the n lengths (i32, in tokens), the n byte
offsets into the .bin file (i64), and the d document bounds (i64, in sequences, from 0 to n).
Documents written by this module have one sequence; documents read by it may have several.
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
    """Return the type for storing tokens of a vocabulary: uint16 below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)  # Megatron uses the same bound.


class IndexedWriter:
    """Writer of `PREFIX.bin` and `PREFIX.idx`, which `commit` creates together.

    Used as a context manager, it leaves existing files unchanged unless `commit` is called.

    Args:
        prefix: Path of the files without .bin and .idx.
        dtype: Integer type to store tokens in.

    Raises:
        UserError: The files cannot be written, or the format does not support `dtype`.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype[Any] | type) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in _DTYPES.items() if known == self.dtype]
        if not codes:
            raise DataError(
                f"tokens cannot be stored as {np.dtype(dtype)}. Use one of {_type_names()}."
            )
        self._code = codes[0]
        self._bin = open_output(_with_suffix(prefix, ".bin"))
        self._idx_path = _with_suffix(prefix, ".idx")
        self._lengths: list[NDArray[np.int32]] = []
        self.num_documents = 0
        self.num_tokens = 0

    def add(self, tokens: Tokens | Sequence[int], lengths: Sequence[int] | None = None) -> None:
        """Append documents.

        Args:
            tokens: The concatenated tokens [t] of the documents.
            lengths: The number of tokens of each document; by default, there is one document.

        Raises:
            DataError: A token does not fit the type of the file.
        """
        array = np.asarray(tokens)
        sizes = np.asarray([array.size] if lengths is None else lengths, dtype=np.int32)
        assert int(sizes.sum(dtype=np.int64)) == array.size, "lengths and tokens disagree"
        if array.size:
            limits = np.iinfo(self.dtype)
            low, high = int(array.min()), int(array.max())
            if low < limits.min or high > limits.max:
                raise DataError(
                    f"token ids {low} to {high} do not fit into {self.dtype.name} in "
                    f"{self._bin.path}."
                )
        self._bin.write(np.ascontiguousarray(array, dtype=self.dtype).tobytes())
        self._lengths.append(sizes)
        self.num_documents += sizes.size
        self.num_tokens += array.size

    def commit(self, *descriptions: AtomicFile) -> None:
        """Create both files, the index last: without an index there is no data set.

        No existing file is removed until all new data are on the disk.

        Args:
            descriptions: Files that describe the tokens, to be replaced together with them.
        """
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        offsets = np.cumsum(lengths, dtype=np.int64) - lengths
        with open_output(self._idx_path) as index:
            bounds = self.num_documents + 1
            index.write(_HEADER.pack(MAGIC, 1, self._code, self.num_documents, bounds))
            index.write(lengths.astype("<i4").tobytes())
            index.write((offsets * self.dtype.itemsize).astype("<i8").tobytes())
            index.write(np.arange(bounds, dtype="<i8").tobytes())
            for file in (self._bin, *descriptions, index):
                file.sync()
            # Remove the old files first: they must never be combined with new tokens.
            for file in (index, *descriptions):
                file.path.unlink(missing_ok=True)
            for file in (self._bin, *descriptions, index):
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
    """The tokens of a prepared data set, memory-mapped, so that data are read only when used.

    `tokens` [t] is the entire stream; document i is `tokens[bounds[i]:bounds[i + 1]]`.

    Raises:
        DataError: A file is missing, truncated or not in this format.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = str(prefix)
        idx, bin_ = _with_suffix(prefix, ".idx"), _with_suffix(prefix, ".bin")
        for path in (idx, bin_):
            if not path.is_file():
                raise DataError(f"data {prefix}: {path} does not exist. {_remedy(prefix)}")
        self.dtype, self.sequence_lengths, offsets, documents = _read_index(idx)
        num_tokens = int(self.sequence_lengths.sum(dtype=np.int64))
        expected = num_tokens * self.dtype.itemsize
        if bin_.stat().st_size != expected:
            raise DataError(
                f"{bin_} has {bin_.stat().st_size} bytes, but its index expects {expected} "
                f"({num_tokens} tokens of {self.dtype.name}). Prepare the data again."
            )
        if num_tokens == 0:
            raise DataError(f"{bin_} has no tokens. Prepare the data again.")
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
    """Return the token type, lengths [n], offsets [n] and document bounds [d] of an index file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER.size)
        if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
            raise DataError(
                f"{path} is not a Megatron index: it begins with {head[: len(MAGIC)]!r} instead of "
                f"{MAGIC!r}."
            )
        if len(head) < _HEADER.size:
            raise DataError(
                f"{path} is truncated: it has {size} bytes of a header of {_HEADER.size}. Prepare "
                "the data again."
            )
        _, version, code, n, d = _HEADER.unpack(head)
        if version != 1:
            raise DataError(
                f"{path} has version {version} of the format, but only version 1 is supported."
            )
        if code not in _DTYPES:
            raise DataError(
                f"{path} has the unknown token type code {code}. Supported types are "
                f"{_type_names()}."
            )
        expected = _HEADER.size + 12 * n + 8 * d
        if size != expected:
            reason = "It may be truncated. Prepare the data again."
            if size == expected + n:
                reason = "Sequence modes of multimodal data are not supported."
            raise DataError(
                f"{path} has {size} bytes instead of {expected} for {n} sequences and {d} document "
                f"bounds. {reason}"
            )
        lengths = np.fromfile(file, "<i4", n)
        offsets = np.fromfile(file, "<i8", n)
        documents = np.fromfile(file, "<i8", d)
    dtype = _DTYPES[code]
    starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    if (lengths < 0).any() or not np.array_equal(offsets, starts):
        raise DataError(
            f"{path} is damaged: its sequences are not contiguous. Prepare the data again."
        )
    if d == 0 or documents[0] != 0 or documents[-1] != n or (np.diff(documents) < 0).any():
        raise DataError(
            f"{path} is damaged or incomplete: its document bounds do not go from 0 to {n}. "
            "Prepare the data again."
        )
    return dtype, lengths, offsets, documents


def _with_suffix(prefix: Path | str, suffix: str) -> Path:
    return Path(f"{prefix}{suffix}")  # with_suffix would cut the end of "corpus.v2".


def _remedy(prefix: Path | str) -> str:
    if str(prefix).endswith((".bin", ".idx")):
        return "Give the prefix without .bin or .idx."
    return "Create it with 'ee-llm data prepare'."


def _type_names() -> str:
    return ", ".join(_CODES.values())
