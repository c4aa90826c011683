"""Which files the inputs of a command are, and what kind of documents each holds."""

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

_HEAD = 8192  # bytes that say what a file is, as in git
_LONGEST_LINE = 64 << 20
_BOMS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16 and UTF-32: text, though not of the right kind


class Source(NamedTuple):
    """One input file: where it is, how it is read, and its size on the disk in bytes."""

    path: Path
    kind: Kind
    compression: Compression
    num_bytes: int

    @property
    def is_compressed(self) -> bool:
        """Whether the texts in the file are larger than the file."""
        return self.compression != "none" or self.kind == "parquet"


class Skipped(NamedTuple):
    """Something in a folder that is no document, and why."""

    path: Path
    reason: str


class Sources(NamedTuple):
    """The files to read, and what was left out of the folders among the inputs."""

    files: list[Source]
    skipped: list[Skipped]


def find_sources(
    inputs: Sequence[Path],
    suffixes: Sequence[str] = (),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    file_format: Format = "auto",
) -> Sources:
    """Return the files behind `inputs`, in their order; those of a folder sorted by path.

    `suffixes` and `exclude` (names of folders that are not entered) apply to folders only, which
    are searched to any depth without following links to folders. In a folder, empty and binary
    files, prepared data, broken links and the like are left out. Raises DataError for an input
    that is one of these, that does not exist or is given twice, for a file that cannot be read, and
    for a folder without a file that fits.
    """
    if not inputs:
        raise DataError("no inputs; give the path of a file or folder with texts")
    files: list[Source] = []
    skipped: list[Skipped] = []
    origins: dict[str, Path] = {}
    for path in inputs:
        found = list(_in_input(path, suffixes, set(exclude), file_format))
        new = [source for source in found if isinstance(source, Source)]
        left_out = [source for source in found if isinstance(source, Skipped)]
        if not new:
            raise DataError(_nothing(path, suffixes, left_out))
        for real in {os.path.realpath(source.path) for source in new}:
            if real in origins:
                raise DataError(
                    f"input {path}: {real} is in input {origins[real]} too; give each file once "
                    "(data.weights repeats data in training)"
                )
            origins[real] = path
        files += new
        skipped += left_out
    return Sources(files, skipped)


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """Return a line on what was left out, by reason and with an example; "" for nothing."""
    counts = Counter(reason for _, reason in skipped)
    examples = {reason: path for path, reason in reversed(skipped)}
    parts = [
        f"{count:,} {reason} ({examples[reason]}{', ...' if count > 1 else ''})"
        for reason, count in counts.items()
    ]
    return f"left out: {'; '.join(parts)}" if parts else ""


def _in_input(
    path: Path, suffixes: Sequence[str], exclude: set[str], file_format: Format
) -> Iterator[Source | Skipped]:
    if path.is_dir():
        yield from (_source(file, file_format) for file in _walk(path, suffixes, exclude))
    elif path.exists():
        source = _source(path, file_format)
        if isinstance(source, Skipped):
            raise DataError(f"input {path}: {source.reason}; expected a file or folder of texts")
        yield source
    else:
        kind = "broken link" if path.is_symlink() else "no such file or folder"
        raise DataError(f"input {path}: {kind}")


def _nothing(path: Path, suffixes: Sequence[str], skipped: Sequence[Skipped]) -> str:
    wanted = f" that ends with {' or '.join(suffixes)}" if suffixes else ""
    rest = describe_skipped(skipped)
    found = f" ({rest})" if rest else ""
    return f"input {path}: no file{wanted} with any text in this folder{found}"


def _walk(folder: Path, suffixes: Sequence[str], exclude: set[str]) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder, onerror=_cannot_list):
        folders[:] = [name for name in folders if name not in exclude]
        files += [Path(parent, name) for name in names if name.endswith(tuple(suffixes) or "")]
        files += [path for name in folders if (path := Path(parent, name)).is_symlink()]
    # By the parts of the path: independent of the file system's order and of the separator.
    return sorted(files, key=lambda file: file.parts)


def _cannot_list(error: OSError) -> None:
    raise DataError(f"input {error.filename}: cannot be listed ({error.strerror})") from error


def _source(path: Path, file_format: Format) -> Source | Skipped:
    """Return a file as a source, or why it is none."""
    if path.is_dir():
        return Skipped(path, "link to a folder")
    if not path.exists():
        return Skipped(path, "broken link")
    if not path.is_file():  # a pipe or a device, whose reading may never end
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
    """Return whether a file is output of `ee-llm data prepare`, finished or not."""
    if head.startswith(TOKENS) or (path.name.startswith(".") and path.suffix == ".part"):
        return True
    for suffix in (".bin", ".meta.json"):
        index = Path(f"{str(path).removesuffix(suffix)}.idx")
        if path.name.endswith(suffix) and index.is_file():
            with Input(index, "none") as file:
                return file.read(len(TOKENS)) == TOKENS
    return False


def _kind(path: Path, head: bytes, compression: Compression) -> Kind:
    """Return what a file holds, by its name, and for .json and Parquet by its content."""
    plain = path.with_suffix("") if path.suffix in SUFFIXES else path
    if plain.suffix in JSONL_SUFFIXES:
        return "jsonl"
    if head.startswith(parquet.MAGIC):
        return "parquet"
    if plain.suffix != ".json":
        return "text"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"[") and start[1:].lstrip().startswith(b"{"):
        return "json"
    return "jsonl" if start.startswith(b"{") and _begins_with_object(path, compression) else "text"


def _begins_with_object(path: Path, compression: Compression) -> bool:
    """Return whether a file's first line is a JSON object, as in JSONL that is named .json."""
    with Input(path, compression) as file:
        line = file.readline(_LONGEST_LINE)
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False
