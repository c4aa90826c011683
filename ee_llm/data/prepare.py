"""`ee-llm data prepare`: texts in, Megatron's `.bin` and `.idx` out, in parallel.

What is written depends on the inputs and the tokenizer alone: any number of workers gives the same
bytes.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ee_llm.atomic_file import open_output
from ee_llm.data.documents import (
    DEFAULT_EXCLUDE,
    Format,
    RawDocument,
    Skipped,
    decode_document,
    describe_skipped,
    find_sources,
    raw_documents,
)
from ee_llm.data.indexed import IndexedTokens, IndexedWriter, Tokens, token_dtype
from ee_llm.data.tokenization.tokenizer import Tokenizer, load_tokenizer
from ee_llm.errors import DataError, RunError

_CHUNK_BYTES = 1 << 20  # of text, the unit of work that is handed to a worker
_MAX_WORKERS = 1024  # each takes memory for the tokenizer and for documents under way
_POOL_BYTES = 8 << 20  # below this much text the start of worker processes is not worth it

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class PrepareOptions:
    """Turn texts into the token files that training reads: PREFIX.bin and PREFIX.idx."""

    inputs: tuple[Path, ...]
    """Files of JSON lines, JSON arrays, Parquet or plain text (one document each), compressed with
    gzip, bzip2, xz or zstd or not, and folders of them."""

    output: Path
    """Prefix of the files to write, for example data/corpus for data/corpus.bin and .idx."""

    tokenizer: str = "bytes"
    """'bytes', or the path of a SentencePiece .model, of a tokenizer.json, or of a run directory or
    checkpoint, whose tokenizer it then is."""

    eos_token: str | None = None
    """Text of the token that ends a document; default: what the tokenizer_config.json beside the
    tokenizer states, else the first of the usual names that is in the vocabulary."""

    key: str = "text"
    """Key of the text in JSON objects, or its column in Parquet files."""

    suffixes: tuple[str, ...] = ()
    """Read only files with these endings in a folder, for example .py .md; default: every file."""

    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    """Names of folders that are left out, at any depth."""

    format: Format = "auto"
    """What the inputs are; auto goes by the name and, for .json and Parquet, by the content."""

    append_eos: bool = True
    """Whether an end-of-document token follows each document."""

    workers: int = 0
    """Number of processes; 0 is one per CPU core, or none for a small input."""

    progress: bool = True
    """Whether a progress bar is shown (at a terminal, on standard error)."""


class PrepareReport(NamedTuple):
    """What `prepare` wrote; as text, one line for people."""

    prefix: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    """Bytes of UTF-8 text, before tokenization."""
    num_empty: int
    """Documents without any text, which were left out."""
    skipped: tuple[Skipped, ...] = ()
    """What was left out of the folders among the inputs."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, end-of-document tokens included."""
        return self.num_bytes / self.num_tokens

    def __str__(self) -> str:
        empty = f", {self.num_empty:,} empty ones left out" if self.num_empty else ""
        skipped = f"\n{describe_skipped(self.skipped)}" if self.skipped else ""
        return (
            f"{self.prefix}.bin and .idx: {self.num_documents:,} documents{empty}, "
            f"{self.num_tokens:,} tokens, {self.bytes_per_token:.2f} bytes/token{skipped}"
        )


def prepare(options: PrepareOptions) -> PrepareReport:
    """Return what was written for `options`: both files, and PREFIX.meta.json that describes them.

    Nothing is replaced unless everything went well. A script that calls this must do so under
    `if __name__ == "__main__":`, as worker processes import the script. Raises
    ValueError for what is wrong with the inputs (file and line or byte), the tokenizer or the
    output.
    """
    if not 0 <= options.workers <= _MAX_WORKERS:
        raise DataError(
            f"--workers {options.workers}: give a number of processes up to {_MAX_WORKERS:,}, or 0"
        )
    tokenizer = load_tokenizer(options.tokenizer, options.eos_token)
    _ = tokenizer.eos_token_id  # before any work: a tokenizer may have no such token
    sources, skipped = find_sources(
        options.inputs, options.suffixes, options.exclude, options.format
    )
    total = sum(source.num_bytes for source in sources)
    encode = partial(_encode, options.tokenizer, options.eos_token, options.key, options.append_eos)
    chunks = _chunks(raw_documents(sources, options.key))
    num_bytes = num_empty = 0
    with (
        closing(ordered_map(encode, chunks, _num_workers(options.workers, total))) as results,
        IndexedWriter(options.output, token_dtype(tokenizer.vocab_size)) as writer,
        _progress(options.progress) as progress,
    ):
        task = progress.add_task("preparing", total=total)
        for encoded in results:
            writer.add(encoded.tokens, encoded.lengths)
            num_bytes += encoded.num_bytes
            num_empty += encoded.num_empty
            progress.update(task, advance=encoded.num_read)
        if writer.num_documents == 0:
            names = ", ".join(str(path) for path in options.inputs)
            raise DataError(f"inputs {names}: no document with any text in them")
        description = describe(tokenizer, writer.num_documents, writer.num_tokens)
        with open_output(Path(f"{options.output}.meta.json")) as file:
            file.write(json.dumps(description, indent=1).encode() + b"\n")
            writer.commit(file)
    return PrepareReport(
        str(options.output),
        writer.num_documents,
        writer.num_tokens,
        num_bytes,
        num_empty,
        tuple(skipped),
    )


