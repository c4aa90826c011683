"""The beginning-of-sequence token of each kind of tokenizer, which texts never contain."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from ee_llm.data.tokenization.tokenizer import load_tokenizer


def make_json(path: Path, single: str | None, bos: str = "<|begin_of_text|>") -> Path:
    """Write a byte-level tokenizer.json with the template `single` as its post-processor."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([bos, "<|endoftext|>"])
    if single is not None:
        ids = [(name, tokenizer.token_to_id(name)) for name in (bos, "<|endoftext|>")]
        # As in Llama 3: in a sequence, after a processor that adds no token.
        template = processors.TemplateProcessing(single=single, special_tokens=ids)
        parts = [processors.ByteLevel(trim_offsets=True), template]
        tokenizer.post_processor = processors.Sequence(parts)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    ("single", "adds"),
    [
        (None, False),
        ("<|begin_of_text|> $A", True),
        ("<|begin_of_text|> $A <|endoftext|>", True),
        ("$A <|endoftext|>", False),
    ],
)
def test_post_processor_that_adds_a_token(tmp_path, single, adds):
    tokenizer = load_tokenizer(make_json(tmp_path / "tokenizer.json", single))
    assert (tokenizer.bos_token_id, tokenizer.adds_bos) == (256, adds)
    assert tokenizer.encode("<|begin_of_text|>ab")[-2:] == tokenizer.encode("ab")
    assert tokenizer.bos_token_id not in tokenizer.encode("<|begin_of_text|>ab")
    assert tokenizer.encode("") == []


def test_unusual_name_is_known_from_the_post_processor(tmp_path):
    path = make_json(tmp_path / "tokenizer.json", "[X] $A", bos="[X]")
    assert load_tokenizer(path).bos_token_id == 256
    path = make_json(tmp_path / "tokenizer.json", None, bos="[X]")
    assert load_tokenizer(path).bos_token_id is None


def test_sentencepiece_does_not_add_its_token(sentencepiece_model):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(sentencepiece_model))
    tokenizer = load_tokenizer(sentencepiece_model)
    assert tokenizer.bos_token_id == (model.bos_id() if model.bos_id() >= 0 else None)
    assert not tokenizer.adds_bos


def test_byte_tokenizer_has_no_such_token():
    assert (load_tokenizer("bytes").bos_token_id, load_tokenizer("bytes").adds_bos) == (None, False)
