"""`ee-llm data train-tokenizer`: a SentencePiece vocabulary from texts, the same on every run."""

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
_MAX_VOCAB_SIZE = 10_000_000  # ten times the largest in use; the trainer counts in 32 bits
_MAX_PARTS = 1000
_MAX_LINE = 4096  # characters; the trainer's time grows faster than the length of a line


@dataclass(frozen=True)
class TrainTokenizerOptions:
    """Train a SentencePiece tokenizer (byte-pair encoding with byte fallback) on texts."""

    inputs: tuple[Path, ...]
    """Files of JSON lines, JSON arrays, Parquet or plain text (one document each), compressed with
    gzip, bzip2, xz or zstd or not, and folders of them."""

    output: Path
    """File to write, for example data/tokenizer.model."""

    vocab_size: int = 32_000
    """Number of token ids, the 256 bytes and 2 special ones included."""

    key: str = "text"
    """Key of the text in JSON objects, or its column in Parquet files."""

    suffixes: tuple[str, ...] = ()
    """Read only files with these endings in a folder, for example .py .md; default: every file."""

    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    """Names of folders that are left out, at any depth."""

    format: Format = "auto"
    """What the inputs are; auto goes by the name and, for .json and Parquet, by the content."""

    max_megabytes: float = 200.0
    """Decompressed text to learn from, in millions of bytes. Of a larger input, documents are taken
    at even distances, and parts of a document that is larger by itself."""


class TrainTokenizerReport(NamedTuple):
    """What `train_tokenizer` wrote; as text, one line for people."""

    path: Path
    vocab_size: int
    num_documents: int
    skipped: tuple[Skipped, ...] = ()
    """What was left out of the folders among the inputs."""

    def __str__(self) -> str:
        skipped = f"\n{describe_skipped(self.skipped)}" if self.skipped else ""
        made_of = f"{self.vocab_size:,} tokens, from {self.num_documents:,} documents"
        return f"{self.path}: {made_of}{skipped}"


def train_tokenizer(options: TrainTokenizerOptions) -> TrainTokenizerReport:
    """Return what was written for `options`; raises DataError for what is wrong with them."""
    if options.output.suffix != ".model":
        raise DataError(f"output {options.output}: the file's name must end with .model")
    if not 0 < options.max_megabytes <= _MAX_MEGABYTES:
        raise DataError(
            f"--max-megabytes {options.max_megabytes}: give a number above 0 and up to "
            f"{_MAX_MEGABYTES:,}"
        )
    if not 1 <= options.vocab_size <= _MAX_VOCAB_SIZE:
        raise DataError(
            f"--vocab-size {options.vocab_size}: give a number from 1 to {_MAX_VOCAB_SIZE:,}"
        )
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
    """Yield documents of about `limit` bytes, at even distances over `sources`.

    A document of more than `limit` bytes by itself contributes parts, at even distances too.
    """
    total = _num_text_bytes(sources, key)
    seen = taken = 0
    for raw in raw_documents(sources, key):
        size = len(raw.data)
        seen += size
        room = size if total <= limit else limit * seen // total - taken
        if room >= size:
            taken += size
            yield decode_document(raw, key)
        elif size > limit and room > 0:
            taken += room
            yield _parts(decode_document(raw, key), room / size)


def _num_text_bytes(sources: Sequence[Source], key: str) -> int:
    """Return the size of all documents; compressed ones are read for it."""
    plain = sum(source.num_bytes for source in sources if not source.is_compressed)
    compressed = [source for source in sources if source.is_compressed]
    return plain + sum(len(raw.data) for raw in raw_documents(compressed, key))


def _parts(text: str, share: float) -> str:
    """Return about this share of `text`, in lines of its own from all over it."""
    num_parts = max(1, min(_MAX_PARTS, int(len(text) * share) // _MAX_LINE))
    step = len(text) / num_parts
    starts = [int(number * step) for number in range(num_parts)]
    return "\n".join(text[start : start + max(1, int(step * share))] for start in starts)


def train_sentencepiece(documents: Iterable[str], vocab_size: int, path: Path) -> None:
    """Write a SentencePiece model trained on `documents` to `path`.

    Whatever the text, the model gives it back unchanged: no normalization, white space kept as it
    is, and bytes for newlines, tabs and characters that were too rare to learn. `<eod>` ends
    documents and is never found in a text. Equal documents give an equal file.
    Raises DataError if the documents do not suffice for `vocab_size`, or it not for them.
    """
    import sentencepiece

    model = io.BytesIO()
    with open_output(path) as file:  # opened first: an output that can not be written costs no time
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_lines(documents),
                model_writer=model,
                # Byte-pair encoding rather than unigram: as many bytes per token on source code,
                # and trained in a tenth of the time.
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
                # Both are written into the model: any other value changes the file.
                num_threads=1,
                max_sentence_length=4 * _MAX_LINE,  # bytes
                minloglevel=2,
            )
        except RuntimeError as error:
            raise DataError(_explained(str(error), vocab_size)) from error
        file.write(model.getvalue())
        file.commit()


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """Yield what the trainer can take: lines, of bounded length, without NUL."""
    for text in documents:
        for line in text.replace("\0", "\n").split("\n"):
            for start in range(0, len(line), _MAX_LINE):
                yield line[start : start + _MAX_LINE]


def _explained(message: str, vocab_size: int) -> str:
    """Return what the trainer's error means to the user."""
    if found := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size = {vocab_size}: the text is too short or too uniform for it; give at most "
            f"{found[1]}, or more text"
        )
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"vocab_size = {vocab_size}: the characters of the text alone need {found[1]}"
    if "sentences_.empty()" in message:
        return "no text to train a tokenizer on: the documents are empty"
    return f"training the tokenizer failed: {message}"