def describe(tokenizer: Tokenizer, num_documents: int, num_tokens: int) -> dict[str, object]:
    """Return the content of `PREFIX.meta.json`: which tokenizer the tokens are of, and how many."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "num_documents": num_documents,
        "num_tokens": num_tokens,
    }


def check_tokenizer(prefix: Path | str, tokenizer: Tokenizer) -> None:
    """Raise DataError if the data at `prefix` was prepared with another tokenizer.

    Data without a PREFIX.meta.json (made by other tools) pass: there is nothing to check.
    """
    path = Path(f"{prefix}.meta.json")
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_bytes())
        fingerprint, num_tokens = found["tokenizer"], found["num_tokens"]
        eos_token_id = found["eos_token_id"] if "eos_token_id" in found else found["eod"]  # 0.1.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected the description that 'ee-llm data prepare' writes; prepare the data "
            "again, or remove the file if the data are of another tool"
        ) from error
    if num_tokens != IndexedTokens(prefix).num_tokens:
        raise DataError(
            f"{path}: describes other data than {prefix}.bin; prepare the data again, or remove "
            "the file if the data are of another tool"
        )
    for what, here, there in (
        ("tokenizer", tokenizer.fingerprint, fingerprint),
        ("end-of-document token", tokenizer.eos_token_id, eos_token_id),
    ):
        if here != there:
            raise DataError(
                f"data {prefix}: prepared with {what} {there}, but data.tokenizer "
                f"({tokenizer.name}) has {here}; name the same tokenizer (and data.eos_token), or "
                "prepare the data again"
            )


_Chunk = tuple[RawDocument, ...]


class _Encoded(NamedTuple):
    """A chunk's tokens [t], the number of tokens of each document, and what they were made of.

    `num_read`: bytes of the input files, as they are on the disk.
    """

    tokens: Tokens
    lengths: list[int]
    num_read: int
    num_bytes: int
    num_empty: int


def _chunks(documents: Iterable[RawDocument]) -> Iterator[_Chunk]:
    """Group documents by size alone, so that the number of workers can not matter."""
    group: list[RawDocument] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.data)
        if size >= _CHUNK_BYTES:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


@lru_cache(maxsize=1)
def _worker_tokenizer(spec: str, eos_token: str | None) -> Tokenizer:
    return load_tokenizer(spec, eos_token)


def _encode(
    spec: str, eos_token: str | None, key: str, append_eos: bool, chunk: _Chunk
) -> _Encoded:
    tokenizer = _worker_tokenizer(spec, eos_token)
    parts = []
    num_bytes = num_empty = 0
    for document in chunk:
        text = decode_document(document, key)
        if not text:
            num_empty += 1
            continue
        num_bytes += len(text.encode())
        ids = tokenizer.encode(text)
        if append_eos:
            ids.append(tokenizer.eos_token_id)
        parts.append(np.array(ids, dtype=token_dtype(tokenizer.vocab_size)))
    tokens = np.concatenate([np.zeros(0, token_dtype(tokenizer.vocab_size)), *parts])
    num_read = sum(document.num_read for document in chunk)
    return _Encoded(tokens, [part.size for part in parts], num_read, num_bytes, num_empty)


def ordered_map(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int
) -> Generator[_Result, None, None]:
    """Yield function(item) of each item, in order, computed by `workers` processes.

    With one worker everything happens in this process. A few items per worker are under way at a
    time, so that `items` may be larger than memory. `function` and the items must be picklable.
    A ValueError of `function` comes through as it is; where it was raised is its cause. Workers
    are killed when the caller stops early, and end when this process dies.

    Raises RunError if a worker was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # Spawned, not forked: a fork of a process with threads (progress bar, torch) may deadlock.
    context = multiprocessing.get_context("spawn")
    under_way: deque[Future[_Result]] = deque()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    try:
        for item in items:
            with _interrupts_ignored() if not under_way else nullcontext():
                under_way.append(pool.submit(function, item))
            if len(under_way) >= 4 * workers:
                yield _result(under_way.popleft())
        while under_way:
            yield _result(under_way.popleft())
    except BrokenProcessPool as error:
        raise RunError(
            f"a worker process of {workers} was killed, most likely because the machine ran out of "
            "memory. Use fewer --workers, or split documents of many megabytes."
        ) from error
    finally:
        if under_way or sys.exc_info()[0] is not None:  # nobody wants the rest
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this worker end as soon as its parent dies: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which their parent ends them at, without a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _result(future: Future[_Result]) -> _Result:
    try:
        return future.result()
    except ValueError as error:
        # As one of ours, not of the pool's: the command line tells a user's mistake by that.
        raise error.with_traceback(None)  # noqa: B904  (its cause is the worker's traceback)


def _num_workers(wanted: int, total_bytes: int) -> int:
    if wanted:
        return wanted
    if total_bytes < _POOL_BYTES:
        return 1
    from ee_llm import distributed

    return distributed.num_cores()


def _progress(is_shown: bool) -> Progress:
    columns: Sequence[TextColumn | BarColumn | TimeRemainingColumn] = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=not (is_shown and console.is_terminal))
