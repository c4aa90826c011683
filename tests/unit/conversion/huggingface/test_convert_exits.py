"""Conversion of exits in both directions: with shared or own weights, truncated, removed."""

import json
from pathlib import Path

import pytest
import torch

from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.tensors import load_reference
from ee_llm.checkpoint.write import TensorSpec, write_checkpoint
from ee_llm.cli.main import main
from ee_llm.config import Config
from tests.unit.conversion.huggingface.folders import make_folder, tensors_of
from tests.unit.conversion.huggingface.test_convert_round_trip import assert_same, run
from tests.unit.inference.models import random_tensors, tiny_config
from tests.unit.inference.stages import TOKENS

pytestmark = pytest.mark.thorough

PARTS = {
    "own outputs": {"output": "own"},
    "tied outputs": {"output": "tied"},
    "shared outputs": {"output": "shared"},
    "bare": {"head": (), "output": "own"},
    "mlp": {"head": ("mlp", "norm")},
    "translator": {"head": ("translator", "norm")},
    "block": {"head": ("block", "mlp"), "output": "own"},
    "temperatures": {"temperatures": (0.5, 2.0)},
}


def save_ours(output: Path, config: Config) -> Path:
    """Write a checkpoint of random tensors, with the byte tokenizer."""
    tensors = random_tensors(config, dtype=torch.float32)
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    return write_checkpoint(output, config, specs, tensors.__getitem__)


def ours(path: Path, family: str = "llama", **options) -> TensorReader:
    sizes = {"vocab_size": 260} | ({"num_kv_heads": 4} if family == "gpt" else {})
    return TensorReader(save_ours(path, tiny_config(family, **sizes, **options)))


def assert_equal_tensors(one: TensorReader, other: TensorReader) -> None:
    assert one.names() == other.names()
    for name in one.names():
        assert torch.equal(one.tensor(name), other.tensor(name)), name


def refusal(capsys, *arguments: object) -> str:
    assert main(["convert", *map(str, arguments)]) == 2
    return " ".join(capsys.readouterr().err.split())


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder)(TOKENS[None]).logits[0]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_exits_with_own_tensors_survive_a_round_trip(tmp_path, capsys, family, parts):
    """transformers ignores their tensors; an entry of config.json describes them."""
    reader = ours(tmp_path / "ours", family, **PARTS[parts])
    run(reader.path, "--to", "hf", "--output", tmp_path / "theirs", "--check")
    is_theirs = not {"mlp", "block"} & set(reader.config().exits.head)
    shown = capsys.readouterr().out
    assert ("boundary 1: logits differ" in shown) == is_theirs
    assert ("exits after layers 1, 2 were not compared" in shown) == (not is_theirs)
    keys = {key for key in tensors_of(tmp_path / "theirs") if key.startswith("ee_llm.exits.")}
    assert keys == {f"ee_llm.{n}" for n in reader.names() if n.startswith(("exits.1", "exits.2"))}
    run(tmp_path / "theirs", "--output", tmp_path / "back", "--tokenizer", "bytes", "--check")
    back = TensorReader(tmp_path / "back")
    assert_equal_tensors(back, reader)
    for name in ("boundaries", "head", "output", "temperatures"):
        found, expected = back.config().exits, reader.config().exits
        assert getattr(found, name) == getattr(expected, name)
    final = load_reference(reader).forward(TOKENS)[4]
    torch.testing.assert_close(logits_of(tmp_path / "theirs"), final, rtol=1e-5, atol=1e-5)


def test_transformers_generates_with_shared_exits(tmp_path):
    folder = make_folder(tmp_path / "theirs")
    run(folder, "--exits", 2, 4, "--output", tmp_path / "ours", "--check")
    run(tmp_path / "ours", "--to", "hf", "--output", tmp_path / "back", "--check")
    assert_same(tmp_path / "back", folder)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(TOKENS[None], **options)
    assert torch.equal(model.generate(TOKENS[None], assistant_early_exit=2, **options), plain)
    run(tmp_path / "back", "--output", tmp_path / "again")
    assert_equal_tensors(TensorReader(tmp_path / "again"), TensorReader(tmp_path / "ours"))
    assert TensorReader(tmp_path / "again").config().exits.boundaries == (2, 4)


