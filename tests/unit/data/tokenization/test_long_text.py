"""Encoding long texts in chunks gives the ids of the entire text, for every tokenizer family."""

import random
from pathlib import Path
from typing import Any

import pytest

from ee_llm.data.tokenization import file_tokenizers, long_text
from ee_llm.data.tokenization.long_text import encode_long_text
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from tests.unit.data.tokenization.families import FAMILIES, TEXTS

pytestmark = pytest.mark.thorough

# Strings that a split can break, or that tokenizers treat specially at the start of a text.
PARTS = [
    *TEXTS[:4], " ", "  ", "\n", "\r\n", "\t", "      ", "aaaa", "ab", "12345", "e\u0301", "\u0301",
    "é", "日本語", "▁", "▁▁", "<s>", "<|im_end|>", "<tool_call>", "[INST]", "'s", "...", "!!",
    "\U0001f600", "\u200d", "ﬁ",
]  # fmt: skip


def random_text(draw: random.Random, size: int) -> str:
    parts: list[str] = []
    while sum(map(len, parts)) < size:
        if draw.random() < 0.3:
            parts.append(draw.choice(["the ", "of ", "capital ", "hello, "]) * draw.randint(1, 8))
        else:
            parts.append(draw.choice(PARTS) * draw.choice([1, 1, 1, 1, 2, 3, 40, 200]))
    return "".join(parts)


class RecordingEncoder:
    """The tokenizer of a family, which records the length of the longest text it encodes."""

    def __init__(self, family: str) -> None:
        self.model = FAMILIES[family].make()
        self.model.encode_special_tokens = True
        self.splits_words = type(self.model.model).__name__ == "BPE"
        self.longest = 0

    def __call__(self, text: str) -> Any:
        self.longest = max(self.longest, len(text))
        return self.model.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_give_the_ids_of_the_entire_text(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random text that is hard to split; without a safe split point, it is encoded at once."""
    monkeypatch.setattr(long_text, "_PROBE", 100)
    encode = RecordingEncoder(family)
    draw = random.Random(2)
    for size in (300, 1000) * 20:
        text = random_text(draw, 5000)
        ids = encode_long_text(encode, text, splits_words=encode.splits_words, size=size)
        assert ids == encode(text).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_text_is_encoded_in_chunks(family: str) -> None:
    encode = RecordingEncoder(family)
    text = " ".join(TEXTS) * 20
    ids = encode_long_text(encode, text, splits_words=encode.splits_words, size=4000)
    assert encode.longest == 4000
    assert ids == encode(text).ids


def test_word_longer_than_a_chunk() -> None:
    """Byte-pair encoding can be split at any token; a unigram model needs the entire word."""
    text = "a b " + "abcdefgh" * 2000
    for family, is_unsplit in (("gpt-2", False), ("unigram", True)):
        encode = RecordingEncoder(family)
        ids = encode_long_text(encode, text, splits_words=encode.splits_words, size=4000)
        assert (encode.longest == len(text)) == is_unsplit
        assert ids == encode(text).ids


def test_tokenizer_json_encodes_a_long_text_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAMILIES["gpt-2"].make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    text = " ".join(TEXTS) * 20
    expected = tokenizer.encode(text)
    sizes = []

    def in_chunks(encode: Any, text: str, *, splits_words: bool, size: int) -> list[int]:
        def counted(part: str) -> Any:
            sizes.append(len(part))
            return encode(part)

        assert splits_words
        return encode_long_text(counted, text, splits_words=splits_words, size=size)

    monkeypatch.setattr(file_tokenizers, "CHUNK", 5000)
    monkeypatch.setattr(file_tokenizers, "encode_long_text", in_chunks)
    assert tokenizer.encode(text) == expected
    assert max(sizes) == 5000
