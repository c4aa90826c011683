"""`ee-llm data train-tokenizer`: train a SentencePiece tokenizer, reproducibly."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ee_llm.atomic_file import open_output
from ee_llm.data.documents import (
    DEFAULT_EXCLUDE,
    Format,
    Skipped,
    Source,
    decode_document,
    describe_skipped,
    find_sources,
    raw_documents,
)
from ee_llm.errors import DataError

_MAX_MEGABYTES = 1_000_000.0  # the trainer keeps the text in memory
_MAX_VOCAB_SIZE = 10_000_000  # ten times the largest in use; the trainer uses 32-bit integers
_MAX_PARTS = 1000
_MAX_LINE = 4096  # characters; the trainer's time grows superlinearly with the line length


@dataclass(frozen=True)
class TrainTokenizerOptions:
    """Train a SentencePiece tokenizer (byte-pair encoding with byte fallback) on texts."""

    inputs: tuple[Path, ...]
    """Files or folders of JSON lines, JSON arrays, Parquet or plain text (one document per file),
    optionally compressed with gzip, bzip2, xz or zstd."""

    output: Path
    """File to write, for example data/tokenizer.model."""

    vocab_size: int = 32_000
    """Number of token ids, including 256 bytes and 2 special tokens."""

    key: str = "text"
    """Key of the text in JSON objects, or its column in Parquet files."""

    suffixes: tuple[str, ...] = ()
    """Read only files with these suffixes in folders, for example .py .md. Default: all files."""

    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    """Names of folders to skip, at any depth."""

    format: Format = "auto"
    """Format of the inputs. auto: detect it from the file name and, for .json and Parquet, from the
    content."""

    max_megabytes: float = 200.0
    """Maximum amount of decompressed text to train on, in millions of bytes. From a larger input,
    evenly spaced documents are used, and parts of a document that exceeds the limit."""


class TrainTokenizerReport(NamedTuple):
    """Summary of the file that `train_tokenizer` wrote; `str` gives a readable text."""

    path: Path
    vocab_size: int
    num_documents: int
    skipped: tuple[Skipped, ...] = ()
    """Files and links in input folders that were skipped."""

    def __str__(self) -> str:
        skipped = f"\n{describe_skipped(self.skipped)}" if self.skipped else ""
        sizes = f"{self.vocab_size:,} tokens, from {self.num_documents:,} documents"
        return f"{self.path}: {sizes}{skipped}"


def train_tokenizer(options: TrainTokenizerOptions) -> TrainTokenizerReport:
    """Train a tokenizer and return a summary; raises DataError for invalid options."""
    if options.output.suffix != ".model":
        raise DataError(f"output {options.output} must end with .model. Change --output.")
    if not 0 < options.max_megabytes <= _MAX_MEGABYTES:
        raise DataError(
            f"--max-megabytes {options.max_megabytes} must be above 0 and at most "
            f"{_MAX_MEGABYTES:,}."
        )
    if not 1 <= options.vocab_size <= _MAX_VOCAB_SIZE:
        raise DataError(f"--vocab-size {options.vocab_size} must be from 1 to {_MAX_VOCAB_SIZE:,}.")
    sources, skipped = find_sources(
        options.inputs, options.suffixes, options.exclude, options.format
    )
    num_documents = 0

    def documents() -> Iterator[str]:
        nonlocal num_documents
        for text in _sample(sources, options.key, int(options.max_megabytes * 1e6)):
            num_documents += 1
            yield text

    train_sentencepiece(documents(), options.vocab_size, options.output)
    return TrainTokenizerReport(options.output, options.vocab_size, num_documents, tuple(skipped))


def _sample(sources: Sequence[Source], key: str, limit: int) -> Iterator[str]:
    """Yield evenly spaced documents of `sources` with about `limit` bytes in total.

    A document of more than `limit` bytes contributes evenly spaced parts.
    """
    total = _num_text_bytes(sources, key)
    seen = taken = 0
    for raw in raw_documents(sources, key):
        size = len(raw.data)
        seen += size
        budget = size if total <= limit else limit * seen // total - taken
        if budget >= size:
            taken += size
            yield decode_document(raw, key)
        elif size > limit and budget > 0:
            taken += budget
            yield _parts(decode_document(raw, key), budget / size)


def _num_text_bytes(sources: Sequence[Source], key: str) -> int:
    """Return the total size of the documents, reading compressed files to measure them."""
    plain = sum(source.num_bytes for source in sources if not source.is_compressed)
    compressed = [source for source in sources if source.is_compressed]
    return plain + sum(len(raw.data) for raw in raw_documents(compressed, key))


def _parts(text: str, share: float) -> str:
    """Return about this share of `text` as evenly spaced parts, each on its own line."""
    num_parts = max(1, min(_MAX_PARTS, int(len(text) * share) // _MAX_LINE))
    step = len(text) / num_parts
    starts = [int(number * step) for number in range(num_parts)]
    return "\n".join(text[start : start + max(1, int(step * share))] for start in starts)


def train_sentencepiece(documents: Iterable[str], vocab_size: int, path: Path) -> None:
    """Write a SentencePiece model trained on `documents` to `path`.

    Decoding the encoding of any text returns the same text: there is no normalization, white space
    is kept, and newlines, tabs and rare characters are encoded as bytes. `<eod>` ends documents and
    is never produced from text. Equal documents give an equal file.

    Raises:
        DataError: `vocab_size` is too large or too small for the documents.
    """
    import sentencepiece

    model = io.BytesIO()
    with open_output(path) as file:  # Open first, to fail early if it cannot be written.
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_lines(documents),
                model_writer=model,
                # Compared with unigram, byte-pair encoding has as many bytes per token on source
                # code and takes a tenth of the training time.
                model_type="bpe",
                vocab_size=vocab_size,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                character_coverage=0.9995,
                unk_id=0,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                control_symbols=["<eod>"],
                # The model file contains both values, so changing one changes the file.
                num_threads=1,
                max_sentence_length=4 * _MAX_LINE,  # bytes
                minloglevel=2,
            )
        except RuntimeError as error:
            raise DataError(_explain(str(error), vocab_size)) from error
        file.write(model.getvalue())
        file.commit()


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """Yield lines of bounded length without NUL, as the trainer requires."""
    for text in documents:
        for line in text.replace("\0", "\n").split("\n"):
            for start in range(0, len(line), _MAX_LINE):
                yield line[start : start + _MAX_LINE]


def _explain(message: str, vocab_size: int) -> str:
    """Return a user error for an error of the trainer."""
    if match := re.search(r"value <= (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too large for so little or so uniform text. Use at most "
            f"{match[1]}, or more text."
        )
    if match := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too small: the characters of the text need {match[1]} "
            "tokens. Raise it."
        )
    if "sentences_.empty()" in message:
        return "the inputs have no text to train a tokenizer on. Give other --inputs."
    return f"training the tokenizer failed: {message}"
