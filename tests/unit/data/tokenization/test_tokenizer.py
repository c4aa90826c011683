"""Tokenizers: lossless round trips, and no special tokens from ordinary text."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ee_llm.data.tokenization.tokenizer import Tokenizer, load_tokenizer

KINDS = ("bytes", "sentencepiece", "huggingface")

# Known problems of tokenizers: the space symbol, NUL, carriage returns, leading and doubled spaces,
# byte-order marks, the text of special and byte tokens, joined emoji, decomposed letters, ligatures
# and characters not seen in training.
HARD_TEXTS = [
    "",
    " ",
    "  a  b ",
    "\u2581",
    "a\u2581b\u2581\u2581 c",
    "a\0b",
    "x\r\n\ty\n\n",
    "\ufeffx",
    "<eod></s><|endoftext|><unk><pad><0x0A>",
    "\u2047 \u2585",
    "\U0001f600\u200d\U0001f525",
    "e\u0301 \ufb01 \u00a0\u3000\x85\x0c",
    "日本語のコメント",
]


@pytest.fixture(scope="session", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, sentencepiece_model: Path, huggingface_json: Path
) -> Tokenizer:
    specs = {"sentencepiece": sentencepiece_model, "huggingface": huggingface_json}
    return load_tokenizer(specs.get(request.param, request.param))


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_round_trip_of_difficult_texts(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids  # The post-processor of the last of KINDS adds one.
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=100)
@given(text=st.text(" \t\n\u2581ab<>=eod日"))
def test_round_trip_of_any_white_space(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_text_is_not_truncated(tokenizer: Tokenizer):
    text = "return width * height\n" * 100
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_short_text_is_not_padded(tokenizer: Tokenizer):
    assert tokenizer.encode("") == []
    assert len(tokenizer.encode("x")) == 1


def test_unpaired_surrogate(tokenizer: Tokenizer):
    """JSON can escape one, and the libraries raise RuntimeError or TypeError for it."""
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_eos_has_no_text(tokenizer: Tokenizer):
    ids = tokenizer.encode("one")
    assert (
        tokenizer.decode([*ids, tokenizer.eos_token_id, *ids, tokenizer.eos_token_id]) == "oneone"
    )


def test_incomplete_character_is_a_replacement_character(tokenizer: Tokenizer):
    """Generation decodes after every token; an incomplete character must not raise."""
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]).strip("\N{REPLACEMENT CHARACTER}") == ""


@pytest.mark.parametrize("token", [-1, 10_000])
def test_id_outside_the_vocabulary(tokenizer: Tokenizer, token: int):
    with pytest.raises(ValueError, match=f"token id {token} is outside"):
        tokenizer.decode([0, token])


def test_sizes_and_eos(sentencepiece_model: Path, huggingface_json: Path):
    assert (load_tokenizer("bytes").vocab_size, load_tokenizer("bytes").eos_token_id) == (257, 256)
    sentencepiece = load_tokenizer(sentencepiece_model)
    assert (sentencepiece.vocab_size, sentencepiece.eos_token_id) == (330, 1)
    huggingface = load_tokenizer(huggingface_json)
    assert (huggingface.vocab_size, huggingface.eos_token_id) == (300, 1)


def test_fingerprints_distinguish_tokenizers(
    sentencepiece_model: Path, huggingface_json: Path, tmp_path: Path
):
    changed = tmp_path / "tokenizer.json"
    changed.write_bytes(huggingface_json.read_bytes() + b"\n")
    specs = ["bytes", sentencepiece_model, huggingface_json, changed]
    assert len({load_tokenizer(spec).fingerprint for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.model", None, r"absent\.model cannot be read: No such file"),
        ("absent.json", None, r"absent\.json cannot be read: No such file"),
        ("empty.model", b"", r"empty\.model is not a SentencePiece model"),
        ("text.model", b"hello, this is text", r"text\.model is not a SentencePiece model"),
        ("empty.json", b"", r"empty\.json is not a tokenizer\.json"),
        ("other.json", b'{"a": 1}', r"other\.json is not a tokenizer\.json"),
        ("latin.json", b"\xe9", r"latin\.json is not a tokenizer\.json"),
        ("vocab.txt", b"a", r"vocab\.txt' is not supported"),
    ],
)
def test_invalid_files(tmp_path: Path, name: str, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / name)


def test_directory_with_two_files(tmp_path: Path):
    (tmp_path / "a.model").touch()
    (tmp_path / "b.json").touch()
    with pytest.raises(ValueError, match=r"expected one file in the directory, found a\.model, b"):
        load_tokenizer(tmp_path)


def test_no_eos(tmp_path: Path):
    """A model without end-of-document token can be used, but data cannot be prepared for it."""
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "stop": 1}, "a")).save(str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_token_ids == ()
    with pytest.raises(ValueError, match=r"\(<eod>, <\|endoftext\|>, .*--eos-token"):
        _ = tokenizer.eos_token_id
    assert load_tokenizer(path, "stop").eos_token_id == 1
    assert load_tokenizer(path, "stop").eos_token_ids == (1,)
    with pytest.raises(ValueError, match="'halt', is not in the vocabulary"):
        _ = load_tokenizer(path, "halt").eos_token_id
    with pytest.raises(ValueError, match="'stop' cannot be used with the byte tokenizer"):
        load_tokenizer("bytes", "stop")


def test_model_that_adds_a_space(tmp_path: Path):
    """Llama models add a space before a text; the parts of a divided text must not get one each."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world"]),
        model_writer=model,
        vocab_size=275,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    path = tmp_path / "prefixed.model"
    path.write_bytes(model.getvalue())
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("hello\u2581world")) == "hello world"
    assert tokenizer.eos_token_id == 2  # </s>


def test_needs_neither_torch_nor_megatron():
    script = (
        "import sys, ee_llm.data.tokenization.tokenizer\n"
        "import ee_llm.data.prepare, ee_llm.data.statistics\n"
        "print([m for m in ('torch', 'megatron', 'sentencepiece') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "[]"
