"""Test that prompts begin with the bos token as the tokenizer or --bos specifies."""

import json
from pathlib import Path

import pytest
import torch

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tokenizer import stated_bos
from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.cli.main import main
from tests.unit.data.tokenization.test_bos import make_json
from tests.unit.inference.models import random_tensors, tiny_config

BOS = 256


def save(output: Path, tokenizer: Path | str, settings: str | None = None) -> Path:
    config = tiny_config(vocab_size=330)
    tensors = random_tensors(config, dtype=torch.float32)
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    files = {} if settings is None else {"huggingface/tokenizer_config.json": settings.encode()}
    get = tensors.__getitem__
    return write_checkpoint(output, config, specs, get, tokenizer_file=str(tokenizer), files=files)


def prompt_tokens(capsys, checkpoint: Path, *options: str) -> list[int]:
    how = ["--prompt", "ab", "--max-tokens", "1", "--json", *options]
    assert main(["generate", "--checkpoint", str(checkpoint), *how]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["prompt"] == "ab"
    assert "".join(record["pieces"]) == record["text"]
    return record["prompt_token_ids"]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("settings", [None, "{}", '{"add_bos_token": null}'])
def test_auto_follows_the_tokenizer(tmp_path, capsys, adds, settings):
    single = "<|begin_of_text|> $A" if adds else "$A"
    checkpoint = save(tmp_path / "run", make_json(tmp_path / "tokenizer.json", single), settings)
    plain = prompt_tokens(capsys, checkpoint, "--bos", "off")
    assert len(plain) == 2
    assert prompt_tokens(capsys, checkpoint) == [BOS] * adds + plain
    assert prompt_tokens(capsys, checkpoint, "--bos", "on") == [BOS, *plain]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ('{"add_bos_token": true}', True),
        ('{"add_bos_token": false, "tokenizer_class": "LlamaTokenizer"}', False),
        ('{"tokenizer_class": "LlamaTokenizer"}', True),
        ('{"tokenizer_class": "Qwen2Tokenizer"}', None),
        (None, None),
    ],
)
def test_auto_follows_the_settings_of_the_model(tmp_path, capsys, settings, expected):
    """The settings of a Hugging Face model take precedence over tokenizer.json."""
    checkpoint = save(tmp_path / "run", make_json(tmp_path / "tokenizer.json", "$A"), settings)
    assert stated_bos(checkpoint) is expected
    assert (prompt_tokens(capsys, checkpoint)[0] == BOS) is bool(expected)


def test_sentencepiece(tmp_path, capsys):
    import sentencepiece

    (tmp_path / "text").write_text("a b c ab bc abc\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=270,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    settings = '{"tokenizer_class": "LlamaTokenizer"}'
    checkpoint = save(tmp_path / "run", tmp_path / "tokenizer.model", settings)
    found = prompt_tokens(capsys, checkpoint)
    assert found[0] == 1  # <s>
    assert found[1:] == prompt_tokens(capsys, checkpoint, "--bos", "off")


def test_a_line_of_a_batch_can_set_bos(tmp_path):
    file = make_json(tmp_path / "tokenizer.json", "<|begin_of_text|> $A")
    checkpoint = save(tmp_path / "run", file)
    lines = ['{"prompt": "ab", "id": "1"}', '{"prompt": "ab", "id": "2", "bos": "off"}']
    (tmp_path / "batch").write_text("\n".join(lines))
    files = ["--batch-file", str(tmp_path / "batch"), "--output", str(tmp_path / "out")]
    how = ["--checkpoint", str(checkpoint), "--max-tokens", "1"]
    assert main(["generate", *how, *files]) == 0
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    found = {record["id"]: record["prompt_token_ids"] for record in records}
    assert found["1"] == [BOS, *found["2"]]


def test_a_tokenizer_without_bos(tmp_path, capsys):
    def refused(checkpoint: Path, *options: str) -> str:
        how = ["--prompt", "ab", *options]
        assert main(["generate", "--checkpoint", str(checkpoint), *how]) == 2
        return " ".join(capsys.readouterr().err.split())

    checkpoint = save(tmp_path / "bytes", "bytes")
    found = refused(checkpoint, "--bos", "on")
    assert "bos = 'on': tokenizer bytes has no beginning-of-sequence token. Use bos" in found
    file = make_json(tmp_path / "tokenizer.json", None, bos="[X]")
    checkpoint = save(tmp_path / "stated", file, '{"add_bos_token": true}')
    assert "the tokenizer's settings (add_bos_token)" in refused(checkpoint)
    checkpoint = save(tmp_path / "damaged", "bytes", "[1]")
    assert "tokenizer_config.json: expected the settings of a tokenizer" in refused(checkpoint)
    assert TensorReader(checkpoint).names()
