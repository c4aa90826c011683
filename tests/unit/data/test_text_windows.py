"""Windows of text files equal those of the data prepared from them, and are read as needed."""

import gzip
import json
from pathlib import Path

import pytest

from ee_llm.data.prepare import PrepareOptions, prepare
from ee_llm.data.text_windows import TextWindows
from ee_llm.data.tokenization.tokenizer import BytesTokenizer
from ee_llm.data.windows import Windows
from ee_llm.errors import DataError

TEXTS = ["one two three " * 9, "", "four", "five six", "é" * 30, "seven eight\n" * 4]


class Counting(BytesTokenizer):
    """A byte tokenizer that counts the characters that it encodes."""

    def __init__(self) -> None:
        self.num_characters = 0

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        self.num_characters += len(text)
        return super().encode(text, parse_special)


def windows(path: Path, seq_length: int, num_tokens: int | None = None) -> list[list[int]]:
    found = TextWindows([path], BytesTokenizer(), seq_length, num_tokens)
    return [window.tolist() for window in found]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with JSON lines, compressed text and plain text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"compressed " * 20))
    (folder / "c.txt").write_text("plain")
    return folder


@pytest.mark.parametrize("seq_length", [1, 5, 64, 1000])
def test_windows_equal_those_of_prepared_data(tmp_path: Path, files: Path, seq_length: int) -> None:
    prepare(PrepareOptions((files,), tmp_path / "data", progress=False))
    whole = Windows([str(tmp_path / "data")], seq_length, None)
    total = whole.num_tokens
    for num_tokens in (None, 1, 63, 64, 65, total - 1, total, total + 9):
        expected = Windows([str(tmp_path / "data")], seq_length, num_tokens)
        assert windows(files, seq_length, num_tokens) == [w.tolist() for w in expected], num_tokens


def test_number_of_tokens_is_exact_after_all_text_is_read(files: Path) -> None:
    found = TextWindows([files], BytesTokenizer(), 16, None)
    num_tokens = sum(len(window) - 1 for window in found)
    assert found.num_tokens == num_tokens
    limited = TextWindows([files], BytesTokenizer(), 16, 20)
    assert limited.num_tokens == 20


@pytest.mark.parametrize("character", ["a", "é"])
def test_only_the_start_of_a_long_text_is_encoded(tmp_path: Path, character: str) -> None:
    """A gigabyte of text would take minutes for a hundred tokens."""
    path = tmp_path / "long.txt"
    path.write_text(character * 100_000)
    tokenizer = Counting()
    found = [*TextWindows([path], tokenizer, 32, 100)]
    assert sum(len(window) - 1 for window in found) == 100
    assert tokenizer.num_characters < 10_000


def test_a_longer_start_is_encoded_if_it_has_too_few_tokens(tmp_path: Path) -> None:
    """A tokenizer may have tokens for long runs of blanks."""

    class Sparse(Counting):
        def encode(self, text: str, parse_special: bool = False) -> list[int]:
            return super().encode(text)[::200]

    path = tmp_path / "long.txt"
    path.write_text("0123456789" * 20_000)
    found = TextWindows([path], Sparse(), 32, 100)
    assert sum(len(window) - 1 for window in found) == 100


def test_nothing_to_predict(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"text .*empty\.jsonl .*there is nothing to predict"):
        windows(path, 8)
