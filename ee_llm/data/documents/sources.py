"""Find the input files of a command and detect their formats."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ee_llm.data.documents import parquet
from ee_llm.data.documents.compression import SUFFIXES, Compression, Input, compression_of
from ee_llm.data.indexed import MAGIC as TOKENS
from ee_llm.errors import DataError

Kind = Literal["jsonl", "json", "parquet", "text"]
Format = Literal["auto", "jsonl", "json", "parquet", "text"]

JSONL_SUFFIXES = (".jsonl", ".ndjson")
DEFAULT_EXCLUDE = (".git", ".hg", ".svn", ".venv", "__pycache__", "node_modules")

_HEAD = 8192  # bytes from which to detect binary files, as git does
_LONGEST_LINE = 64 << 20
_BOMS = (b"\xff\xfe", b"\xfe\xff")  # UTF-16 and UTF-32: text that needs a conversion


class Source(NamedTuple):
    """An input file: its path, format, compression and size on the disk in bytes."""

    path: Path
    kind: Kind
    compression: Compression
    num_bytes: int

    @property
    def is_compressed(self) -> bool:
        """Whether the text of the file is larger than the file."""
        return self.compression != "none" or self.kind == "parquet"


class Skipped(NamedTuple):
    """A file or link in a folder that is not a document, and the reason."""

    path: Path
    reason: str


class Sources(NamedTuple):
    """The files to read, and the skipped contents of input folders."""

    files: list[Source]
    skipped: list[Skipped]


def find_sources(
    inputs: Sequence[Path],
    suffixes: Sequence[str] = (),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    file_format: Format = "auto",
) -> Sources:
    """Return the files of `inputs` in the given order, with those of a folder sorted by path.

    Folders are searched to any depth without following links to folders. Empty and binary files,
    prepared data, broken links and the like are skipped in folders.

    Args:
        inputs: Files and folders.
        suffixes: Suffixes of the files to read in folders; by default, all files.
        exclude: Names of folders to skip.
        file_format: The format of all files, or "auto" to detect it.

    Raises:
        DataError: An input does not exist, is not a document, is given twice or cannot be read, or
            a folder has no document.
    """
    if not inputs:
        raise DataError("no inputs: give the path of a file or folder with texts.")
    files: list[Source] = []
    skipped: list[Skipped] = []
    origins: dict[str, Path] = {}
    for path in inputs:
        contents = list(_find(path, suffixes, set(exclude), file_format))
        new = [source for source in contents if isinstance(source, Source)]
        not_read = [source for source in contents if isinstance(source, Skipped)]
        if not new:
            raise DataError(_no_document(path, suffixes, not_read))
        for real in {os.path.realpath(source.path) for source in new}:
            if real in origins:
                raise DataError(
                    f"input {path}: {real} is also in input {origins[real]}. Give each file once; "
                    "to repeat data in training, use data.weights."
                )
            origins[real] = path
        files += new
        skipped += not_read
    return Sources(files, skipped)


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """Return a line with the number of skipped files and an example per reason; "" for none."""
    counts = Counter(reason for _, reason in skipped)
    examples = {reason: path for path, reason in reversed(skipped)}
    parts = [
        f"{count:,} {reason} ({examples[reason]}{', ...' if count > 1 else ''})"
        for reason, count in counts.items()
    ]
    return f"skipped: {'; '.join(parts)}" if parts else ""


def _find(
    path: Path, suffixes: Sequence[str], exclude: set[str], file_format: Format
) -> Iterator[Source | Skipped]:
    if path.is_dir():
        yield from (_source(file, file_format) for file in _walk(path, suffixes, exclude))
    elif path.exists():
        source = _source(path, file_format)
        if isinstance(source, Skipped):
            raise DataError(f"input {path}: {source.reason}. Give a file or folder with texts.")
        yield source
    else:
        kind = "broken link" if path.is_symlink() else "no such file or folder"
        raise DataError(f"input {path}: {kind}. Check the path.")


def _no_document(path: Path, suffixes: Sequence[str], skipped: Sequence[Skipped]) -> str:
    condition = f" that ends with {' or '.join(suffixes)}" if suffixes else ""
    description = describe_skipped(skipped)
    reasons = f" ({description})" if description else ""
    return f"input {path}: the folder has no file{condition} with text{reasons}."


def _walk(folder: Path, suffixes: Sequence[str], exclude: set[str]) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder, onerror=_cannot_list):
        folders[:] = [name for name in folders if name not in exclude]
        files += [Path(parent, name) for name in names if name.endswith(tuple(suffixes) or "")]
        files += [path for name in folders if (path := Path(parent, name)).is_symlink()]
    # Sort by path components, so that the order does not depend on the file system or separator.
    return sorted(files, key=lambda file: file.parts)


def _cannot_list(error: OSError) -> None:
    raise DataError(f"input {error.filename} cannot be listed: {error.strerror}.") from error


def _source(path: Path, file_format: Format) -> Source | Skipped:
    """Return a file as a source, or the reason to skip it."""
    if path.is_dir():
        return Skipped(path, "link to a folder")
    if not path.exists():
        return Skipped(path, "broken link")
    if not path.is_file():  # Reading a pipe or a device may never end.
        return Skipped(path, "neither a file nor a folder")
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        return Skipped(path, "empty")
    with Input(path, "none") as file:
        head = file.read(_HEAD)
    compression = compression_of(head)
    if compression != "none":
        with Input(path, compression) as file:
            head = file.read(_HEAD)
    if _is_prepared(path, head):
        return Skipped(path, "prepared data")
    kind = _kind(path, head, compression) if file_format == "auto" else file_format
    if kind != "parquet" and b"\0" in head and not head.startswith(_BOMS):
        return Skipped(path, "binary")
    return Source(path, kind, compression, num_bytes)


def _is_prepared(path: Path, head: bytes) -> bool:
    """Return whether a file is complete or partial output of `ee-llm data prepare`."""
    if head.startswith(TOKENS) or (path.name.startswith(".") and path.suffix == ".part"):
        return True
    for suffix in (".bin", ".meta.json"):
        index = Path(f"{str(path).removesuffix(suffix)}.idx")
        if path.name.endswith(suffix) and index.is_file():
            with Input(index, "none") as file:
                return file.read(len(TOKENS)) == TOKENS
    return False


def _kind(path: Path, head: bytes, compression: Compression) -> Kind:
    """Return the format of a file by its name and, for .json and Parquet, by its content."""
    name = path.with_suffix("") if path.suffix in SUFFIXES else path
    if name.suffix in JSONL_SUFFIXES:
        return "jsonl"
    if head.startswith(parquet.MAGIC):
        return "parquet"
    if name.suffix != ".json":
        return "text"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"[") and start[1:].lstrip().startswith(b"{"):
        return "json"
    return "jsonl" if start.startswith(b"{") and _begins_with_object(path, compression) else "text"


def _begins_with_object(path: Path, compression: Compression) -> bool:
    """Return whether the first line is a JSON object, as in JSONL files named .json."""
    with Input(path, compression) as file:
        line = file.readline(_LONGEST_LINE)
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False