@pytest.mark.parametrize("output", ["own", "shared", "tied"])
@pytest.mark.parametrize("family", ["llama", "gpt"])
def test_truncation_at_an_exit_gives_an_ordinary_model(tmp_path, family, output):
    reader = ours(tmp_path / "ours", family, output=output)
    expected = load_reference(reader).forward(TOKENS)[2]
    run(reader.path, "--to", "hf", "--truncate-at", 2, "--output", tmp_path / "cut", "--check")
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["tie_word_embeddings"] == (
        output == "tied"
    )
    torch.testing.assert_close(logits_of(tmp_path / "cut"), expected, rtol=1e-5, atol=1e-5)
    run(reader.path, "--truncate-at", 2, "--output", tmp_path / "pruned")
    pruned = load_reference(TensorReader(tmp_path / "pruned"))
    assert torch.equal(pruned.forward(TOKENS)[2], expected)


def test_truncation_of_a_converted_model(tmp_path):
    """Its original settings no longer hold, except for the special tokens."""
    folder = make_folder(tmp_path / "theirs", "qwen3", bos_token_id=7)
    run(folder, "--exits", 3, "--output", tmp_path / "ours")
    run(tmp_path / "ours", "--to", "hf", "--truncate-at", 3, "--output", tmp_path / "cut")
    settings = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (settings["model_type"], settings["num_hidden_layers"]) == ("qwen3", 3)
    assert settings["bos_token_id"] == 7
    found = logits_of(tmp_path / "cut")
    expected = load_reference(TensorReader(tmp_path / "ours")).forward(TOKENS)[3]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "cut" / "tokenizer.json").is_file()


@pytest.mark.parametrize("to", ["hf", "ee-llm"])
def test_the_dense_model_has_no_exits(tmp_path, to):
    reader = ours(tmp_path / "ours", output="own")
    run(reader.path, "--to", to, "--dense", "--output", tmp_path / "dense")
    expected = load_reference(reader).forward(TOKENS)[4]
    if to == "hf":
        assert "ee_llm" not in (tmp_path / "dense" / "config.json").read_text()
        assert not any("exits" in key for key in tensors_of(tmp_path / "dense"))
        found = logits_of(tmp_path / "dense")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        dense = TensorReader(tmp_path / "dense")
        assert dense.config().exits.boundaries == ()
        assert torch.equal(load_reference(dense).forward(TOKENS)[4], expected)


REFUSED = {
    "no exit": ({}, 3, "the model has no exit there, only at [1, 2]"),
    "bare": ({"head": ()}, 2, "has a norm before its output weight, and the exit has none"),
    "mlp": ({"head": ("mlp", "norm")}, 2, "has only a norm between its layers"),
    "temperature": ({"temperatures": (1.0, 2.0)}, 2, "no temperature, and the exit's is 2.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_exits_that_cannot_be_an_ordinary_model_raise(tmp_path, capsys, case):
    options, boundary, expected = REFUSED[case]
    reader = ours(tmp_path / "ours", **options)
    found = refusal(
        capsys, reader.path, "--to", "hf", "--truncate-at", boundary, "--output", tmp_path / "cut"
    )
    assert f"--truncate-at {boundary}" in found
    assert expected in found
    assert not (tmp_path / "cut").exists()


def test_models_that_transformers_does_not_have_raise(tmp_path, capsys):
    for options in ({"qk_norm": True, "qkv_bias": True}, {"position": "learned"}):
        reader = ours(tmp_path / str(len(options)), **options)
        found = refusal(capsys, reader.path, "--to", "hf", "--output", tmp_path / "theirs")
        assert "none of the model types llama, mistral, qwen2, qwen3, gpt2 is a llama with" in found


@pytest.mark.parametrize("option", [("--dense",), ("--truncate-at", "2")])
def test_a_tuned_model_can_be_read_after_exits_are_removed(tmp_path, option):
    """Regression: the configuration still had options to tune the removed exits."""
    values = tiny_config("llama", vocab_size=260, output="own").model_dump()
    values["tuning"] = {"checkpoint": "runs/dense"}
    values["checkpoint"]["resume"] = "never"
    path = save_ours(tmp_path / "ours", Config(**values))
    run(path, *option, "--output", tmp_path / "cut")
    config = TensorReader(tmp_path / "cut").config()
    assert not config.is_tuning
    assert config.checkpoint.resume == "auto"
    run(tmp_path / "cut", "--to", "hf", "--output", tmp_path / "hf")
