"""Long texts in pieces: the ids of the whole text, for tokenizers of every family."""

import random
from pathlib import Path
from typing import Any

import pytest

from ee_llm.data.tokenization import file_tokenizers, long_text
from ee_llm.data.tokenization.long_text import encode_long_text
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from tests.unit.data.tokenization.families import FAMILIES, TEXTS

# What a cut may tear apart, or what a tokenizer treats specially at the start of a text.
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


class Counted:
    """A family's tokenizer, which remembers the longest text that it was given at once."""

    def __init__(self, family: str) -> None:
        self.model = FAMILIES[family].make()
        self.model.encode_special_tokens = True
        self.splits_words = type(self.model.model).__name__ == "BPE"
        self.longest = 0

    def __call__(self, text: str) -> Any:
        self.longest = max(self.longest, len(text))
        return self.model.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_give_the_ids_of_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text made to be hard to cut; where no place is certain, it is encoded whole."""
    monkeypatch.setattr(long_text, "_PROBE", 100)
    encode = Counted(family)
    draw = random.Random(2)
    for size in (300, 1000) * 20:
        text = random_text(draw, 5000)
        found = encode_long_text(encode, text, splits_words=encode.splits_words, size=size)
        assert found == encode(text).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_text_is_never_encoded_whole(family: str) -> None:
    encode = Counted(family)
    text = " ".join(TEXTS) * 20
    found = encode_long_text(encode, text, splits_words=encode.splits_words, size=4000)
    assert encode.longest == 4000
    assert found == encode(text).ids


def test_a_word_that_is_longer_than_a_piece() -> None:
    """Byte-pair encoding may be cut at any token; a unigram model needs the whole word."""
    text = "a b " + "abcdefgh" * 2000
    for family, is_whole in (("gpt-2", False), ("unigram", True)):
        encode = Counted(family)
        found = encode_long_text(encode, text, splits_words=encode.splits_words, size=4000)
        assert (encode.longest == len(text)) == is_whole
        assert found == encode(text).ids


def test_a_tokenizer_json_encodes_a_long_text_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FAMILIES["gpt-2"].make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    text = " ".join(TEXTS) * 20
    whole = tokenizer.encode(text)
    sizes = []

    def in_pieces(encode: Any, text: str, *, splits_words: bool, size: int) -> list[int]:
        def counted(part: str) -> Any:
            sizes.append(len(part))
            return encode(part)

        assert splits_words
        return encode_long_text(counted, text, splits_words=splits_words, size=size)

    monkeypatch.setattr(file_tokenizers, "PIECE", 5000)
    monkeypatch.setattr(file_tokenizers, "encode_long_text", in_pieces)
    assert tokenizer.encode(text) == whole
    assert max(sizes) == 5000
