"""Classes of tokens by their text, with several kinds of tokenizers."""

from pathlib import Path

import pytest
import torch

from ee_llm.data.tokenization.tokenizer import BytesTokenizer, load_tokenizer
from ee_llm.evaluation.probe.token_classes import CLASSES, token_class, token_classes
from tests.unit.data.tokenization.families import write_family


@pytest.mark.parametrize(
    ("previous", "text", "expected"),
    [
        ("", "The", "word start"),
        ("the", " quick", "word start"),
        ("qu", "ick", "word continuation"),
        ("(", "x", "word start"),
        ("\n", "def", "word start"),
        ("x2", "y", "word continuation"),
        (" caf", "é", "word continuation"),
        ("the", " 1984", "number"),
        ("1", "9", "number"),
        ("end", ".", "punctuation"),
        ("don", "'t", "punctuation"),
        ("a", " +=", "punctuation"),
        ("end.", "\n\n", "whitespace"),
        ("x", "    ", "whitespace"),
        ("x", "", "other"),
        ("x", "\N{REPLACEMENT CHARACTER}", "other"),
        ("x", "\x00", "other"),
    ],
)
def test_the_first_character_decides(previous: str, text: str, expected: str) -> None:
    assert token_class(previous, text) == expected


def test_bytes_and_ids_without_text() -> None:
    tokens = torch.tensor([*b"I am 7.", 256, *"é".encode(), 260])
    found = token_classes(BytesTokenizer(), tokens[:-1], tokens[1:])
    assert [CLASSES[index] for index in found] == [
        *("whitespace", "word start", "word continuation", "whitespace", "number", "punctuation"),
        *("other", "other", "other", "other"),
    ]


@pytest.mark.parametrize("family", ["llama-2", "qwen-2.5", "gpt-2", "unigram"])
def test_tokenizers_that_drop_the_first_space(tmp_path: Path, family: str) -> None:
    tokenizer = load_tokenizer(write_family(family, tmp_path / family) / "tokenizer.json")
    tokens = torch.tensor(tokenizer.encode("1 What is the capital of Italy?"))
    found = token_classes(tokenizer, tokens[:-1], tokens[1:]).tolist()
    assert found.count(CLASSES.index("word start")) == 6
