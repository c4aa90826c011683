"""`ee-llm data prepare`: tokenize texts into Megatron's `.bin` and `.idx` files in parallel.

The output depends only on the inputs and the tokenizer: it is the same for any number of workers.
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

from ee_llm.atomic_file import AtomicFile, open_output
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

_CHUNK_BYTES = 1 << 20  # of text: the unit of work of a worker
_MAX_WORKERS = 1024  # each needs memory for the tokenizer and its documents
_POOL_BYTES = 8 << 20  # with less text, starting worker processes takes longer than it saves

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class PrepareOptions:
    """Tokenize texts into the files that training reads: PREFIX.bin and PREFIX.idx."""

    inputs: tuple[Path, ...]
    """Files or folders of JSON lines, JSON arrays, Parquet or plain text (one document per file),
    optionally compressed with gzip, bzip2, xz or zstd."""

    output: Path
    """Path of the files to write without .bin or .idx, for example data/corpus."""

    tokenizer: str = "bytes"
    """Tokenizer: 'bytes', or the path of a SentencePiece .model, a tokenizer.json, or a run
    directory or checkpoint to take the tokenizer from."""

    eos_token: str | None = None
    """Text of the token that ends a document. Default: the eos_token in the tokenizer_config.json
    next to the tokenizer, else the first common name that is in the vocabulary."""

    key: str = "text"
    """Key of the text in JSON objects, or its column in Parquet files."""

    suffixes: tuple[str, ...] = ()
    """Read only files with these suffixes in folders, for example .py .md. Default: all files."""

    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    """Names of folders to skip, at any depth."""

    format: Format = "auto"
    """Format of the inputs. auto: detect it from the file name and, for .json and Parquet, from the
    content."""

    append_eos: bool = True
    """Append an end-of-document token to each document."""

    workers: int = 0
    """Number of worker processes. 0: one per CPU core, or none for a small input."""

    progress: bool = True
    """Show a progress bar on standard error if it is a terminal."""


class PrepareReport(NamedTuple):
    """Summary of the files that `prepare` wrote; `str` gives a readable text."""

    prefix: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    """Bytes of UTF-8 text, before tokenization."""
    num_empty: int
    """Number of documents without text, which were skipped."""
    skipped: tuple[Skipped, ...] = ()
    """Files and links in input folders that were skipped."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, including end-of-document tokens."""
        return self.num_bytes / self.num_tokens

    def __str__(self) -> str:
        empty = f" ({self.num_empty:,} empty ones skipped)" if self.num_empty else ""
        skipped = f"\n{describe_skipped(self.skipped)}" if self.skipped else ""
        return (
            f"{self.prefix}.bin and .idx: {self.num_documents:,} documents{empty}, "
            f"{self.num_tokens:,} tokens, {self.bytes_per_token:.2f} bytes/token{skipped}"
        )


def prepare(options: PrepareOptions) -> PrepareReport:
    """Write PREFIX.bin and PREFIX.idx, and PREFIX.meta.json, which describes them.

    Existing files are replaced only if everything succeeds. A script must call this under
    `if __name__ == "__main__":`, as worker processes import the script.

    Returns:
        A summary of the files.

    Raises:
        UserError: An input, the tokenizer or the output is not valid. The message names the file
            and the line or byte.
    """
    if not 0 <= options.workers <= _MAX_WORKERS:
        raise DataError(f"--workers {options.workers} must be a number from 0 to {_MAX_WORKERS:,}.")
    tokenizer = load_tokenizer(options.tokenizer, options.eos_token)
    _ = tokenizer.eos_token_id  # Fail early: a tokenizer may have no such token.
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
            raise DataError(f"inputs {names} have no document with text. Give other --inputs.")
        commit(writer, options.output, tokenizer)
    return PrepareReport(
        str(options.output),
        writer.num_documents,
        writer.num_tokens,
        num_bytes,
        num_empty,
        tuple(skipped),
    )


