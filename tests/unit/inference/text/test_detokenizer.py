"""Test incremental detokenization: whole characters, stop strings, special tokens."""

import random
from pathlib import Path

import pytest

from ee_llm.data.tokenization.tokenizer import BytesTokenizer, load_tokenizer
from ee_llm.inference.text.detokenizer import GeneratedText
from tests.unit.data.tokenization.families import FAMILIES, write_family

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
TEXTS = [
    "plain",
    "naïve – 日本 🙂",
    "line\nline\n",
    "🙂",
    "  two  spaces\n\n x",
    "a\ufffdb",
    " 日",
    "é é",
]


def generated_text(detokenize, prompt, tokens, stops=(), special=None) -> GeneratedText:
    return GeneratedText(detokenize, prompt, stops, special).complete(tokens)


@pytest.mark.parametrize("text", TEXTS)
def test_characters_are_not_split(text: str) -> None:
    tokenizer = BytesTokenizer()
    prompt, tokens = tokenizer.encode("Ünï "), tokenizer.encode(text)
    pieces = generated_text(tokenizer.decode, prompt, tokens).pieces
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text
    if UNKNOWN not in text:
        assert pieces == [p for c in text for p in [""] * (len(c.encode()) - 1) + [c]]


def test_invalid_bytes_become_replacement_characters() -> None:
    tokenizer = BytesTokenizer()

    def pieces(*tokens: int) -> list[str]:
        return generated_text(tokenizer.decode, [65], tokens).pieces

    assert pieces(0xE2, 66, 0xE2, tokenizer.eos_token_id) == ["", f"{UNKNOWN}B", "", UNKNOWN]
    assert pieces(0xE2, 0x82) == ["", UNKNOWN]
    assert "".join(pieces(*[0xE2] * 40, 67)) == UNKNOWN * 40 + "C"


def test_a_character_begun_by_the_prompt_is_completed() -> None:
    tokenizer = BytesTokenizer()
    assert generated_text(tokenizer.decode, [65, 0xC3], [0xA9, 66]).pieces == ["é", "B"]


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_join_to_the_text(name: str, tmp_path: Path) -> None:
    """Test every family, including byte fallback, after text and after special tokens."""
    tokenizer = load_tokenizer(write_family(name, tmp_path) / "tokenizer.json")
    special = FAMILIES[name].special
    for text in [*TEXTS, special]:
        for start in ("A prompt: ", "日", special):
            prompt = tokenizer.encode(start, parse_special=True)
            tokens = tokenizer.encode(text, parse_special=text == special)
            whole = tokenizer.decode([*prompt, *tokens])
            expected = whole[len(tokenizer.decode(prompt)) :]
            found = generated_text(tokenizer.decode, prompt, tokens)
            assert found.text == "".join(found.pieces) == expected, (text, start)


@pytest.mark.parametrize("name", ["llama-2", "gemma", "qwen-2.5"])
def test_pieces_of_random_tokens_join_to_the_text(name: str, tmp_path: Path) -> None:
    """A model may emit bytes in any order, and printed text must not change."""
    tokenizer = load_tokenizer(write_family(name, tmp_path) / "tokenizer.json")
    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(tokenizer.vocab_size) for _ in range(20)]
        text = GeneratedText(tokenizer.decode, tokenizer.encode("a"))
        shown = ""
        for token in tokens:
            text.add(token)
            assert text.text.startswith(shown)
            shown = text.text
        text.finish()
        assert text.text == "".join(text.pieces)
        assert text.text.startswith(shown)


def test_the_time_per_token_does_not_grow_with_the_text() -> None:
    """Compare the number of decoded tokens for texts of 300 and 3,000 tokens."""
    tokenizer, counts = BytesTokenizer(), []
    for num_tokens in (300, 3000):
        num_decoded = 0

        def decode(ids: list[int]) -> str:
            nonlocal num_decoded
            num_decoded += len(ids)
            return tokenizer.decode(ids)

        generated_text(
            decode, tokenizer.encode("p" * 5000), tokenizer.encode("ab é" * 750)[:num_tokens]
        )
        counts.append(num_decoded / num_tokens)
    assert counts[1] < 1.1 * counts[0] < 20


def test_the_text_ends_before_the_first_stop_string() -> None:
    tokenizer = BytesTokenizer()
    text = GeneratedText(tokenizer.decode, [65], ["cde", "def"])
    safe = []
    for token in tokenizer.encode("abcd"):
        text.add(token)
        safe.append(text.num_safe)
    assert (text.is_stopped, safe) == (False, [0, 0, 1, 2])
    text.add(ord("e"))
    assert (text.is_stopped, text.text, text.num_safe) == (True, "ab", 2)
    assert text.pieces == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("stops", [(), ("cde",), ("never", "😀x")])
def test_texts_taken_join_to_the_text(stops: tuple[str, ...]) -> None:
    tokenizer = BytesTokenizer()
    text = GeneratedText(tokenizer.decode, [65], stops)
    taken = ""
    for token in [*tokenizer.encode("abc😀def abcde fgh"), 0xE2]:
        text.add(token)
        taken += text.take_text()
        assert (taken, len(text.text)) == (text.text[: text.num_safe], text.num_characters)
    text.finish()
    taken += text.take_text(is_last=True)
    assert taken == text.text
    assert text.take_text(is_last=True) == ""


def test_a_stop_string_matches_special_tokens_without_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_family("qwen-2.5", tmp_path) / "tokenizer.json")
    tokens = tokenizer.encode("Hello<|im_end|>\nthere<|endoftext|> x", parse_special=True)
    special = {i: text for text, i in tokenizer.special_tokens.items()}

    def cut(*stops: str) -> tuple[str, bool]:
        mentioned = {i: t for i, t in special.items() if any(t in stop for stop in stops)}
        found = generated_text(tokenizer.decode, [5], tokens, stops, mentioned)
        return found.text, found.is_stopped

    assert cut("<|im_end|>") == ("Hello", True)
    assert cut("<|im_end|>\nth") == ("Hello", True)
    assert cut("lo<|im_end|>") == ("Hel", True)
    assert cut("<|endoftext|>") == ("Hello\nthere", True)
    assert cut("<|im_start|>") == ("Hello\nthere x", False)
    assert cut("o\nt", "<|endoftext|>") == (
        "Hell",
        True,
    )  # across a token that is in no stop string
