"""Read documents from a column of a Parquet file, a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ee_llm.data.documents.compression import check_ratio
from ee_llm.errors import DataError

MAGIC = b"PAR1"
_NUM_ROWS = 64  # to read at a time; each can be a long document


class Row(NamedTuple):
    """The text of a document in bytes, and the number of bytes of the file that it accounts for."""

    data: bytes
    num_read: int


def rows(path: Path, column: str) -> Iterator[Row]:
    """Yield the texts in `column`, in order.

    Raises:
        DataError: The file is damaged, decompresses to too much data, has no such column of
            strings or a row without text, or pyarrow is not installed. The message names the file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"input {path} requires the package pyarrow for Parquet. Run pip install "
            "'ee-llm[data]'."
        ) from error
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            _check_column(path, file, column)
            yield from _rows(path, file, column)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"input {path} has damaged Parquet data ({error}). Download or create the file again."
        ) from error
    except OSError as error:
        reason = error.strerror or f"damaged Parquet data: {error}"
        raise DataError(f"input {path} cannot be read: {reason}.") from error


def _rows(path: Path, file: Any, column: str) -> Iterator[Row]:
    import pyarrow

    num_bytes, total = path.stat().st_size, file.metadata.num_rows
    position = done = num_out = 0
    for batch in file.iter_batches(_NUM_ROWS, columns=[column]):
        values = batch.column(0)
        if pyarrow.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        # Take bytes, so that `decode_document` reports text that is not UTF-8.
        for value in values.cast(pyarrow.large_binary()).to_pylist():
            done += 1
            if value is None:
                raise DataError(
                    f"{path}, row {done}: the value of {column!r} is null instead of a string."
                )
            num_out += len(value)
            check_ratio(path, num_out, num_bytes)
            before, position = position, num_bytes * done // total
            yield Row(value, position - before)


def _check_column(path: Path, file: Any, column: str) -> None:
    import pyarrow

    schema = file.schema_arrow
    if column not in schema.names:
        names = ", ".join(map(repr, schema.names)) or "none"
        raise DataError(
            f"{path} has no column {column!r} (columns: {names}). Choose one with --key."
        )
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{path}: column {column!r} has type {kind} instead of string.")
    paths = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
    index = paths.index(column)
    for group in range(file.metadata.num_row_groups):
        chunk = file.metadata.row_group(group).column(index)
        check_ratio(path, chunk.total_uncompressed_size, chunk.total_compressed_size)