def commit(
    writer: IndexedWriter, prefix: Path, tokenizer: Tokenizer, *files: AtomicFile, **more: object
) -> None:
    """Create the files of a writer and `PREFIX.meta.json`, which describes them.

    Args:
        writer: The writer.
        prefix: Its prefix.
        tokenizer: The tokenizer of its tokens.
        files: Other files to be created together with them.
        more: Further keys of the description.
    """
    description = {
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "num_documents": writer.num_documents,
        "num_tokens": writer.num_tokens,
        **more,
    }
    with open_output(Path(f"{prefix}.meta.json")) as file:
        file.write(json.dumps(description, indent=1).encode() + b"\n")
        writer.commit(file, *files)


def check_tokenizer(prefix: Path | str, tokenizer: Tokenizer) -> None:
    """Raise DataError if the data at `prefix` were prepared with another tokenizer.

    Data without a PREFIX.meta.json, which other tools write, cannot be checked and are accepted.
    """
    path = Path(f"{prefix}.meta.json")
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_bytes())
        fingerprint, num_tokens = content["tokenizer"], content["num_tokens"]
        # Version 0.1.0 called it "eod".
        eos_token_id = content["eos_token_id"] if "eos_token_id" in content else content["eod"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a description written by 'ee-llm data prepare'. Prepare the data "
            "again, or remove the file if another tool wrote the data."
        ) from error
    if num_tokens != IndexedTokens(prefix).num_tokens:
        raise DataError(
            f"{path} does not describe {prefix}.bin. Prepare the data again, or remove the file if "
            "another tool wrote the data."
        )
    for name, expected, actual in (
        ("tokenizer", tokenizer.fingerprint, fingerprint),
        ("end-of-document token", tokenizer.eos_token_id, eos_token_id),
    ):
        if actual != expected:
            raise DataError(
                f"data {prefix}: prepared with {name} {actual}, but data.tokenizer "
                f"({tokenizer.name}) has {expected}. Set data.tokenizer (and data.eos_token) to "
                "those of the data, or prepare the data again."
            )


_Chunk = tuple[RawDocument, ...]


class _Encoded(NamedTuple):
    """The tokens [t] of a chunk, the number of tokens of each document, and input sizes.

    `num_read` counts bytes of the input files on the disk, before decompression.
    """

    tokens: Tokens
    lengths: list[int]
    num_read: int
    num_bytes: int
    num_empty: int


def _chunks(documents: Iterable[RawDocument]) -> Iterator[_Chunk]:
    """Group documents by size only, so that chunks do not depend on the number of workers."""
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
    """Yield function(item) for each item, in order, computed by `workers` processes.

    With one worker, this process does all the work. Only a few items per worker are in memory, so
    that `items` may be larger than memory. Workers are killed when the caller stops early, and exit
    when this process dies.

    Args:
        function: A picklable function. A ValueError that it raises is raised here again, with the
            worker's traceback as its cause.
        items: Picklable arguments.
        workers: Number of processes.

    Raises:
        RunError: A worker was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    # Spawn: forking a process that has threads (progress bar, torch) can deadlock.
    context = multiprocessing.get_context("spawn")
    pending: deque[Future[_Result]] = deque()
    other_children = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    try:
        for item in items:
            with _interrupts_ignored() if not pending else nullcontext():
                pending.append(pool.submit(function, item))
            if len(pending) >= 4 * workers:
                yield _result(pending.popleft())
        while pending:
            yield _result(pending.popleft())
    except BrokenProcessPool as error:
        raise RunError(
            f"one of {workers} worker processes was killed, most likely because the machine ran "
            "out of memory. Use fewer --workers, or split documents of many megabytes."
        ) from error
    finally:
        if pending or sys.exc_info()[0] is not None:  # The remaining results are not needed.
            for worker in set(multiprocessing.active_children()) - other_children:
                worker.kill()
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Exit this worker when its parent dies, as it would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Start processes that ignore Ctrl-C. Their parent kills them then, without a traceback."""
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
        # Drop the frames of the pool: only the worker's traceback, which is the cause, is useful.
        raise error.with_traceback(None)  # noqa: B904  (its cause is the worker's traceback)


def _num_workers(requested: int, total_bytes: int) -> int:
    if requested:
        return requested
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
