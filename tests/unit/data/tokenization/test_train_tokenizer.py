"""Training a SentencePiece tokenizer."""

import gzip
import math
import os
from pathlib import Path

import pytest
import sentencepiece

from ee_llm.data.documents import find_sources
from ee_llm.data.tokenization import train_tokenizer as module
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from ee_llm.data.tokenization.train_tokenizer import (
    TrainTokenizerOptions,
    train_sentencepiece,
    train_tokenizer,
)


def test_same_text_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The model must not depend on the paths of text and model or the number of cores."""
    text = "for item in items:\n    total += item.price * item.count\n" * 5
    models = []
    for name in ("one", "three"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
        output = folder / f"{name}.model"
        monkeypatch.setattr(os, "cpu_count", lambda name=name: len(name))
        report = train_tokenizer(TrainTokenizerOptions((folder,), output, 300, suffixes=(".py",)))
        assert (report.vocab_size, report.num_documents) == (300, 1)
        models.append(output.read_bytes())
    assert models[0] == models[1]
    assert str(tmp_path).encode() not in models[0]


def test_indentation_is_learned(sentencepiece_model: Path):
    """Eight spaces must not be eight tokens, and a tab must be one, even if not in the text."""
    tokenizer = load_tokenizer(sentencepiece_model)
    assert len(tokenizer.encode(" " * 8)) == 2
    newline, tab = tokenizer.encode("\n"), tokenizer.encode("\t")
    assert len(newline) == len(tab) == 1
    assert tokenizer.encode("a\n\tb") == [
        *tokenizer.encode("a"), *newline, *tab, *tokenizer.encode("b")
    ]  # fmt: skip


def test_long_lines_are_used(tmp_path: Path):
    """The trainer silently drops lines beyond a limit, so long lines are split first."""
    train_sentencepiece(["wordword " * 20_000], 268, tmp_path / "long.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "long.model"))
    assert "word" in [model.id_to_piece(i) for i in range(268)]


def test_large_input_is_sampled_evenly(tmp_path: Path):
    """A limit of three of ten documents samples the entire input, not its beginning."""
    lines = ['{"text": "%s"}\n' % (letter * 20) for letter in "abcdefghij"]
    path = tmp_path / "letters.jsonl"
    path.write_text("".join(lines))
    output = tmp_path / "letters.model"
    megabytes = 3.01 * len(lines[0]) / 1e6
    report = train_tokenizer(TrainTokenizerOptions((path,), output, 264, max_megabytes=megabytes))
    assert report.num_documents == 3
    model = sentencepiece.SentencePieceProcessor(model_file=str(output))
    pieces = {model.id_to_piece(i) for i in range(model.vocab_size())}
    assert [letter for letter in "abcdefghij" if letter in pieces] == ["d", "g", "j"]


def test_large_document_is_sampled_in_parts(tmp_path: Path):
    """A single text above the limit used to fail with 'no text to train a tokenizer on'."""
    path = tmp_path / "letters.txt"
    path.write_text("".join(letter * 20_000 for letter in "abcdefghij"))
    output = tmp_path / "letters.model"
    report = train_tokenizer(TrainTokenizerOptions((path,), output, 270, max_megabytes=0.1))
    assert report.num_documents == 1
    model = sentencepiece.SentencePieceProcessor(model_file=str(output))
    pieces = "".join(model.id_to_piece(i) for i in range(model.vocab_size()))
    assert set("abcdefghij") <= set(pieces)  # From the entire text.
    (text,) = module._sample(find_sources([path]).files, "text", 100_000)
    assert 90_000 < len(text) <= 100_100


def test_limit_is_on_decompressed_text(tmp_path: Path):
    """A .gz file of 100 bytes with 20,000 bytes of text gives the same sample as plain text."""
    lines = "".join('{"text": "%s"}\n' % (letter * 2000) for letter in "abcdefghij").encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl", "a.jsonl.gz"):
        sources = find_sources([tmp_path / name]).files
        texts = list(module._sample(sources, "text", 3 * len(lines) // 10))
        assert [text[0] for text in texts] == ["d", "g", "j"]


@pytest.mark.parametrize(
    ("text", "vocab_size", "message"),
    [
        ("hello world\n", 4096, r"--vocab-size 4096 .*at most \d+, or more text"),
        ("hello world\n", 200, r"--vocab-size 200 .* need \d+"),
        ("\n\n", 300, "no text to train a tokenizer on"),
    ],
)
def test_text_that_does_not_fit_the_vocabulary_size(
    tmp_path: Path, text: str, vocab_size: int, message: str
):
    path = tmp_path / "a.txt"
    path.write_text(text)
    output = tmp_path / "a.model"
    output.write_bytes(b"existing")
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TrainTokenizerOptions((path,), output, vocab_size))
    assert output.read_bytes() == b"existing"
    assert sorted(os.listdir(tmp_path)) == ["a.model", "a.txt"]


def test_error_in_a_document_is_raised(tmp_path: Path):
    """The library iterates over the documents in C++, where an exception could be lost."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"body": "no"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: no key 'text'"):
        train_tokenizer(TrainTokenizerOptions((path,), tmp_path / "bad.model", 300))


def test_invalid_options(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    with pytest.raises(ValueError, match=r"a\.bin must end with \.model"):
        train_tokenizer(TrainTokenizerOptions((path,), tmp_path / "a.bin"))
    for size in (0.0, -1.0, math.nan, math.inf):
        options = TrainTokenizerOptions((path,), tmp_path / "a.model", max_megabytes=size)
        with pytest.raises(ValueError, match=f"--max-megabytes {size} must be above 0"):
            train_tokenizer(options)
    (tmp_path / "b.model").mkdir()
    with pytest.raises(ValueError, match=r"output .*b\.model is a folder"):
        train_tokenizer(TrainTokenizerOptions((path,), tmp_path / "b.model"))
    with pytest.raises(ValueError, match=r"a\.txt/b\.model cannot be written"):
        train_tokenizer(TrainTokenizerOptions((path,), path / "b.model"))
